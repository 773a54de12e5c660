"""One file per command, `run(config)`, read top to bottom."""
