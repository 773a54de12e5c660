"""Trainings that the tests of many ranks start in workers, which can import them from here."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from tinymim.configs.errors import CacheCorrupt, UserError
from tinymim.configs.schema.pretrain import PretrainMaeRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.sections.audits import AuditConfig
from tinymim.stages import pretrain, train_student
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.training import student_step
from tinymim.stages.training.ranks import Ranks
from tinymim.targets.contract import Loss
from tinymim.targets.relations.kind import RelationKind
from tinymim.tests.stages.tiny import SIZES, signal_in_step

BROKEN_STEP = 3
LAST_ERROR = CacheCorrupt("one rank found this", got="a", expected="b", hint="c")


def mae_recipe(root: Path, **changes: Any) -> PretrainMaeRecipe:
    fields: dict[str, Any] = {
        "stage": "pretrain-mae",
        "source": {"shards": root / "shards"},
        "views": {"size": 32},
        "model": {"name": "vit_tiny_patch16_224", "embed_dim": 16, "depth": 2, **SIZES},
        "mae": {"decoder_dim": 8, "decoder_heads": 2},
        "optim": {"batch_size": 8, "steps": 6, "base_lr": 0.05},
        "order": {"lanes": 4},
        "loader": {"workers": 0},
        "run": {"folder": root / "run-mae", "device": "cpu", "threads": 1, "log_every": 1},
    }
    return PretrainMaeRecipe.model_validate(fields | changes)


def all_that_four_ranks_do(recipe: TrainStudentRecipe, ranks: Ranks) -> None:
    """Tell one another; pre-train; go on with the students of `recipe`; train them anew in three other ways.

    As a whole; audited, stopped by a signal to rank 2 alone and continued; with a loss that breaks on rank 1 alone. At
    last rank 1 alone raises an error, while the others wait for it.
    """
    assert ranks.least(5 + ranks.rank, -ranks.rank) == [5, -3]
    assert ranks.gather(10 * ranks.rank) == [0, 10, 20, 30]
    assert ranks.mean(torch.tensor([1.0, 2.0]) * ranks.rank).tolist() == [1.5, 3.0]
    assert ranks.total(torch.tensor([[2**60 + 1, ranks.rank]])).tolist() == [[2**62 + 4, 6]]
    assert ranks.gather_bytes(b"x" * ranks.rank) == [b"", b"x", b"xx", b"xxx"]
    assert ranks.gather_bytes(b"") == [b""] * 4
    assert ranks.from_first(b"of rank 0" if ranks.first else b"of rank 1") == b"of rank 0"
    assert ranks.from_first(None) is None

    root = recipe.run.folder.parent
    pretrain.train(mae_recipe(root), ranks)
    train_student.train(recipe, ranks)

    train_student.train(in_folder(recipe, root / "run-whole"), ranks)
    if ranks.rank == 2:
        with pytest.MonkeyPatch.context() as monkeypatch:
            signal_in_step(student_step, 4, signal.SIGTERM, monkeypatch)
            _interrupted(audited(recipe, root / "run-resumed"), ranks)
    else:
        _interrupted(audited(recipe, root / "run-resumed"), ranks)
    train_student.train(audited(recipe, root / "run-resumed"), ranks)

    if ranks.rank == 1:
        RelationKind.losses = _breaking()  # type: ignore[method-assign]  # this process ends soon
    try:
        train_student.train(in_folder(recipe, root / "run-broken"), ranks)
    except UserError as error:
        (root / f"broken-on-{ranks.rank}").write_text(str(error))
    if ranks.rank == 1:
        raise LAST_ERROR
    ranks.least(0)


def in_folder(recipe: TrainStudentRecipe, folder: Path) -> TrainStudentRecipe:
    """The same run elsewhere."""
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"folder": folder})})


def audited(recipe: TrainStudentRecipe, folder: Path) -> TrainStudentRecipe:
    """The same run elsewhere, with audits before, amid and after it."""
    config = AuditConfig(cache=folder.parent / "audit", source=recipe.source, num_images=8, every_epochs=0.375)
    return in_folder(recipe, folder).model_copy(update={"audit": config})


def _interrupted(recipe: TrainStudentRecipe, ranks: Ranks) -> None:
    with pytest.raises(Interrupted, match="state of step 5 saved") as caught:
        train_student.train(recipe, ranks)
    assert caught.value.requeue


def _breaking() -> Callable[..., dict[str, Loss]]:
    """Losses whose first is nan for the last student in step BROKEN_STEP; there are two students and two parts."""
    calls, whole = count(1), RelationKind.losses

    def losses(*args: Any) -> dict[str, Loss]:
        broken = next(calls) == 4 * (BROKEN_STEP + 1)
        return {n: Loss(loss.parts * (math.nan if broken else 1.0), loss.floor) for n, loss in whole(*args).items()}

    return losses


@contextmanager
def meanwhile(wanted: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Do something from another thread once `wanted` holds."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            if wanted():
                act()
                return
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
