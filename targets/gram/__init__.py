"""Plain cosines between the patch tokens of a block."""
