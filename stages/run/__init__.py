"""Parts of every run: its folder, progress, sessions, signals, device, Ray."""
