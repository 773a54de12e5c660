"""Folders that vanish under a training end it at once, with an error that names them."""

import shutil
from pathlib import Path

import pytest
import torch

from tinymim.configs.errors import CacheCorrupt, UserError
from tinymim.stages import train_student
from tinymim.stages.training import student_step
from tinymim.stages.training.optim import seeded
from tinymim.tests.stages.tiny import copied, student_recipe


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("folder", "error", "words"),
    [
        ("shards", UserError, "cannot be read any more"),
        ("cache", CacheCorrupt, "is missing"),
        ("run-student", FileNotFoundError, "run-student"),
    ],
)
def test_a_folder_that_vanishes_ends_the_training(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    error: type[Exception],
    words: str,
    workers: int,
) -> None:
    home = copied(made, tmp_path / "home")

    def remove(device: torch.device, seed: int, at: int) -> torch.Generator:
        if at == 3:
            shutil.rmtree(home / folder)
        return seeded(device, seed, at)

    monkeypatch.setattr(student_step, "seeded", remove)
    # A slice of each shard is kept, so this is long enough to come to one that is not.
    changes = {"optim": {"batch_size": 8, "steps": 10_000}, "checkpoint": {"every_steps": 5}}
    with pytest.raises(error, match=words):
        train_student.run(student_recipe(home, loader={"workers": workers}, **changes))
