"""Attention logits: q k^T / sqrt(d) of a block before the softmax."""
