"""Features: the patch tokens of a block, as vectors of few bits."""
