"""Teachers and students from factories: the same caches, runs, identities and refusals as for timm's models."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tinymim.configs.errors import CacheMismatch, CheckpointError, RecipeError
from tinymim.configs.load import dump_recipe, load_recipe
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.evaluate import EvaluateRecipe
from tinymim.models.checkpoints import tensors_sha256
from tinymim.stages import cache_teacher, evaluate, train_student
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages.tiny import cache_recipe, losses, run_in, stored, student_recipe, write_set

PIXELS = {"mean": [0.5] * 3, "std": [0.25] * 3}
CODECS: dict[str, dict[str, Any]] = {
    "sketch": {"rows": 6, "head_k": 1, "tail_k": 3},
    "features": {"kind": "features", "name": "int8"},
    "cls": {"kind": "cls", "name": "int8"},
    "logits": {"kind": "logits", "classes": 5},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("own"), count=24)


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The user's module in the working folder."""
    shutil.copy(Path(__file__).parents[1] / "models" / "own_models.py", tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("mine", None)


def teacher_section(**changes: Any) -> dict[str, Any]:
    return {"factory": "mine:teacher", "img_size": 32, "block": 1, **PIXELS} | changes


def own_recipe(root: Path, home: Path, teacher: dict[str, Any], **changes: Any) -> CacheTeacherRecipe:
    fields: dict[str, Any] = {"cache": home / "cache", "run": run_in(home / "run-cache"), "codec": CODECS["sketch"]}
    return cache_recipe(root, teacher=teacher, **fields | changes)


@pytest.mark.parametrize("name", CODECS)
def test_a_teacher_of_ones_own_and_a_student_of_ones_own(root: Path, tmp_path: Path, name: str) -> None:
    cache_teacher.run(own_recipe(root, tmp_path, teacher_section(), codec=CODECS[name], audit_views=4))
    [layer] = CacheReader(tmp_path / "cache").layers.values()
    assert layer.teacher["name"] == "teacher" and layer.teacher["license"] == "apache-2.0"
    assert layer.teacher["arch"] == {"img_size": 32, "factory": "mine:teacher", "args": {}}
    assert layer.teacher["weights_sha256"] == tensors_sha256(sys.modules["mine"].teacher().state_dict())
    student = {"factory": "mine:student", "img_size": 32}
    changes = {"cache": tmp_path / "cache", "run": run_in(tmp_path / "run-student") | {"log_every": 1}}
    train_student.run(student_recipe(root, student=student, **changes))
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    weights = load_file(tmp_path / "run-student" / "student.safetensors")
    model = sys.modules["mine"].student()
    assert not torch.equal(weights["top.weight"], model.top.weight)
    model.load_state_dict(weights)  # strict
    recipe = {
        "stage": "evaluate",
        "train": {"shards": root / "shards"},
        "val": {"shards": root / "shards"},
        "model": student,
        "weights": str(tmp_path / "run-student" / "student.safetensors"),
        "evaluators": [{"name": "knn"}],
        "loader": {"workers": 0},
        "run": run_in(tmp_path / "run-evaluate"),
    }
    assert evaluate.run(EvaluateRecipe.model_validate(recipe))


def test_the_same_factory_resumes_and_another_is_another_teacher(root: Path, tmp_path: Path) -> None:
    cache_teacher.run(own_recipe(root, tmp_path, teacher_section(), num_views=1))
    before = stored(tmp_path)
    cache_teacher.run(own_recipe(root, tmp_path, teacher_section(), num_views=1))
    assert stored(tmp_path) == before
    with pytest.raises(CacheMismatch, match="weights_sha256"):
        cache_teacher.run(own_recipe(root, tmp_path, teacher_section(args={"seed": 1}), num_views=2))
    torch.save(sys.modules["mine"].teacher(1).state_dict(), tmp_path / "other.pth")
    other = teacher_section(weights=str(tmp_path / "other.pth"))
    with pytest.raises(CacheMismatch, match="weights_sha256"):  # of the file, not of the factory
        cache_teacher.run(own_recipe(root, tmp_path, other, num_views=2))
    assert stored(tmp_path) == before


def test_a_timm_model_from_a_factory_gives_the_records_of_its_name(root: Path, tmp_path: Path) -> None:
    own = teacher_section(factory="mine:vit", args={"embed_dim": 16, "depth": 2, "num_heads": 2}, block=2)
    own |= {"weights": str(root / "teacher.safetensors"), "mean": None, "std": None}
    cache_teacher.run(own_recipe(root, tmp_path, own))
    cache_teacher.run(cache_recipe(root, layer="vit-b2-sketch"))
    own_units = {name: data for name, data in stored(tmp_path).items() if name.endswith(".zip")}
    assert own_units and own_units == {n: d for n, d in stored(root).items() if n.endswith(".zip")}


def test_a_recipe_with_a_factory_loads_back_equal(root: Path, tmp_path: Path) -> None:
    recipe = own_recipe(root, tmp_path, teacher_section(args={"seed": 2}))
    (tmp_path / "own.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "own.yaml", "cache-teacher") == recipe
    assert recipe.teacher.name == "teacher" and recipe.teacher.weights == "factory"


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"factory": "mine:no_teacher"}, "mine has no no_teacher"),
        ({"factory": "absent.module:teacher"}, "cannot be imported"),
        ({"factory": "mine:nothing"}, "returns no module"),
        ({"factory": "mine:SHAPES"}, "is no function"),
        ({"factory": "mine:teacher", "args": {"sead": 1}}, "raised TypeError"),
        ({"factory": "mine:broken", "args": {"message": "no file"}}, "raised ValueError"),
        ({"factory": "mine:plain"}, "is no teacher"),
        ({"factory": "mine:coarse_teacher"}, "another shape than `shapes` states"),
        ({"block": 2}, "does not give the taps of the codec"),
    ],
)
def test_what_is_no_teacher_is_refused_before_anything_is_written(
    root: Path, tmp_path: Path, section: dict[str, Any], match: str
) -> None:
    with pytest.raises(RecipeError, match=match) as caught:
        cache_teacher.run(own_recipe(root, tmp_path, teacher_section(**section)))
    assert not (tmp_path / "cache").exists() and (caught.value.hint or caught.value.expected)


def test_normalisation_and_projections_that_nobody_states_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="mean and std of the pixels are not known"):
        cache_teacher.run(own_recipe(root, tmp_path, teacher_section(mean=None, std=None)))
    with pytest.raises(RecipeError, match="gives tensors, not the layer behind"):
        cache_teacher.run(own_recipe(root, tmp_path, teacher_section(), codec={"name": "hidden"}))


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"factory": "mine:plain"}, "is no student"),
        ({"factory": "mine:coarse_teacher"}, "another shape than `shapes` states"),
        ({"factory": "mine:student", "args": {"seed": 3}}, "raised TypeError"),
    ],
)
def test_what_is_no_student_is_refused(root: Path, tmp_path: Path, section: dict[str, Any], match: str) -> None:
    if not (root / "cache").exists():
        cache_teacher.run(cache_recipe(root))
    student = {"img_size": 32, **section}
    with pytest.raises(RecipeError, match=match):
        train_student.run(student_recipe(root, student=student, run=run_in(tmp_path / "run")))


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"embed_dim": 8}, "give sizes to the factory by args"),
        ({"factory": None, "args": {"img_size": 1}, "weights": "hub"}, "args repeats what a field"),
        ({"factory": None, "args": {"depths": [[1]]}, "weights": "hub"}, "values and lists of values"),
        ({"factory": "mine.teacher"}, "factory"),
        ({"weights": "hub"}, "needs a timm model"),
        ({"factory": None, "weights": "factory"}, "needs a factory"),
    ],
)
def test_wrong_sections(root: Path, tmp_path: Path, section: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        own_recipe(root, tmp_path, teacher_section(**section))
