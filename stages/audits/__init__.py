"""Audits of students on held-out images: whether they learn from their teacher, and alarms."""
