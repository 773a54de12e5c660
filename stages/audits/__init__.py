"""Whether students learn what their teacher says: audits on held-out images, alarms."""
