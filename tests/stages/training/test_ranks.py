"""Many ranks train like one: real processes over gloo, really killed, really stopped.

Starting workers takes seconds, so that each test that does checks several things.
"""

import io
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tinymim import cli
from tinymim.configs.errors import CacheCorrupt, RecipeError
from tinymim.configs.load import dump_recipe, load_recipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.stages import cache_teacher, pretrain, train_student
from tinymim.stages.run.folder import read_audits, read_metrics
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.training import student_step
from tinymim.stages.training.launch import on_ranks
from tinymim.stages.training.ranks import (
    Ranks,
    batch_arithmetic,
    environment_ranks,
    rank_device,
    require_equal_parts,
)
from tinymim.tests.stages.ranks import BROKEN_STEP, LAST_ERROR, all_that_four_ranks_do, mae_recipe, meanwhile
from tinymim.tests.stages.tiny import STUDENT, cache_recipe, copied, losses, signal_in_step, student_recipe

OPTIM = {"batch_size": 8, "steps": 60, "base_lr": 0.1, "warmup": 0.2}
ORDER = {"shuffle_units": 2, "lanes": 4, "views_per_decode": 2, "views_per_epoch": "all"}
STUDENTS: dict[str, dict[str, Any]] = {
    "as-is": {"model": STUDENT},
    "eager": {"model": STUDENT, "optim": {"base_lr": 0.05}, "ema": {"decay": 0.9}},
}


@pytest.fixture(scope="module")
def made(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shards and cache, a cache for audits, and what one process trains in sixty steps."""
    root = copied(made, tmp_path_factory.mktemp("ranks") / "made")
    dense = {"codec": {"name": "dense"}, "num_views": 1}
    cache_teacher.run(cache_recipe(root, cache=root / "audit", **dense))
    train_student.run(recipe(root))
    return root


def recipe(root: Path, **changes: Any) -> TrainStudentRecipe:
    """Drop path, jitter and two views of a decode are on, and a state is saved every fifth step."""
    return student_recipe(root, **{"optim": OPTIM, "order": ORDER, "checkpoint": {"every_steps": 5}} | changes)


def assert_same(found: list[float], wanted: list[float]) -> None:
    """Within fp32's rounding, which sixty steps have carried on."""
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)


# ---------------------------------------------------------------- real processes


def test_two_ranks_train_like_one_and_a_killed_one_starts_all_again(
    made: Path, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, killed = home / "run-student", []

    def kill() -> None:
        worker = multiprocessing.active_children()[1]
        killed.append(worker.pid)
        os.kill(worker.pid or 0, signal.SIGKILL)

    with meanwhile(lambda: any(folder.glob("state-*.pt")), kill):
        train_student.run(recipe(home, workers=2))
    assert killed
    err = capfd.readouterr().err
    assert re.search(r"train-student: worker \d .*; restart 1 of 3 from the last state", err) and "Traceback" not in err
    starts = [int(step) for step in re.findall(r"batch 8 = 2 ranks x 4, from step (\d+)\n", err)]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] % 5 == 0 < starts[1]
    assert [line["step"] for line in read_metrics(folder)] == list(range(60))
    assert_same(losses(home), losses(made))
    assert sorted(path.name for path in folder.glob("state-*")) == ["state-00000055.pt", "state-00000060.pt"]


@dataclass(frozen=True)
class Four:
    """Folders of what one process does, and of what four ranks do, which go on with the students of another."""

    one: Path
    four: Path
    error: CacheCorrupt


@pytest.fixture(scope="module")
def four(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Four:
    """One launch of four ranks for several tests."""
    one, many = (copied(made, tmp_path_factory.mktemp(name) / "home") for name in ("one", "four"))
    optim = OPTIM | {"steps": 12}
    several = {"student": None, "students": STUDENTS, "optim": optim}
    pretrain.run(mae_recipe(one))
    train_student.run(recipe(one, **several))
    with pytest.MonkeyPatch.context() as monkeypatch:
        signal_in_step(student_step, 6, signal.SIGTERM, monkeypatch)
        with pytest.raises(Interrupted, match="step 7 "):
            train_student.run(recipe(many, **several))
    with pytest.raises(CacheCorrupt) as caught:
        on_ranks(all_that_four_ranks_do, recipe(many, **several | {"workers": 4, "optim": optim | {"accumulate": 2}}))
    return Four(one, many, caught.value)


@pytest.mark.slow  # 35 s: four ranks on two cores; the default run has two
@pytest.mark.parametrize("student", list(STUDENTS))
def test_four_ranks_go_on_with_what_one_process_began(four: Four, student: str) -> None:
    whole, found = (read_metrics(root / "run-student" / student) for root in (four.one, four.four))
    assert [line["step"] for line in found] == list(range(12))
    for name in ("loss", "kl_qk", "kl_vv"):
        assert_same([line[name] for line in found], [line[name] for line in whole])
    files = (
        ["student.safetensors", "student-ema.safetensors"] if "ema" in STUDENTS[student] else ["student.safetensors"]
    )
    for file in files:
        wanted, weights = (load_file(root / "run-student" / student / file) for root in (four.one, four.four))
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow  # 35 s: four ranks on two cores; the default run has two
def test_a_signal_to_one_rank_stops_all_and_the_same_number_goes_on_to_the_bit_with_audits(four: Four) -> None:
    for name in STUDENTS:
        whole, resumed = (four.four / run / name for run in ("run-whole", "run-resumed"))
        assert len(list((resumed / "tensorboard").iterdir())) == 2  # two starts
        lines = [line for line in read_metrics(resumed) if "loss" in line]
        assert [line["loss"] for line in lines] == [line["loss"] for line in read_metrics(whole)]
        assert [line["step"] for line in read_audits(resumed)] == [0, 3, 6, 9, 12]
        wanted = load_file(whole / "student.safetensors")
        for tensor_name, tensor in load_file(resumed / "student.safetensors").items():
            assert torch.equal(tensor, wanted[tensor_name]), tensor_name


@pytest.mark.slow  # 35 s: four ranks on two cores; the default run has two
def test_masked_pre_training_on_four_ranks_is_that_of_one(four: Four) -> None:
    whole, found = ([line["loss"] for line in read_metrics(root / "run-mae")] for root in (four.one, four.four))
    np.testing.assert_allclose(found, whole, rtol=1e-5)
    assert len(found) == 6 and (four.four / "run-mae" / "encoder.safetensors").exists()


@pytest.mark.slow  # 35 s: four ranks on two cores; the default run has two
def test_a_loss_that_breaks_on_one_rank_stops_all(four: Four) -> None:
    folder = four.four / "run-broken" / "eager"
    said = [(four.four / f"broken-on-{rank}").read_text() for rank in range(4)]
    assert len(set(said)) == 1
    assert said[0].startswith(f"the loss of student eager is not finite at step {BROKEN_STEP}\n  got: found by rank 1;")
    dump = folder / f"not-finite-{BROKEN_STEP:08d}.pt"
    state: dict[str, Any] = torch.load(io.BytesIO(dump.read_bytes()[32:]), weights_only=True)
    assert str(dump) in said[0] and state["about"]["ranks"] == [1] and state["about"]["items"].shape == (8, 3)
    for name in STUDENTS:
        assert [line["step"] for line in read_metrics(folder.parent / name)] == list(range(BROKEN_STEP))
    assert not list(folder.parent.rglob("state-*.pt"))  # nothing that is broken was saved


@pytest.mark.slow  # 35 s: four ranks on two cores; the default run has two
def test_an_error_of_one_rank_is_raised_as_it_is_and_not_tried_again(four: Four) -> None:
    assert str(four.error) == str(LAST_ERROR) and four.error.hint == LAST_ERROR.hint
    assert len(list((four.four / "run-broken" / "eager" / "tensorboard").iterdir())) == 1  # one start


@pytest.mark.slow  # 20 s; test_interrupt has what one process does at a signal
def test_sigterm_saves_and_asks_to_be_requeued(made: Path, home: Path) -> None:
    """To the parent alone, as from `kill`; the workers' step is agreed, and one process continues."""
    (home / "recipe.yaml").write_text(dump_recipe(recipe(home, workers=2)))
    script = shutil.which("tinymim", path=str(Path(sys.executable).parent))
    assert script
    metrics = home / "run-student" / "metrics.jsonl"
    with subprocess.Popen([script, "train-student", "recipe.yaml"], cwd=home, stderr=subprocess.PIPE, text=True) as run:
        deadline_s = time.monotonic() + 300
        while not (metrics.exists() and metrics.read_text()) and run.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.005)
        run.send_signal(signal.SIGTERM)
        err = run.communicate(timeout=300)[1]
    assert run.returncode == cli.EXIT_REQUEUE == 75
    saved = re.search(r"interrupted: state of step (\d+) saved; the same command continues\n$", err)
    assert saved and 0 < int(saved[1]) < 60 and "Traceback" not in err and "Error" not in err
    assert len(losses(home)) == int(saved[1])
    train_student.run(recipe(home))
    assert_same(losses(home), losses(made))


# ---------------------------------------------------------------- arithmetic and refusals


def test_ranks_are_those_of_torchruns_environment() -> None:
    assert environment_ranks({}) == Ranks(0, 1, 0, 1)
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert environment_ranks(variables) == Ranks(5, 8, 1, 4)


def test_the_batch_is_said_aloud() -> None:
    assert batch_arithmetic(4096, Ranks(), 1) == "4,096"
    assert batch_arithmetic(4096, Ranks(0, 8), 4) == "4,096 = 8 ranks x 128 x 4 accumulated"
    assert batch_arithmetic(4096, Ranks(), 4) == "4,096 = 1,024 x 4 accumulated"


def test_a_batch_that_does_not_divide_is_refused(home: Path) -> None:
    require_equal_parts(8, Ranks(0, 2), 4)
    with pytest.raises(RecipeError, match="equal parts"):
        require_equal_parts(8, Ranks(0, 2), 3)
    with pytest.raises(RecipeError, match="equal parts"):
        train_student.run(recipe(home, optim=OPTIM | {"accumulate": 3}))
    with pytest.raises(ValueError, match=r"workers must divide order\.lanes; got 3 workers, order\.lanes 4"):
        recipe(home, workers=3)


def test_each_rank_of_a_machine_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert rank_device("auto", Ranks(3, 4, 1, 2)) == torch.device("cuda:1")
    assert rank_device("cuda:1", Ranks()) == torch.device("cuda:1")
    assert rank_device("cpu", Ranks(3, 4, 3, 4)) == torch.device("cpu")
    with pytest.raises(RecipeError, match="4 workers, 2 GPUs"):
        rank_device("auto", Ranks(0, 4, 0, 4))
    with pytest.raises(RecipeError, match="one GPU for several"):
        rank_device("cuda:1", Ranks(0, 2, 0, 2))


def test_parts_of_a_batch_give_the_same_losses(made: Path, home: Path) -> None:
    train_student.run(recipe(home, optim=OPTIM | {"accumulate": 4}))
    assert_same(losses(home), losses(made))


def test_a_students_folder_is_that_of_the_student_alone(made: Path, home: Path) -> None:
    one = {"student": None, "students": {"only": {"model": STUDENT}}}
    train_student.run(recipe(home, **one))
    folder = home / "run-student" / "only"
    assert [line["loss"] for line in read_metrics(folder)] == losses(made)
    alone = load_recipe(folder / "recipe.yaml", "train-student")
    assert isinstance(alone, TrainStudentRecipe)
    assert alone.students is None and alone.run.folder == folder
    (folder / "student.safetensors").unlink()
    train_student.run(alone)  # its own state, complete: exported again
    assert (folder / "student.safetensors").exists()
