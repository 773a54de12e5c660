"""Stage one, from the teacher to committed units."""
