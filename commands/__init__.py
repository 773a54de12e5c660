"""Flags and help of every command; no logic."""
