"""Evaluators of a frozen encoder, one per file."""
