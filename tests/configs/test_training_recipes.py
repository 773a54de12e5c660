"""Recipes of trainings: one student or several, workers that divide what they share."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tinymim.configs.errors import RecipeError
from tinymim.configs.load import dump_recipe, load_recipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.sections.models import ModelConfig
from tinymim.configs.sections.optim import EmaConfig, OptimConfig
from tinymim.stages.training.terms import weights_of

SEVERAL = """
stage: train-student
source: {shards: s}
cache: c
drop_path: 0.2
optim: {batch_size: 64, steps: 10, base_lr: 1e-3}
students:
  wide: {model: {embed_dim: 256}}
  narrow: {model: {embed_dim: 128}, drop_path: 0, ema: {decay: 0.99}, optim: {base_lr: 2e-3, clip_norm: 3.0}}
run: {folder: runs/several}
"""


def recipe(**changes: Any) -> TrainStudentRecipe:
    fields: dict[str, Any] = {"stage": "train-student", "source": {"shards": "s"}, "cache": "c", "student": {}}
    fields |= {"optim": {"steps": 10}, "run": {"folder": "r"}}
    return TrainStudentRecipe.model_validate(fields | changes)


def test_a_student_has_what_it_says_and_else_what_the_recipe_has(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(SEVERAL)
    loaded = load_recipe(path, "train-student", ["students.wide.jitter.contrast=0.1"])
    assert isinstance(loaded, TrainStudentRecipe)
    wide, narrow = (loaded.each()[name] for name in ("wide", "narrow"))
    assert (wide.student, narrow.student) == (ModelConfig(embed_dim=256), ModelConfig(embed_dim=128))
    assert wide.optim == OptimConfig(batch_size=64, steps=10, base_lr=1e-3)
    assert narrow.optim == OptimConfig(batch_size=64, steps=10, base_lr=2e-3, clip_norm=3.0)
    assert (wide.drop_path, narrow.drop_path) == (0.2, 0.0)
    assert (wide.jitter.contrast, narrow.jitter.contrast) == (0.1, 0.4)
    assert (wide.ema, narrow.ema) == (None, EmaConfig(decay=0.99))
    assert (wide.run.folder, narrow.run.folder) == (Path("runs/several/wide"), Path("runs/several/narrow"))
    assert wide.students is None and wide.order == loaded.order


def test_students_may_be_on_devices_of_their_own() -> None:
    students = {"a": {"model": {}}, "b": {"model": {}, "device": "cuda:1"}}
    optim, run = {"steps": 1}, {"folder": "runs/x", "device": "cuda:0"}
    fields = {"stage": "train-student", "source": {"shards": "s"}, "cache": "c", "students": students}
    recipe = TrainStudentRecipe.model_validate(fields | {"optim": optim, "run": run})
    assert {name: own.run.device for name, own in recipe.each().items()} == {"a": "cuda:0", "b": "cuda:1"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"fresh": 0.5}, "on_missing must be teacher for fresh; got refuse"),
        ({"write_back": True, "views": {}, "on_missing": "skip"}, "teacher for write_back, views; got skip"),
        ({"layers": {"a": {"teacher": {}}}}, r"on_missing must be teacher for layers\.a\.teacher"),
        ({"layers": {"a": {"codec": {"name": "dense"}}}}, r"layers\.a\.codec needs layers\.a\.teacher"),
        ({"on_missing": "teacher"}, "on_missing: teacher needs num_views"),
        ({"on_missing": "teacher", "fresh": 0.5}, "on_missing: teacher needs num_views"),
    ],
)
def test_what_is_for_a_teacher_in_the_loop_needs_one(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        recipe(**changes)
    for fine in ({"num_views": 2}, {"fresh": 1}):
        assert recipe(on_missing="teacher", **fine).on_missing == "teacher"


def test_the_resolved_recipe_of_several_students_is_a_recipe(tmp_path: Path) -> None:
    path, resolved = tmp_path / "recipe.yaml", tmp_path / "resolved.yaml"
    path.write_text(SEVERAL)
    loaded = load_recipe(path, "train-student")
    assert isinstance(loaded, TrainStudentRecipe)
    resolved.write_text(dump_recipe(loaded))
    assert load_recipe(resolved, "train-student") == loaded
    for own in loaded.each().values():
        resolved.write_text(dump_recipe(own))
        assert load_recipe(resolved, "train-student") == own


def test_a_layer_has_what_it_says_and_else_the_recipe_s_targets(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    layers = "layers:\n  a: {weight: 2}\n  vit.mae-b2: {end_weight: 0, targets: {loss: mse}}\ntargets: {rows: 4}\n"
    path.write_text(SEVERAL + layers)
    loaded = load_recipe(path, "train-student", ["layers.vit.mae-b2.weight=0.5", "layers.new={}"])
    assert isinstance(loaded, TrainStudentRecipe)
    found = {name: (weights_of(each), each.targets.rows, each.targets.loss) for name, each in loaded.each_layer()}
    assert found == {"a": ((2, 2), 4, None), "vit.mae-b2": ((0.5, 0), None, "mse"), "new": ((1, 1), 4, None)}
    path.write_text(dump_recipe(loaded))
    assert load_recipe(path, "train-student") == loaded


def test_without_layers_the_only_one_counts_once() -> None:
    ((name, only),) = recipe(targets={"rows": 3}).each_layer()
    assert name is None and weights_of(only) == (1, 1) and only.targets.rows == 3
    ((name, _),) = recipe(layer="a").each_layer()
    assert str(name) == "a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "a", "layers": {"b": {}}}, "give layer or layers, not both; got layer a, layers b"),
        ({"layers": {}}, "layers needs a layer with a weight above 0; got no layer"),
        ({"layers": {"a": {"weight": 0}, "b": {"weight": 0}}}, "a weight above 0; got a 0, b 0"),
        ({"layers": {"a": {"weight": -1}}}, r"layers\.a\.weight"),
        ({"layers": {"a": {"end_weight": float("inf")}}}, r"layers\.a\.end_weight"),
        ({"layers": {"A b": {}}}, "layers.A b"),
    ],
)
def test_wrong_layers_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(**changes)


def test_one_student_is_each_of_one() -> None:
    one = recipe()
    assert one.each() == {"": one}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"students": {"a": {"model": {}}}}, "give student, or students"),
        ({"student": None}, "give student, or students"),
        ({"student": None, "students": {}}, "give student, or students"),
        (
            {"student": None, "students": {"a": {"model": {}, "optim": {"batch_size": 8}}}},
            r"students\.a\.optim\.batch_size must be the recipe's, .* got 8 and 256",
        ),
        ({"student": None, "students": {"a/b": {"model": {}}}}, "should match pattern"),
        ({"order": {"lanes": 8}, "workers": 3}, r"workers must divide order\.lanes; got 3 workers"),
        ({"order": {"lanes": 2}, "optim": {"steps": 1, "batch_size": 7}, "workers": 2}, r"must divide optim\.batch"),
        ({"ema": {"decay": 1.0}}, "less than 1"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(**changes)


def test_a_mistake_within_a_student_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(SEVERAL.replace("clip_norm", "clip_nrm"))
    with pytest.raises(
        RecipeError, match=r"students\.narrow\.optim\.clip_nrm: unknown key .* did you mean `clip_norm`"
    ):
        load_recipe(path, "train-student")
