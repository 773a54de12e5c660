"""The commands `tinymim cache X`, one a file, and how a cache is opened."""
