"""Teachers and students over timm, taps, checkpoints in and out."""
