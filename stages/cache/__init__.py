"""The commands `tinymim cache X`, one file each, and what they share."""
