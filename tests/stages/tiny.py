"""A set so small that both stages run in a second: recipes of a teacher, a cache and a student, and what they left."""

import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.models.timm_folder import Pixels
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.stages import make_shards
from tinymim.stages.run.folder import read_metrics
from tinymim.stages.training.optim import seeded
from tinymim.storage.layout import VIEWS
from tinymim.storage.reader import CacheReader

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "num_heads": 2}
TEACHER: dict[str, Any] = {"name": "vit_tiny_patch16_224", "embed_dim": 16, "depth": 2, **SIZES}
STUDENT: dict[str, Any] = {"name": "vit_tiny_patch16_224", "embed_dim": 8, "depth": 2, **SIZES}

STATED = Pixels(IMAGENET_MEAN, IMAGENET_STD).metadata()  # of a file of weights: the pixels it is for

Overrides = dict[str, Any]


def run_in(folder: Path) -> dict[str, Any]:
    """A `run` section whose numbers are the same on every machine: one thread of the CPU."""
    return {"folder": folder, "device": "cpu", "threads": 1}


def cache_recipe(root: Path, **changes: Any) -> CacheTeacherRecipe:
    fields: dict[str, Any] = {
        "stage": "cache-teacher",
        "source": {"shards": root / "shards"},
        "views": {"size": 32, "scaled_decode": False},  # as when the golden numbers were made
        "num_views": 2,
        "teacher": TEACHER | {"block": 2, "weights": str(root / "teacher.safetensors")},
        "codec": {"rows": 6, "head_k": 1, "tail_k": 3},
        "cache": root / "cache",
        "audit_views": 0,  # audits are most of the work of so small a cache; where they matter a test asks for them
        "batch_size": 8,
        "loader": {"workers": 0},
        "run": run_in(root / "run-cache"),
    }
    return CacheTeacherRecipe.model_validate(fields | changes)


def student_recipe(root: Path, **changes: Any) -> TrainStudentRecipe:
    fields: dict[str, Any] = {
        "stage": "train-student",
        "source": {"shards": root / "shards"},
        "cache": root / "cache",
        "student": STUDENT,
        "optim": {"batch_size": 8, "steps": 20, "base_lr": 0.1, "warmup": 0.2},
        "order": {"shuffle_units": 2},
        "verify": {"first": 10**6},
        "loader": {"workers": 0},
        "run": run_in(root / "run-student") | {"log_every": 1},
    }
    return TrainStudentRecipe.model_validate(fields | changes)


def write_teacher(path: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    sizes = {name: value for name, value in TEACHER.items() if name != "name"}
    save_file(timm.create_model(str(TEACHER["name"]), num_classes=0, **sizes).state_dict(), path, STATED)


def write_set(root: Path, count: int = 36, images_per_shard: int = 12) -> Path:
    """Write drawn shards and a random teacher into `root`."""
    make_shards.run("drawn", root / "shards", make_shards.Options(images_per_shard, count=count, seed=5))
    write_teacher(root / "teacher.safetensors")
    return root


def copied(made: Path, home: Path) -> Path:
    """Copy all of `made` but its runs."""
    return Path(shutil.copytree(made, home, ignore=shutil.ignore_patterns("run-*")))


def signal_in_step(stage: ModuleType, step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process get a signal, once, while `stage` is in step `step`, counted from 0."""
    asked: list[int] = []

    def interrupt(device: torch.device, seed: int, at: int) -> torch.Generator:
        if at == step and not asked:
            asked.append(at)
            os.kill(os.getpid(), number)
        return seeded(device, seed, at)

    monkeypatch.setattr(stage, "seeded", interrupt)


def losses(root: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(root / "run-student")]


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def stored(root: Path) -> dict[str, bytes]:
    """All of a cache but its descriptions, which hold library versions and the folder of the weights."""
    return {name: data for name, data in tree(root / "cache").items() if not name.endswith("zarr.json")}


def unit_names(place: Path) -> dict[str, list[str]]:
    """The units of every layer of a cache, as text."""
    reader = CacheReader(place)
    return {layer: [str(info.unit) for info in reader.units(layer)] for layer in (VIEWS, *reader.layers)}
