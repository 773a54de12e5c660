"""Weights of another number of heads fit by their shapes; the recipe in the file tells them apart."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tinymim.configs.errors import CheckpointError
from tinymim.configs.load import dump_recipe, load_recipe
from tinymim.configs.sections.models import ModelConfig, TeacherConfig
from tinymim.configs.taps import Tap
from tinymim.models import backbone
from tinymim.models.checkpoints import to_safetensors
from tinymim.models.classifier import build_classifier, load_classifier
from tinymim.models.heads import stated_heads
from tinymim.models.teacher import Teacher
from tinymim.models.vit import build_vit
from tinymim.models.weights import load_weights
from tinymim.tests.stages.tiny import STATED

SIZES = {"name": "vit_tiny_patch16_224", "img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2}


def model(heads: int) -> ModelConfig:
    return ModelConfig.model_validate(SIZES | {"num_heads": heads})


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A student of three heads, as `train-student` exports it."""
    student = ", ".join(f"{name}: {value}" for name, value in (SIZES | {"num_heads": 3}).items())
    recipe = load_recipe(Path("demo-narrow"), "train-student", [f"student={{{student}}}"])
    path = tmp_path / "student.safetensors"
    path.write_bytes(to_safetensors(build_vit(model(3)).state_dict(), {"recipe": dump_recipe(recipe)} | STATED))
    return str(path)


def as_encoder(weights: str, heads: int) -> None:
    load_weights(build_vit(model(heads)), weights)


def as_classifier(weights: str, heads: int) -> None:
    load_classifier(build_classifier(model(heads), 5, "cls"), model(heads), weights)


def as_teacher(weights: str, heads: int) -> None:
    Teacher(TeacherConfig.model_validate(SIZES | {"num_heads": heads, "weights": weights, "block": 2}), [Tap("qkv", 2)])


@pytest.mark.parametrize("load", [as_encoder, as_classifier, as_teacher])
def test_another_number_of_heads_is_refused(weights: str, load: Callable[[str, int], None]) -> None:
    load(weights, 3)
    with pytest.raises(CheckpointError, match="another number of heads") as caught:
        load(weights, 4)
    assert caught.value.got == "3 heads in its recipe, 4 in this model" and "num_heads=3" in str(caught.value.hint)


def test_what_the_recipe_leaves_open_is_timms_and_a_file_sends_nobody_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stated_heads({"recipe": "model: {name: vit_small_patch16_224, depth: 1000}"}) == 6
    monkeypatch.setattr("tinymim.models.heads.build_model", lambda _: pytest.fail("the hub was asked"))
    assert stated_heads({"recipe": "model: {name: 'hf-hub:somebody/something'}"}) is None


@pytest.mark.parametrize("recipe", [None, "[", "a list", "[1, 2]", "{model: {name: no_such_model}}", "{student: null}"])
def test_a_file_that_states_no_heads_is_taken_at_its_shapes(tmp_path: Path, recipe: str | None) -> None:
    metadata = {} if recipe is None else {"recipe": recipe}
    assert stated_heads(metadata) is None
    path = tmp_path / "other.safetensors"
    path.write_bytes(to_safetensors(build_vit(model(3)).state_dict(), metadata))
    as_encoder(str(path), 4)
    assert backbone.heads(build_vit(model(4))) == 4
