"""What every run has: its folder, progress, sessions, signals, device, Ray."""
