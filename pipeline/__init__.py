"""From tar to batch, shared by both stages: shards, views, order, datasets, loader."""
