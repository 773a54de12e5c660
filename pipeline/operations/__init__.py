"""Augmentations of uint8 pixels with the same bytes on every machine."""
