"""A student trains on the views that a cache holds, and goes on with those it began with when the cache has grown."""

import shutil
import signal
from pathlib import Path

import pytest
import yaml

from tinymim.configs.errors import CheckpointError, UserError
from tinymim.stages import make_shards, train_student
from tinymim.stages.run.folder import RECIPE_NAME
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.training import student_step
from tinymim.storage.layout import VIEWS
from tinymim.tests.stages.sketched import grow
from tinymim.tests.stages.tiny import losses, signal_in_step, student_recipe


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards with two views, and the losses of a whole run in `run-student`."""
    root = tmp_path_factory.mktemp("grown")
    make_shards.run("drawn", root / "shards", make_shards.Options(12, count=36, seed=5))
    grow(root, {VIEWS: [(0, 2)], "a": [(0, 1), (1, 1)]})
    train_student.run(student_recipe(root))
    return root


@pytest.fixture
def home(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "home", ignore=shutil.ignore_patterns("run-*")))


def num_views_of(folder: Path) -> int:
    views: int = yaml.safe_load((folder / RECIPE_NAME).read_text())["num_views"]
    return views


@pytest.mark.parametrize("several", [False, True])
def test_a_resumed_run_goes_on_with_the_views_it_began_with(
    several: bool, begun: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = student_recipe(home).student
    recipe = student_recipe(home, **({"student": None, "students": {"s": {"model": model}}} if several else {}))
    folder = home / "run-student" / "s" if several else home / "run-student"
    signal_in_step(student_step, 5, signal.SIGTERM, monkeypatch)
    with pytest.raises(Interrupted):
        train_student.run(recipe)
    grow(home, {VIEWS: [(2, 1)], "a": [(2, 1)]})  # a colleague adds a view of every image
    with pytest.raises(CheckpointError, match="order of samples") as caught:
        train_student.run(recipe.model_copy(update={"num_views": 3}))
    assert "num_views" in str(caught.value.hint)
    train_student.run(recipe)  # the same command continues
    assert num_views_of(folder) == 2 and num_views_of(home / "run-student") == 2
    if several:
        shutil.move(folder / "metrics.jsonl", home / "run-student" / "metrics.jsonl")
    assert losses(home) == losses(begun)
    fresh = student_recipe(home, run={"folder": home / "run-fresh", "device": "cpu", "threads": 1})
    train_student.run(fresh)
    assert num_views_of(home / "run-fresh") == 3


def test_without_a_state_a_run_starts_with_all_views(home: Path) -> None:
    recipe = student_recipe(home, optim={"batch_size": 8, "steps": 2, "base_lr": 0.1})
    train_student.run(recipe)
    grow(home, {VIEWS: [(2, 1)], "a": [(2, 1)]})
    train_student.run(recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"resume": False})}))
    assert num_views_of(home / "run-student") == 3
    for state in (home / "run-student").glob("state-*.pt"):
        state.unlink()
    grow(home, {VIEWS: [(3, 1)], "a": [(3, 1)]})
    train_student.run(recipe)
    assert num_views_of(home / "run-student") == 4


def test_views_of_some_shards_only_are_not_used_unless_named(begun: Path, home: Path) -> None:
    grow(home, {VIEWS: [(2, 1)], "a": [(2, 1)]}, slice(1))
    train_student.run(student_recipe(home))
    assert losses(home) == losses(begun)
    with pytest.raises(UserError, match="lacks 2 of 3 shards") as caught:
        train_student.run(student_recipe(home, num_views=3))
    assert "layer a: 1 shard has 3 views, 2 shards have 2 views" in str(caught.value.got)


def test_a_student_learns_from_the_layer_that_its_recipe_names(begun: Path, home: Path) -> None:
    grow(home, {VIEWS: [(2, 1)], "b": [(0, 2)]})
    with pytest.raises(UserError, match="has 2 target layers"):
        train_student.run(student_recipe(home))
    train_student.run(student_recipe(home, layer="b"))
    assert losses(home) == losses(begun)  # its records are the same
