"""A `hidden` cache through both stages: calibrated once, resumed to the same bytes, read as any relation."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.errors import CacheCorrupt, CacheMismatch, RecipeError, SourceError
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.models.teacher import Teacher
from tinymim.stages import cache_teacher, train_student
from tinymim.stages.cache.opened import opened_kind
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.units import draft
from tinymim.storage.layout import commit_file, root_group
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter
from tinymim.targets.relations.qkv import QKV, relation_probs
from tinymim.tests.stages.tiny import (
    TEACHER,
    cache_recipe,
    copied,
    losses,
    stored,
    student_recipe,
    tree,
)

INT8 = {"name": "hidden", "calibration_views": 20}
PCA = {"name": "hidden", "basis": "pca", "bits": 3.3, "calibration_views": 20}
LAYER = cache_recipe(Path(), codec=INT8).layer_name
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shards and teacher, a hidden cache of theirs, a student of three steps."""
    root = copied(made, tmp_path_factory.mktemp("hidden") / "made")
    shutil.rmtree(root / "cache")
    cache_teacher.run(hidden_recipe(root, audit_views=4))
    train_student.run(short(root))
    return root


def hidden_recipe(root: Path, **changes: Any) -> CacheTeacherRecipe:
    return cache_recipe(root, **({"codec": INT8} | changes))


def short(root: Path, **changes: Any) -> TrainStudentRecipe:
    return student_recipe(root, **({"optim": {"batch_size": 8, "steps": 3}} | changes))


def test_decoded_records_are_the_teachers_relations(made: Path) -> None:
    reader = CacheReader(made / "cache")
    layer = reader.layer()
    kind = opened_kind(reader, layer, TargetsConfig(relations=("qk", "kk")), CPU)
    recipe = hidden_recipe(made)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tapped = Teacher(recipe.teacher, kind.taps)(pixels)
    exact = QKV(*tapped[kind.taps[0]])
    keys = torch.tensor([1, 2])
    target = kind.decode(kind.encode(tapped, keys), keys, layer.shapes)
    for relation, rows in target.items():
        torch.testing.assert_close(rows.dense(), relation_probs(exact, relation), rtol=0, atol=5e-3)
    fidelity = [unit.statistics["fidelity"] for unit in reader.units(layer.name)]
    assert all(statistics["views"] for statistics in fidelity)


@pytest.mark.parametrize("codec", [INT8, PCA])
def test_a_resumed_cache_has_the_same_bytes_and_the_same_constants(
    made: Path, home: Path, codec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if codec == PCA:
        shutil.rmtree(home / "cache")
        cache_teacher.run(hidden_recipe(home, codec=codec, audit_views=4))
    whole = stored(home)
    last = CacheReader(home / "cache").units(LAYER)[-1]
    for path in (last.path, commit_file(LAYER, last.unit)):
        (home / "cache" / path).unlink()
    # A resumed run does not calibrate: those who changed images since then would get other constants.
    monkeypatch.setattr("tinymim.targets.relations.hidden.calibrate", None)
    cache_teacher.run(hidden_recipe(home, codec=codec, audit_views=4))
    assert stored(home) == whole


def test_a_cache_stopped_before_its_first_unit_is_calibrated_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stored(home)
    shutil.rmtree(home / "cache")
    encode = draft.encode

    def interrupt(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return encode(*args)

    monkeypatch.setattr("tinymim.stages.units.job.encode", interrupt)
    with pytest.raises(Interrupted):
        cache_teacher.run(hidden_recipe(home))
    assert CacheReader(home / "cache").units() == []
    assert (home / "cache" / "layers" / LAYER / "constants.json").exists()
    monkeypatch.setattr("tinymim.stages.units.job.encode", encode)
    monkeypatch.setattr("tinymim.targets.relations.hidden.calibrate", None)
    cache_teacher.run(hidden_recipe(home, audit_views=4))
    assert stored(home) == whole


def test_growing_leaves_constants_and_units_as_they_are(home: Path) -> None:
    before = tree(home / "cache")
    cache_teacher.run(hidden_recipe(home, num_views=3))
    after = tree(home / "cache")
    assert {name: data for name, data in after.items() if name in before} == before
    units = CacheReader(home / "cache").units(LAYER)
    assert len(units) == 6 and len({info.constants for info in units}) == 1


def test_students_train_on_any_relation_heads_and_rows_with_any_number_of_workers(made: Path, home: Path) -> None:
    default = losses(made)
    assert all(np.isfinite(default))
    targets = {"relations": ["qq", "kk"], "relation_heads": 4, "rows": 6}
    seen = []
    for workers in (0, 1):
        shutil.rmtree(home / "run-student", ignore_errors=True)
        train_student.run(short(home, targets=targets, loader={"workers": workers}))
        seen.append(losses(home))
        lines = [json.loads(line) for line in (home / "run-student" / "metrics.jsonl").read_text().splitlines()]
        assert {"kl_qq", "kl_kk"} <= lines[0].keys() and "kl_qk" not in lines[0]
    assert seen[0] == seen[1] != default


def test_the_student_sees_what_a_student_of_the_dense_cache_sees(made: Path, home: Path) -> None:
    cache_teacher.run(hidden_recipe(home, codec={"name": "dense"}, cache=home / "dense"))
    train_student.run(short(home, cache=home / "dense"))
    np.testing.assert_allclose(losses(made), losses(home), rtol=2e-3)


def test_a_flipped_byte_in_the_constants_is_named(home: Path) -> None:
    path = home / "cache" / "layers" / LAYER / "constants.zip"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(CacheCorrupt, match=r"constants\.zip is damaged"):
        train_student.run(short(home))
    with pytest.raises(CacheCorrupt, match=r"constants\.zip is damaged"):
        cache_teacher.run(hidden_recipe(home, num_views=3))


# ---------------------------------------------------------------- refusals


def test_another_order_of_the_shards_is_refused_where_it_decides_something(home: Path) -> None:
    made = CacheReader(home / "cache").manifest
    backwards = replace(made, source=made.source[::-1])
    CacheWriter.open(home / "begun", backwards).close()  # a job that died before it had calibrated
    with pytest.raises(CacheMismatch, match="another order") as caught:
        cache_teacher.run(hidden_recipe(home, cache=home / "begun"))
    assert caught.value.got == f"{made.source[0].name} at place 0"
    assert CacheReader(home / "begun").units() == []
    # With its constants there the order decides nothing any more, and no other codec ever cares.
    open_store(home / "cache").write("zarr.json", root_group(backwards))
    cache_teacher.run(hidden_recipe(home, num_views=3))
    assert CacheReader(home / "cache").coverage().complete


def test_a_teacher_with_q_norm_is_refused_before_anything_is_written(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    sizes = {name: value for name, value in TEACHER.items() if name != "name"}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, qk_norm=True, **sizes)
    monkeypatch.setattr("tinymim.models.teacher.build_with_weights", lambda *_args, **_kwargs: model)
    with pytest.raises(RecipeError, match="not a linear layer"):
        cache_teacher.run(hidden_recipe(home, cache=home / "other"))
    assert not (home / "other").exists()
    cache_teacher.run(hidden_recipe(home, codec={"rows": 4}, cache=home / "other"))  # a sketch can be stored


def test_unreadable_images_do_not_calibrate(home: Path) -> None:
    shutil.rmtree(home / "cache")
    for path in (home / "shards").glob("*.tar"):
        data = path.read_bytes()
        path.write_bytes(data.replace(b"\xff\xd8\xff", b"\x00\x00\x00"))  # no JPEG begins any more
    (home / "shards" / "index.json").unlink()
    with pytest.raises(SourceError, match="none of the images to calibrate"):
        cache_teacher.run(hidden_recipe(home))


def test_relation_heads_that_do_not_fit_the_teacher_are_refused_before_training(home: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be split into 3"):
        train_student.run(short(home, targets={"relation_heads": 3}))
    assert not (home / "run-student").exists()
