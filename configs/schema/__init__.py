"""The one schema of all recipes, one command a file."""
