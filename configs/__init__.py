"""The typed recipe schema, the shipped recipes and the error tree."""
