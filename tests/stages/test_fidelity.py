"""`tinymim fidelity` end to end on a tiny set, and the audit that every cache carries."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tinymim.configs.errors import CacheMismatch, CheckpointError, RecipeError, SourceError
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.fidelity import FidelityRecipe
from tinymim.pipeline.shards import open_shards
from tinymim.stages import cache_teacher, fidelity, train_student
from tinymim.stages.pages.fidelity import format_tables
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages.tiny import STATED, STUDENT, TEACHER, cache_recipe, student_recipe, write_teacher

CODECS: dict[str, Any] = {
    "sketch": {"rows": 9, "tail_k": 4},
    "all rows": {"rows": 99, "tail_k": 8},
    "top-2": {"rows": 99, "head_k": 2, "tail": "renormalise"},
    "exact": {"name": "dense"},
    "hidden": {"name": "hidden", "basis": "channels", "bits": 8, "calibration_views": 20},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, drawn_shards: Path) -> Path:
    """A folder with `shards` (60 drawn images) and weights of a random teacher with selective attention."""
    folder = tmp_path_factory.mktemp("fidelity")
    (folder / "shards").symlink_to(drawn_shards)
    write_teacher(folder / "random.safetensors")
    state = load_file(folder / "random.safetensors")
    state["blocks.1.attn.qkv.weight"] *= 12.0
    save_file(state, folder / "teacher.safetensors", STATED)
    return folder


def recipe(root: Path, **changes: Any) -> FidelityRecipe:
    fields: dict[str, Any] = {
        "stage": "fidelity",
        "source": {"shards": root / "shards"},
        "views": {"size": 32},
        "teacher": TEACHER | {"block": 2, "weights": str(root / "teacher.safetensors")},
        "codecs": CODECS,
        "student": STUDENT,
        "num_images": 24,
        "batch_size": 10,
        "loader": {"workers": 0},
        "run": {"folder": root / "run", "device": "cpu", "threads": 1},
    }
    return FidelityRecipe.model_validate(fields | changes)


def test_table_json_and_picture(root: Path) -> None:
    text = format_tables(fidelity.run(recipe(root)))
    result = json.loads((root / "run" / "fidelity.json").read_text())
    assert list(result["students"]) == ["initial"] and set(result["codecs"]) == set(CODECS)
    seen = result["students"]["initial"]
    for name in ("sketch", "all rows", "exact"):
        assert seen[name]["all"]["biased"] == [0.0], name
    assert seen["top-2"]["all"]["biased"] == [1.0]
    assert seen["exact"]["all"]["noise_ratio"][0] < 1e-4 < seen["all rows"]["all"]["noise_ratio"][0]
    assert seen["all rows"]["all"]["noise_ratio"][0] < seen["sketch"]["all"]["noise_ratio"][0]
    assert [len(values) for values in seen["sketch"]["qk"].values()] == [2] * len(seen["sketch"]["qk"])
    assert {"entropy_nats", "kept_mass", "kl_nats", "bias", "bias_se", "noise_ratio", "angle_deg", "norm_ratio"} <= set(
        seen["sketch"]["vv"]
    )
    assert result["codecs"]["sketch"]["raw_bytes_per_view"] == 2 * (2 * 9 * 4 + 4)
    assert 0 < result["codecs"]["sketch"]["bytes_per_view"] < result["codecs"]["exact"]["bytes_per_view"]
    assert "top-2" in text and "(biased)" in text and text.count("(biased)") == 1
    with Image.open(root / "run" / "frontier.png") as picture:
        assert picture.width > 500


def test_codecs_of_all_kinds_side_by_side_each_against_its_own_target(root: Path) -> None:
    codecs: dict[str, Any] = {
        "sketch": {"rows": 9, "tail_k": 4},
        "ff": {"kind": "ff", "rows": 5, "tail_k": 4},
        "gram": {"kind": "gram", "rows": 5, "columns": 5},
        "dither": {"kind": "features", "tokens": 5},
        "dither, normed": {"kind": "features", "tokens": 5, "at": "normed"},
        "pq": {"kind": "features", "name": "pq", "stages": 1, "calibration_views": 4},
        "cls": {"kind": "cls"},
        "bank": {"kind": "bank", "anchors": 30, "tau": 0.5},
        "attention": {"kind": "attention", "rows": 5},
    }
    text = format_tables(fidelity.run(recipe(root, codecs=codecs, targets={"loss": "mse", "relation_heads": None})))
    result = json.loads((root / "run" / "fidelity.json").read_text())
    [seen] = result["students"].values()
    assert {name: [loss for loss in values if loss != "all"] for name, values in seen.items()} == {
        "sketch": ["qk", "vv"], "ff": ["ff"], "gram": ["gram"], "dither": ["features"], "dither, normed": ["features"],
        "pq": ["features"], "cls": ["cls"], "bank": ["bank"], "attention": ["attention"],
    }  # fmt: skip
    biased = {name for name, values in seen.items() if values["all"]["biased"][0]}
    assert biased == {"pq"} and text.count("(biased)") == 1
    assert seen["dither"]["features"]["kl_nats"] != seen["dither, normed"]["features"]["kl_nats"]
    assert "relative error" in text and "entropy" in text
    assert (root / "run" / "frontier.png").stat().st_size > 10_000


def test_targets_and_trained_students_must_fit_the_kinds(root: Path) -> None:
    two: dict[str, Any] = {"ff": {"kind": "ff"}, "cls": {"kind": "cls"}}
    with pytest.raises(RecipeError, match=r"targets\.rows is for another kind"):
        fidelity.run(recipe(root, codecs=two, targets={"rows": 3}))
    with pytest.raises(RecipeError, match=r"the head of one kind(.|\n)*cls, ff"):
        fidelity.run(recipe(root, codecs=two, student_state=root / "run-student"))


def test_the_same_recipe_gives_the_same_numbers(root: Path) -> None:
    def numbers(folder: str, **changes: Any) -> Any:
        run = {"folder": root / folder, "device": "cpu", "threads": 1}
        fidelity.run(recipe(root, run=run, num_images=6, **changes))
        return json.loads((root / folder / "fidelity.json").read_text())["students"]

    assert numbers("a") == numbers("b") == numbers("c", batch_size=3)


def test_a_trained_student_is_judged_too(root: Path) -> None:
    cache_teacher.run(cache(root, audit_views=0))
    train_student.run(student_recipe(root, optim={"batch_size": 8, "steps": 3, "base_lr": 0.1}))
    fidelity.run(recipe(root, student_state=root / "run-student", num_images=4))
    result = json.loads((root / "run" / "fidelity.json").read_text())
    assert set(result["students"]) == {"initial", "after 3 steps"}
    initial, trained = result["students"]["initial"], result["students"]["after 3 steps"]
    assert initial["sketch"]["qk"]["kl_nats"] != trained["sketch"]["qk"]["kl_nats"]

    with pytest.raises(CheckpointError, match="does not fit the student"):
        fidelity.run(recipe(root, student_state=root / "run-student", student=STUDENT | {"embed_dim": 16}))
    with pytest.raises(CheckpointError, match="no training state"):
        fidelity.run(recipe(root, student_state=root / "nowhere"))


def test_a_student_of_another_size_sees_the_same_boxes_at_its_own(root: Path) -> None:
    fidelity.run(recipe(root, student=STUDENT | {"img_size": 48, "patch_size": 12}))


def test_what_does_not_fit_is_refused(root: Path) -> None:
    with pytest.raises(SourceError, match="too few images"):
        fidelity.run(recipe(root, num_images=61))
    with pytest.raises(CacheMismatch, match="tokens are not the teacher's"):
        fidelity.run(recipe(root, student=STUDENT | {"img_size": 72}))  # a grid of 9 x 9, the teacher's is 4 x 4
    with pytest.raises(RecipeError, match="relation heads"):
        fidelity.run(recipe(root, codecs={"a": {"relation_heads": 3}}))
    with pytest.raises(ValueError, match="codecs is empty"):
        recipe(root, codecs={})


def test_views_are_spread_over_all_shards(drawn_shards: Path) -> None:
    from tinymim.configs.sections.source import SourceConfig

    source = open_shards(SourceConfig(shards=drawn_shards))
    items = np.concatenate(fidelity.spread_items(source, 12, 5))
    assert items.shape == (12, 3) and len(np.unique(items, axis=0)) == 12
    assert np.bincount(items[:, 0]).tolist() == [5, 5, 2]
    assert all(row[1] < source.shards[row[0]].num_samples for row in items)


# ---------------------------------------------------------------- the audit of a cache


def cache(root: Path, **changes: Any) -> CacheTeacherRecipe:
    fields: dict[str, Any] = {"views": {"size": 32}, "codec": {"rows": 9, "tail_k": 4}, "batch_size": 4}
    return cache_recipe(root, **fields | {"audit_views": 12} | changes)


def test_every_unit_carries_its_fidelity(root: Path) -> None:
    cache_teacher.run(cache(root, cache=root / "audited"))
    reader = CacheReader(root / "audited")
    for info in reader.units(reader.layer().name):
        found = info.statistics["fidelity"]
        assert found["views"] == min(12, info.num_images)  # one view an image
        assert 0 < found["all"]["noise_ratio"][0] < 10
        assert len(found["qk"]["noise_ratio"]) == len(found["vv"]["kept_mass"]) == 2


def test_an_audit_may_be_left_out_and_few_views_say_nothing(root: Path) -> None:
    for views, wanted in ((0, {"views": 0}), (3, {"views": 3})):
        recipe = cache(root, cache=root / f"few-{views}", audit_views=views)
        cache_teacher.run(recipe)
        units = CacheReader(root / f"few-{views}").units(recipe.layer_name)
        assert all(unit.statistics["fidelity"] == wanted for unit in units)
