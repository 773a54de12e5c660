"""Several teachers over one view law: each sees a view once, at its own size, and writes the bytes of a run alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from tinymim.configs.errors import CacheMismatch, RecipeError, UserError, ViewMismatch
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.models.teacher import Teacher
from tinymim.pipeline import dataset, decode, replay
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages import cache_teacher, plan, train_student
from tinymim.stages.cache import copy, deep, info, pack, remove, repair, verify
from tinymim.stages.cache import list as list_caches
from tinymim.storage.blocks import DIGEST
from tinymim.storage.layout import VIEWS
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages.tiny import (
    STATED,
    STUDENT,
    TEACHER,
    cache_recipe,
    losses,
    student_recipe,
    tree,
    write_set,
)

LARGE = 48  # pixels: patches of 12, so that its grid of 4 x 4 is that of 32 pixels in patches of 8
FURTHER = f"views@{LARGE}"
SECOND: dict[str, Any] = {**TEACHER, "img_size": LARGE, "patch_size": 12, "depth": 1, "block": 1}
TARGETS: dict[str, dict[str, Any]] = {
    "qkv": {"codec": {"rows": 6, "head_k": 1, "tail_k": 3}},
    "cls": {"codec": {"kind": "cls"}},
    "second": {"teacher": "large", "codec": {"kind": "features", "tokens": 4}},
    "hidden": {"teacher": "large", "codec": {"name": "hidden", "bits": 8, "calibration_views": 5}},
}
OF_LARGE = ("second", "hidden")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 7 images, two teachers, and `cache` with two layers of each from one run."""
    root = write_set(tmp_path_factory.mktemp("teachers"), 14, 7)
    torch.manual_seed(9)
    sizes = {name: value for name, value in SECOND.items() if name not in ("name", "block")}
    model: Any = timm.create_model(str(SECOND["name"]), num_classes=0, **sizes)
    save_file(model.state_dict(), root / "large.safetensors", STATED)
    cache_teacher.run(recipe(root, root))
    return root


def recipe(made: Path, home: Path, **changes: Any) -> CacheTeacherRecipe:
    parts = {"num_views": 3, "views_per_unit": 2, "views_per_decode": 1, "batch_size": 3, "audit_views": 4}
    run = {"folder": home / "run", "device": "cpu", "threads": 1}
    teachers = {"large": SECOND | {"weights": str(made / "large.safetensors")}}
    fields = {"cache": home / "cache", "run": run, "codec": None, "targets": TARGETS, "teachers": teachers}
    return cache_recipe(made, **parts | fields | changes)


def of_first(made: Path, home: Path, **changes: Any) -> CacheTeacherRecipe:
    targets = {name: target for name, target in TARGETS.items() if name not in OF_LARGE}
    return recipe(made, home, **{"targets": targets, "teachers": {}} | changes)


def of_large(made: Path, home: Path, **changes: Any) -> CacheTeacherRecipe:
    """The second teacher as the only one of a recipe."""
    targets = {name: {"codec": TARGETS[name]["codec"]} for name in OF_LARGE}
    teacher = SECOND | {"weights": str(made / "large.safetensors")}
    return recipe(made, home, **{"targets": targets, "teachers": {}, "teacher": teacher} | changes)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Size and number of the views of each batch that went through a teacher, without those of calibration."""
    found: list[tuple[int, int]] = []
    forward = Teacher.forward

    def noted(self: Teacher, pixels: torch.Tensor, check: bool = True, **more: Any) -> Any:
        if not check:
            found.append((pixels.shape[-1], len(pixels)))
        return forward(self, pixels, check, **more)

    monkeypatch.setattr(Teacher, "forward", noted)
    return found


def test_a_layer_has_the_bytes_of_a_run_of_its_own_and_growing_rewrites_nothing(
    made: Path, tmp_path: Path, seen: list[tuple[int, int]]
) -> None:
    cache_teacher.run(of_first(made, tmp_path))
    before = tree(tmp_path / "cache")
    assert not any("@" in name for name in before) and {size for size, _ in seen} == {32}
    cache_teacher.run(of_large(made, tmp_path))
    after = tree(tmp_path / "cache")
    assert before.items() <= after.items() and after == tree(made / "cache")
    # A cache of the second teacher's size alone: the same records, under another identity.
    cache_teacher.run(of_large(made, tmp_path / "alone", views={"size": LARGE, "scaled_decode": False}))
    alone = tree(tmp_path / "alone/cache")
    files = [name for name in alone if name.endswith(".zip") and name.startswith("layers/")]
    assert len(files) == 9 and all(alone[name] == after[name] for name in files)
    reader, own = CacheReader(made / "cache"), CacheReader(tmp_path / "alone/cache")
    assert reader.manifest.spec_id_at(LARGE) == own.manifest.spec_id != reader.manifest.spec_id
    for mine, theirs in zip(reader.units(FURTHER), own.units(VIEWS), strict=True):
        np.testing.assert_array_equal(reader.read_views(mine)[DIGEST], own.read_views(theirs)[DIGEST])
        assert mine.parts.keys is None and mine.spec_id == theirs.spec_id


def test_each_teacher_sees_a_view_once_and_each_image_is_decoded_once_for_all(
    made: Path, tmp_path: Path, seen: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []

    def counted(*args: Any) -> Any:
        decoded.append(1)
        return decode.decode(*args)

    monkeypatch.setattr(dataset, "decode", counted)
    targets = {name: TARGETS[name] for name in ("qkv", "cls", "second")}
    cache_teacher.run(recipe(made, tmp_path, targets=targets, views_per_unit=3, views_per_decode=3))
    assert {size: sum(n for own, n in seen if own == size) for size in (32, LARGE)} == {32: 42, LARGE: 42}
    assert len(decoded) == 14
    seen.clear()
    cache_teacher.run(recipe(made, tmp_path, targets=targets))
    assert not seen


def test_the_box_is_one_law_at_every_size(made: Path) -> None:
    shards, law = open_shards(recipe(made, made).source).shards, RandomViews(recipe(made, made).views)
    items = np.array([[0, image, view] for image in range(3) for view in range(2)])
    both = ImageViews(shards, law, 0, further=[law.at(LARGE)]).batch(items)
    small, large = ImageViews(shards, law, 0).batch(items), ImageViews(shards, law.at(LARGE), 0).batch(items)
    assert both.views == small.views == large.views
    assert torch.equal(both.pixels, small.pixels) and torch.equal(both.at(LARGE), large.pixels)
    assert torch.equal(both.view_keys, large.view_keys)
    assert torch.equal(both.pick(np.array([4, 1])).at(LARGE), large.pixels[[4, 1]])


@pytest.mark.slow  # two caches and two students; tests/pipeline/test_pairs.py compares the pixels
def test_layers_of_mixed_views_have_the_bytes_of_runs_of_their_own(made: Path, tmp_path: Path) -> None:
    law: dict[str, Any] = {"scaled_decode": False, "pairs": {}}
    targets = {name: TARGETS[name] for name in ("cls", "second")}
    mixed = {"views": {"size": 32, **law}, "num_views": 1}
    cache_teacher.run(recipe(made, tmp_path, targets=targets, **mixed))
    second = {"second": {"codec": TARGETS["second"]["codec"]}}
    cache_teacher.run(of_large(made, tmp_path / "alone", targets=second, **mixed | {"views": {"size": LARGE, **law}}))
    both, alone = tree(tmp_path / "cache"), tree(tmp_path / "alone/cache")
    files = [name for name in alone if name.endswith(".zip") and name.startswith("layers/")]
    assert files and all(alone[name] == both[name] for name in files)
    reader, own = CacheReader(tmp_path / "cache"), CacheReader(tmp_path / "alone/cache")
    for mine, theirs in zip(reader.units(FURTHER), own.units(VIEWS), strict=True):
        np.testing.assert_array_equal(reader.read_views(mine)[DIGEST], own.read_views(theirs)[DIGEST])
    assert deep.run(recipe(made, tmp_path, targets=targets, **mixed), tmp_path / "cache", sample=8)["passed"]
    for size in (32, LARGE):  # every digest is compared
        layers: dict[str, Any] = {name: {} for name in targets}
        train_student.run(student(made, tmp_path / str(size), size, cache=tmp_path / "cache", layers=layers))


def test_info_copy_pack_list_and_verify_know_every_size(made: Path, tmp_path: Path) -> None:
    found = info.describe(made / "cache")
    assert found["view_sizes"] == [32, LARGE]
    assert [layer["name"] for layer in found["layers"]] == [VIEWS, FURTHER, "cls", "hidden", "qkv", "second"]
    text = info.format_info(found)
    assert f"also at   {LARGE} px: hidden, second\n" in text and text.count("teacher   ") == 4
    for done in (copy, pack):
        done.run(made / "cache", tmp_path / done.__name__)
    assert tree(tmp_path / copy.__name__) == tree(made / "cache")
    copy.run(tmp_path / pack.__name__, tmp_path / "unpacked")
    assert tree(tmp_path / "unpacked") == tree(made / "cache")
    copy.run(made / "cache", tmp_path / "small", ["cls"])
    assert not any("@" in name for name in tree(tmp_path / "small"))
    [row] = list_caches.run(made / "cache")
    assert "@" not in list_caches.format_list([row], made) and row["bytes"] > 0
    report = verify.run(made / "cache")
    assert report["sound"] and report["layers"][FURTHER]["units"] == 4
    checked = deep.run(recipe(made, made), made / "cache", sample=8)
    assert checked["passed"] and checked["records"] == 8 * len(TARGETS)


def test_a_layer_goes_with_the_digests_that_nobody_else_needs(made: Path, tmp_path: Path) -> None:
    copy.run(made / "cache", tmp_path / "cache")
    remove.run(tmp_path / "cache", True, ["hidden"])
    assert CacheReader(tmp_path / "cache").view_layers == [VIEWS, FURTHER] and verify.run(tmp_path / "cache")["sound"]
    remove.run(tmp_path / "cache", True, ["second"])
    assert not any("@" in name for name in tree(tmp_path / "cache")) and verify.run(tmp_path / "cache")["sound"]
    remove.run(tmp_path / "cache", True)
    assert not (tmp_path / "cache").exists()


def test_repair_renders_lost_digests_of_a_further_size(made: Path, tmp_path: Path) -> None:
    copy.run(made / "cache", tmp_path / "cache")
    whole = tree(tmp_path / "cache")
    for name in (f"{FURTHER}/shard-000000/v0-1.zip", f"{FURTHER}/shard-000001/v2-2.json", f"{FURTHER}/zarr.json"):
        (tmp_path / "cache" / name).unlink()
    (tmp_path / "cache/layers/second/shard-000001/v0-1.zip").unlink()
    assert not verify.run(tmp_path / "cache")["sound"]
    report = repair.run(recipe(made, tmp_path))
    assert tree(tmp_path / "cache") == whole and not report["left"]
    # Another teacher's recipe does not take them for strays while the layer on them is damaged.
    (tmp_path / "cache/layers/second/zarr.json").write_text("{}")
    (tmp_path / "cache/layers/hidden/zarr.json").write_text("{}")
    with pytest.raises(UserError):
        repair.run(of_first(made, tmp_path))
    kept = [name for name in whole if name.startswith(FURTHER)]
    assert all((tmp_path / "cache" / name).is_file() for name in kept)


def student(made: Path, home: Path, size: int, **changes: Any) -> Any:
    model = STUDENT | ({"img_size": LARGE, "patch_size": 12} if size == LARGE else {})
    layers = {"qkv": {"weight": 0.5}, "second": {"weight": 2.0}, "cls": {}}
    run = {"folder": home / "run-student", "device": "cpu", "threads": 1, "log_every": 1}
    fields = {"cache": made / "cache", "student": model, "layers": layers, "run": run}
    return student_recipe(made, **fields | {"optim": {"batch_size": 7, "steps": 4, "base_lr": 0.1}} | changes)


@pytest.mark.parametrize("size", [32, LARGE])
def test_a_student_trains_at_any_size_of_the_cache_on_layers_of_all(made: Path, tmp_path: Path, size: int) -> None:
    train_student.run(student(made, tmp_path, size))
    assert len(losses(tmp_path)) == 4 and all(np.isfinite(losses(tmp_path)))


def test_a_student_is_proved_at_its_own_size_and_refused_at_others(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CacheMismatch, match=f"(?s)got: 64.*one of 32, {LARGE}"):
        train_student.run(student(made, tmp_path, 32, student=STUDENT | {"img_size": 64}))
    two = {"a": {"model": STUDENT}, "b": {"model": STUDENT | {"img_size": LARGE, "patch_size": 12}}}
    with pytest.raises(CacheMismatch, match="students of one stream differ in img_size"):
        train_student.run(student(made, tmp_path, 32, student=None, students=two))
    digest = decode.pixel_digest
    monkeypatch.setattr(replay, "pixel_digest", lambda pixels: digest(pixels) ^ (pixels.shape[-1] == LARGE))
    with pytest.raises(ViewMismatch):
        train_student.run(student(made, tmp_path, LARGE))
    train_student.run(student(made, tmp_path, 32))


@pytest.mark.slow  # 6 s; changes with `plan` only
def test_a_plan_is_for_all_teachers_and_for_students_of_several_layers(made: Path, tmp_path: Path) -> None:
    wanted = recipe(made, tmp_path)
    students = {str(size): student(made, tmp_path, size) for size in (32, LARGE)}
    found = plan.run(wanted, students, plan.Options(seconds=1.0, random_weights=True))
    assert [each["name"] for each in found["measured"]["students"]] == ["32", str(LARGE)]
    assert list(found["forecast"]["stage_one"]["codec_bytes"]) == ["4 layers", *TARGETS]
    assert not (tmp_path / "cache").exists()


def test_misfits_are_refused(made: Path, tmp_path: Path) -> None:
    for wrong, message in (
        (
            {"targets": {"a": {"teacher": "nobody"}}, "teachers": {}},
            "teacher nobody, which is not in teachers; got none",
        ),
        ({"targets": {"a": {}}}, "no target names the teacher large"),
        ({"targets": None, "codec": {}}, "no target names the teacher large"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe(made, tmp_path, **wrong)
    # A new cache has the size of one of its teachers.
    with pytest.raises(RecipeError, match=r"(?s)views\.size is not teacher\.img_size.*got: 32.*expected: 48"):
        cache_teacher.run(of_large(made, tmp_path))
    assert not (tmp_path / "cache").exists()
