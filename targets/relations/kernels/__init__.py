"""The hot loops of the science: fused, chunked, and the same numbers on every device."""
