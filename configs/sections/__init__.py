"""The sections that recipes are made of, one subject a file."""
