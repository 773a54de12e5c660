"""Several layers from one pass of the teacher: each has the bytes of a run of its own."""

import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from tinymim.configs.errors import CheckpointError, RecipeError
from tinymim.configs.load import dump_recipe, load_recipe
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.models.teacher import Teacher
from tinymim.stages import cache_teacher, plan
from tinymim.stages.cache import deep, repair
from tinymim.stages.pages.plan import format_plan
from tinymim.storage.layout import VIEWS
from tinymim.storage.manifest import joint_spec_id
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages import jobs
from tinymim.tests.stages.tiny import STATED, TEACHER, cache_recipe, student_recipe, tree, unit_names, write_set

TARGETS: dict[str, dict[str, Any]] = {
    "qkv": {"block": 1, "codec": {"rows": 6, "head_k": 1, "tail_k": 3}},
    "hidden": {"codec": {"name": "hidden", "basis": "channels", "bits": 8, "calibration_views": 5}},
    "features": {"block": 1, "codec": {"kind": "features", "tokens": 4}},
    "cls": {"codec": {"kind": "cls"}},
    "logits": {"codec": {"kind": "logits", "classes": 7, "head_k": 2, "tail_k": 2}},
}
UNITS = [f"shard-00000{number}.tar {views}" for number in (0, 1) for views in ("v0-2", "v3-4")]


def write_classifier(path: Path, pool: str) -> None:
    """A teacher with a classifier of 7 classes, for the class token or, without a norm over tokens, for the mean."""
    torch.manual_seed(3)
    sizes = {name: value for name, value in TEACHER.items() if name != "name"}
    model: Any = timm.create_model(str(TEACHER["name"]), num_classes=7, global_pool=pool, **sizes)
    torch.nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), path, STATED)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 7 images, a teacher, and `cache`, whose five layers come from one pass."""
    root = write_set(tmp_path_factory.mktemp("one-pass"), 14, 7)
    write_classifier(root / "teacher.safetensors", "token")
    write_classifier(root / "mean.safetensors", "avg")
    cache_teacher.run(recipe(root, root))
    return root


def recipe(made: Path, home: Path, **changes: Any) -> CacheTeacherRecipe:
    parts = {"num_views": 5, "views_per_unit": 3, "views_per_decode": 2, "batch_size": 3, "audit_views": 4}
    run = {"folder": home / "run", "device": "cpu", "threads": 1}
    fields = {"cache": home / "cache", "run": run, "codec": None, "targets": TARGETS}
    return cache_recipe(made, **parts | fields | changes)


def alone(made: Path, home: Path, name: str, **changes: Any) -> CacheTeacherRecipe:
    """The recipe that writes one of the layers by itself."""
    target = TARGETS[name]
    teacher = recipe(made, home).teacher.model_copy(update={"block": target.get("block", 2)})
    return recipe(
        made, home, **{"targets": None, "codec": target["codec"], "layer": name, "teacher": teacher} | changes
    )


def of_layer(root: Path, name: str) -> dict[str, bytes]:
    return {path: data for path, data in tree(root / "cache").items() if path.startswith(("views/", f"layers/{name}/"))}


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_layer_has_the_bytes_of_a_run_of_its_own(made: Path, tmp_path: Path, name: str) -> None:
    cache_teacher.run(alone(made, tmp_path, name))
    assert of_layer(tmp_path, name) == of_layer(made, name) and len(of_layer(made, name)) >= 17
    assert tree(tmp_path / "cache")["zarr.json"] == tree(made / "cache")["zarr.json"]
    [*fidelity] = (info.statistics["fidelity"]["views"] for info in CacheReader(made / "cache").units(name))
    assert fidelity == [4] * len(UNITS)


@pytest.mark.slow  # 5 s; guards one field of the teacher's identity
def test_another_norm_of_the_classifier_changes_no_other_layer(made: Path, tmp_path: Path) -> None:
    """The model without classifier has a norm over tokens, which these weights lack: what needs it is refused."""
    teacher = recipe(made, tmp_path).teacher.model_copy(update={"weights": str(made / "mean.safetensors"), "block": 1})
    both = {name: TARGETS[name] for name in ("qkv", "logits")}
    cache_teacher.run(recipe(made, tmp_path / "both", teacher=teacher, targets=both))
    cache_teacher.run(alone(made, tmp_path / "alone", "qkv", teacher=teacher))
    assert of_layer(tmp_path / "both", "qkv") == of_layer(tmp_path / "alone", "qkv")
    layers = CacheReader(tmp_path / "both/cache").layers
    assert len({layer.teacher["weights_sha256"] for layer in layers.values()}) == 2
    with pytest.raises(CheckpointError, match="no norm over tokens"):
        cache_teacher.run(recipe(made, tmp_path / "cls", teacher=teacher, targets=both | {"cls": TARGETS["cls"]}))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """Views and taps of each batch that went through the teacher, without those of calibration."""
    found: list[tuple[int, list[str]]] = []
    forward = Teacher.forward

    def noted(self: Teacher, pixels: torch.Tensor, check: bool = True, taps: Any = None, **mask: Any) -> Any:
        if not check:
            found.append((len(pixels), sorted(map(str, taps))))
        return forward(self, pixels, check, taps, **mask)

    monkeypatch.setattr(Teacher, "forward", noted)
    return found


def test_the_teacher_sees_a_view_once_and_stops_after_the_last_tap_that_is_needed(
    made: Path, tmp_path: Path, seen: list[tuple[int, list[str]]]
) -> None:
    without = {name: target for name, target in TARGETS.items() if name != "hidden"}
    cache_teacher.run(recipe(made, tmp_path, targets={name: without[name] for name in ("cls", "logits")}))
    seen.clear()
    cache_teacher.run(recipe(made, tmp_path, targets=without))
    assert sum(views for views, _ in seen) == 14 * 5
    assert {tuple(taps) for _, taps in seen} == {("qkv@1", "tokens@1")}
    for name in without:
        assert of_layer(tmp_path, name) == of_layer(made, name)
    seen.clear()
    cache_teacher.run(recipe(made, tmp_path, targets=without))
    assert not seen


@pytest.mark.slow  # 6 s; changes with the cutting of units only
def test_layers_that_were_cut_otherwise_share_a_pass(
    made: Path, tmp_path: Path, seen: list[tuple[int, list[str]]]
) -> None:
    cache_teacher.run(alone(made, tmp_path, "qkv", num_views=1))
    cache_teacher.run(alone(made, tmp_path, "cls", num_views=4, views_per_unit=2))
    seen.clear()
    cache_teacher.run(recipe(made, tmp_path, targets={name: TARGETS[name] for name in ("qkv", "cls", "features")}))
    assert sum(views for views, _ in seen) == 14 * 5
    names = unit_names(tmp_path / "cache")
    assert [name[17:] for name in names["features"][:4]] == ["v0-0", "v1-1", "v2-2", "v3-3"]
    assert names["qkv"] == names["features"]


@pytest.mark.slow  # 15 s: starts and kills processes; tests of a single layer kill too
def test_a_kill_between_two_layers_leaves_only_what_lacks_to_be_made(
    made: Path, tmp_path: Path, seen: list[tuple[int, list[str]]]
) -> None:
    for commits in (1, 3, 10, 6):  # after the view layer, or between two target layers
        process, _ = jobs.start(recipe(made, tmp_path), commits)
        process.join(300)
        assert process.exitcode == -signal.SIGKILL
    names = unit_names(tmp_path / "cache")
    assert names[VIEWS] == UNITS[:4] and len(names["qkv"]) == 4 > len(names["logits"])
    seen.clear()
    cache_teacher.run(recipe(made, tmp_path))
    assert sum(views for views, _ in seen) == 7 * 2 and all("qkv@1" not in taps for _, taps in seen)
    assert tree(tmp_path / "cache") == tree(made / "cache")


@pytest.mark.slow  # 6 s; changes with repair only
def test_damage_in_two_layers_is_repaired_at_once_and_layers_may_have_grown_apart(
    made: Path, tmp_path: Path, seen: list[tuple[int, list[str]]]
) -> None:
    few = {name: TARGETS[name] for name in ("qkv", "hidden", "cls")}
    cache_teacher.run(recipe(made, tmp_path, targets=few))
    cache_teacher.run(alone(made, tmp_path, "cls", num_views=6))
    whole = tree(tmp_path / "cache")
    for name in ("qkv/shard-000000/v0-2.json", "hidden/shard-000000/v0-2.zip", "cls/shard-000001/v5-5.zip"):
        (tmp_path / "cache/layers" / name).unlink()
    (tmp_path / "cache/layers/hidden/constants.zip").unlink()
    seen.clear()
    report = repair.run(recipe(made, tmp_path, targets=few))
    assert report["layer"] == "qkv, hidden, cls" and not report["left"] and len(report["computed"]) == 3
    assert sum(views for views, taps in seen if "qkv@1" in taps) == 7 * 3
    assert tree(tmp_path / "cache") == whole


def test_all_layers_are_verified_against_the_teacher(made: Path) -> None:
    report = deep.run(recipe(made, made), made / "cache", sample=10)
    assert report["passed"] and report["layer"] == ", ".join(TARGETS) and report["records"] == 10 * len(TARGETS)
    assert {name.partition(".")[0] for name in report["agreement_by_array"]} == set(TARGETS)


def test_a_root_names_the_cache_by_all_of_its_layers(made: Path, tmp_path: Path) -> None:
    few = {name: TARGETS[name] for name in ("qkv", "cls")}
    cache_teacher.run(recipe(made, tmp_path, targets=few, cache=None, cache_root=tmp_path / "root"))
    cache_teacher.run(
        recipe(made, tmp_path, targets=dict(reversed(few.items())), cache=None, cache_root=tmp_path / "root")
    )
    [folder] = (tmp_path / "root").iterdir()
    reader = CacheReader(folder)
    assert folder.name == joint_spec_id([layer.spec_id for layer in reader.layers.values()])
    assert list(reader.layers) == ["cls", "qkv"]


@pytest.mark.slow  # 6 s; changes with `plan` only
def test_the_plan_is_for_all_layers_and_a_student_names_its_own(made: Path, tmp_path: Path) -> None:
    wanted = recipe(made, tmp_path, views_per_unit=50, views_per_decode=8)
    student = student_recipe(made, cache=tmp_path / "cache", layer="features", num_views=2)
    found = plan.run(wanted, {"student": student}, plan.Options(seconds=1.0))
    sizes = found["forecast"]["stage_one"]["codec_bytes"]
    assert list(sizes) == ["5 layers", *TARGETS] and sizes["5 layers"] > sizes["qkv"] > sizes["logits"]
    assert "5 layers" in format_plan(found)
    cache_teacher.run(wanted)
    stored = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("v*-*.*"))
    assert sizes["5 layers"] == pytest.approx(stored, rel=0.15)


def test_one_layer_and_several_are_two_forms(made: Path, tmp_path: Path) -> None:
    text = dump_recipe(recipe(made, tmp_path))
    (tmp_path / "recipe.yaml").write_text(text)
    changed = load_recipe(
        tmp_path / "recipe.yaml", "cache-teacher", ["targets.qkv.codec.rows=4", "targets.cls.block=1"]
    )
    assert isinstance(changed, CacheTeacherRecipe)
    codec, block = changed.layers["qkv"]
    assert getattr(codec, "rows", None) == 4 and block == 1 and changed.layers["hidden"].block == 2
    for wrong, message in (
        ({"codec": {"rows": 5}}, "codec of the recipe and targets exclude"),
        ({"layer": "mine"}, "layer of the recipe and targets exclude"),
        ({"targets": {}}, "targets is empty"),
        ({"targets": None}, "codec: null needs targets"),
        ({"targets": {"a.b": {}}}, "pattern"),
        ({"targets": {"views": {}}}, "named views"),
        ({"targets": None, "codec": {}, "layer": "views"}, "named views"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe(made, tmp_path, **wrong)
    with pytest.raises(RecipeError, match=r"teacher\.block is outside the teacher"):
        cache_teacher.run(recipe(made, tmp_path, targets={"qkv": {"block": 3}}))
