"""Relations between tokens (q, k, v of a ViT block): rows, codecs, losses, fidelity."""
