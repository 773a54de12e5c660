"""The class embedding of a view, against a bank of anchors."""
