"""Fine-tunings of a tiny model on drawn shards, for the tests; workers can import them from here."""

from pathlib import Path
from typing import Any

from tinymim.configs.schema.finetune import FinetuneRecipe
from tinymim.stages.run.folder import read_metrics

MODEL: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
}


def recipe(shards: Path, folder: Path, **changes: Any) -> FinetuneRecipe:
    """Six epochs of eight steps; all augmentations, drop path and the average are on; a state every third step."""
    fields: dict[str, Any] = {
        "stage": "finetune",
        "train": {"shards": shards, "pattern": "shard-00000[0-3].tar"},
        "val": {"shards": shards, "pattern": "shard-000004.tar"},
        "views": {"size": 32},
        "model": MODEL,
        "weights": "random",
        "drop_path": 0.1,
        "augment": {"rand_augment": "rand-m5-mstd0.5-inc1"},
        "optim": {"batch_size": 8, "steps": 20, "base_lr": 0.05, "warmup": 0.2},
        "ema": {"decay": 0.9},
        "validation": {"batch_size": 6, "resize_ratio": 1.0},
        "order": {"lanes": 2},
        "loader": {"workers": 0},
        "checkpoint": {"every_steps": 3},
        "run": {"folder": folder, "device": "cpu", "threads": 1, "log_every": 1},
    }
    return FinetuneRecipe.model_validate(fields | changes)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def validations(folder: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics(folder) if "val_model_top1" in line]
