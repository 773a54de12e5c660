"""Output for people: reports, tables, numbers, plots."""
