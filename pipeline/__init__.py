"""From tar to batch for both stages: shards, views, order, datasets, loader."""
