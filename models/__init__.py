"""Teachers and students over timm; taps for q, k, v; checkpoints in and out."""
