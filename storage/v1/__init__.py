"""Reading of format 1, for `cache info` and the upgrade by `cache copy`; no other module reads it, none writes it."""
