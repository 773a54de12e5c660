"""Evaluators of a frozen encoder, one a file."""
