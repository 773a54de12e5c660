"""Caches of mixed views: both stages and every command that renders them again see the same pairs, or refuse."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file

from tinymim.api import open_cache
from tinymim.configs.errors import CacheMismatch, SourceError
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.finetune import FinetuneRecipe
from tinymim.pipeline import misses
from tinymim.pipeline.dataset import ViewBatch
from tinymim.pipeline.pairs import soft_labels
from tinymim.pipeline.shards import open_shards
from tinymim.stages import cache_teacher, train_student, views
from tinymim.stages.cache import deep, repair, write_back
from tinymim.stages.cache.info import describe, format_info
from tinymim.stages.run.folder import read_metrics
from tinymim.stages.training.terms import Term, label_top1
from tinymim.storage.layout import VIEWS
from tinymim.storage.reader import CacheReader
from tinymim.targets.contract import Answers
from tinymim.tests.stages.conftest import Run
from tinymim.tests.stages.test_teacher_in_loop import same_records
from tinymim.tests.stages.tiny import STATED, TEACHER, cache_recipe, losses, stored, student_recipe, tree, unit_names

LAW: dict[str, Any] = {"size": 32, "operations": {"rand_augment": "rand-m9-mstd0.5-inc1"}, "pairs": {}}
CODEC = {"kind": "logits", "name": "topk", "classes": 10, "head_k": 3}
STEPS = {"batch_size": 8, "steps": 3}


def recipe(root: Path, **changes: Any) -> CacheTeacherRecipe:
    return cache_recipe(root, **{"views": LAW, "codec": CODEC, "max_unreadable": 0.2} | changes)


@pytest.fixture(scope="module")
def paired(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny set, one image of which is torn, with a teacher of 10 classes and a cache of its logits on mixed views.

    Do not write to it.
    """
    root = tmp_path_factory.mktemp("paired") / "home"
    shutil.copytree(made, root, ignore=shutil.ignore_patterns("cache", "run-*", "index*"))
    torch.manual_seed(0)
    sizes = {name: value for name, value in TEACHER.items() if name != "name"}
    teacher = timm.create_model(str(TEACHER["name"]), num_classes=10, **sizes)
    weights = teacher.state_dict()
    torch.nn.init.normal_(weights["head.weight"])
    save_file(weights, root / "teacher.safetensors", STATED)
    path = root / "shards" / "shard-000001.tar"
    with tarfile.open(path) as tar:
        images = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    torn = next(name for name, _ in images[6:] if not name.endswith(".cls"))
    with tarfile.open(path, "w") as tar:
        for name, data in images:
            kept = data if name != torn else data[:100]
            info = tarfile.TarInfo(name)
            info.size = len(kept)
            tar.addfile(info, io.BytesIO(kept))
    cache_teacher.run(recipe(root))
    return root


@pytest.fixture
def copy(paired: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(paired, tmp_path / "home"))


def test_a_cache_is_the_same_for_any_batch_workers_and_growth(paired: Path, copy: Path) -> None:
    shutil.rmtree(copy / "cache")
    cache_teacher.run(recipe(copy, loader={"workers": 2}, batch_size=5, views_per_decode=1))
    pixels = [
        {name: data for name, data in stored(root).items() if name.startswith("views/")} for root in (paired, copy)
    ]
    assert pixels[0] and pixels[0] == pixels[1]
    cache_teacher.run(recipe(copy, num_views=3))
    cache_teacher.run(recipe(copy, layer="second", num_views=3))  # renders the views again, and compares digests
    assert unit_names(copy / "cache")[VIEWS][:2] == ["shard-000000.tar v0-1", "shard-000000.tar v2-2"]


def test_stage_two_sees_the_pixels_of_stage_one_and_leaves_the_same_views_unmixed(paired: Path, copy: Path) -> None:
    train_student.run(student_recipe(copy, optim=STEPS))  # checks every digest
    first = losses(copy)
    shutil.rmtree(copy / "run-student")
    order = {"shuffle_units": 2, "views_per_decode": 2, "views_per_epoch": 2}
    train_student.run(student_recipe(copy, optim=STEPS, order=order, loader={"workers": 2, "prefetch": 2}))
    assert len(first) == 3
    loader = open_cache(copy / "cache").loader(
        copy / "shards", batch_size=7, workers=0, views_per_epoch=2, verify_first=10**6
    )
    seen = [batch for batch in loader]
    unmixed = [(key, int(view)) for b in seen for key, view, s in zip(b.keys, b.views, b.shares, strict=True) if s == 1]
    shard = open_shards(recipe(copy).source).shards[1]
    [(torn, _)] = CacheReader(copy / "cache").by_shard()[shard.name][0].statistics["unreadable"]
    assert unmixed and all(key in shard.members().keys for key, _ in unmixed)
    assert torn not in {key for batch in seen for key in batch.keys}
    for batch in seen:
        targets = batch.soft_labels(10)
        assert torch.equal(targets.sum(1), torch.ones(len(batch.keys)))
        assert torch.equal(
            targets.gather(1, batch.labels[:, None])[:, 0] == 1,
            (batch.shares == 1) | (batch.labels == batch.partner_labels),
        )


def test_a_student_is_compared_with_labels_mixed_like_the_pixels(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TinyViT's meter of the student against the labels."""
    seen: list[tuple[float, float]] = []

    def noted(term: Term, answers: Answers, batch: ViewBatch, rows: slice) -> dict[str, torch.Tensor]:
        found = label_top1(term, answers, batch, rows)
        own, (partners, shares) = batch.labels, batch.partner_labels()
        first = answers[0].argmax(-1)
        soft = soft_labels(own, partners, shares, 10)[rows].gather(1, first[:, None])
        seen.append((float(found["label_top1"]), float(soft.mean())))
        return found

    monkeypatch.setattr("tinymim.stages.training.student_step.label_top1", noted)
    train_student.run(student_recipe(copy, optim={"batch_size": 8, "steps": 12, "base_lr": 0.3}))
    assert [line["label_top1"] for line in read_metrics(copy / "run-student")] == pytest.approx([a for a, _ in seen])
    assert [a for a, _ in seen] == pytest.approx([b for _, b in seen]) and any(0 < a < 1 for a, _ in seen)


# ---------------------------------------------------------------- a teacher in the loop


def in_loop(root: Path, cache: str, folder: str, **changes: Any) -> list[tuple[float, float]]:
    """Losses and meters against the mixed labels; batches of whole shards, one of which has a torn image."""
    optim = {"batch_size": 12, "steps": 9, "base_lr": 0.1}
    fields: dict[str, Any] = {"on_missing": "teacher", "num_views": 2, "optim": optim, "cache": root / cache}
    run = {**student_recipe(root).run.model_dump(), "folder": root / folder, "log_every": 1}
    train_student.run(student_recipe(root, **(fields | {"run": run} | changes)))
    return [(line["loss"], line["label_top1"]) for line in read_metrics(root / folder)]


def computed(root: Path, folder: str) -> float:
    return float(np.mean([line["computed_share"] for line in read_metrics(root / folder)]))


def stated(root: Path) -> dict[str, Any]:
    """What a recipe states where there is no cache."""
    [layer] = CacheReader(root / "cache").layers
    teacher = recipe(root).teacher.model_dump(exclude_unset=True)
    return {"views": LAW, "layers": {layer: {"teacher": teacher, "codec": CODEC}}}


def test_a_teacher_in_the_loop_gives_the_targets_of_a_cache(copy: Path) -> None:
    short = {"optim": {"batch_size": 12, "steps": 4, "base_lr": 0.1}}
    known = in_loop(copy, "cache", "known", **short)
    assert computed(copy, "known") == 0 and any(0 < top1 < 1 for _, top1 in known)
    assert in_loop(copy, "none", "online", **stated(copy), **short) == known and computed(copy, "online") == 1


@pytest.mark.slow  # five training runs
def test_mixed_views_are_written_back_and_fresh(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_back, "_MAX_UNREADABLE", 0.2)
    known = in_loop(copy, "cache", "known")
    law = stated(copy)
    assert in_loop(copy, "new", "written", write_back=True, **law) == known
    units = unit_names(copy / "new")
    assert all(each == units[VIEWS] for each in units.values()) and len(units[VIEWS]) == 6
    same_records(copy / "new", copy / "cache")
    assert in_loop(copy, "new", "read", **law) == known and computed(copy, "read") == 0
    fresh: dict[str, Any] = {"num_views": 1, "fresh": 0.5}
    assert in_loop(copy, "cache", "fresh", **fresh) == in_loop(copy, "none", "fresher", **law, **fresh)
    assert 0 < computed(copy, "fresh") < computed(copy, "fresher") == 1


def test_partners_that_stage_one_saw_otherwise_are_refused_beside_a_teacher(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the cache grows during a run, by another job that reads other images."""
    monkeypatch.setattr(misses, "unreadable_keys", lambda info: frozenset())
    with pytest.raises(CacheMismatch, match=r"shard-000001\.tar does not hold the images of stage one"):
        in_loop(copy, "cache", "keys")
    monkeypatch.setattr(misses, "places_in_tar", lambda *_: {})
    monkeypatch.setattr("tinymim.pipeline.replay.lost_partners", lambda units: {})
    with pytest.raises(SourceError, match=r"of shard shard-000001\.tar can be read for some views only"):
        in_loop(copy, "cache", "partner")


def test_records_are_compared_with_the_teacher(
    paired: Path, copy: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TinyViT's check of saved logits, with a threshold and an exit code."""
    found = deep.run(recipe(copy), copy / "cache", 30, 1.0)
    assert found["passed"] and found["records"] == 30 and not found["unreadable"]
    path = copy / "recipe.yaml"
    path.write_text(json.dumps(recipe(copy).model_dump(mode="json", exclude_unset=True)))
    assert run("cache", "verify", copy / "cache", "--deep", path)[0] == 0
    torch.manual_seed(1)
    sizes = {name: value for name, value in TEACHER.items() if name != "name"}
    other = timm.create_model(str(TEACHER["name"]), num_classes=10, **sizes)
    with monkeypatch.context() as patch:  # another teacher under the same digest
        patch.setattr("tinymim.stages.cache.deep.check_same_layer", lambda *_: [])
        save_file(other.state_dict(), copy / "teacher.safetensors", STATED)
        other_teacher = deep.run(recipe(copy), copy / "cache", 30)
        assert not other_teacher["passed"] and not other_teacher["wrong_pixels"]
        assert other_teacher["agreement"] < 0.8
    shutil.copy(paired / "teacher.safetensors", copy / "teacher.safetensors")
    monkeypatch.setattr("tinymim.pipeline.dataset._mix_pairs", lambda shards, batch, *rest: batch)
    code, out, _ = run("cache", "verify", copy / "cache", "--deep", path)
    assert code == 2 and "NOT SOUND" in out and "digest" in out


def test_a_lost_unit_of_the_view_layer_is_rendered_again(paired: Path, copy: Path) -> None:
    before = tree(copy / "cache")
    lost = [name for name in before if name.startswith("views/") and "shard-000001/" in name]
    assert lost
    for name in lost:
        (copy / "cache" / name).unlink()
    repair.run(recipe(copy))
    assert tree(copy / "cache") == before


def test_pairs_are_part_of_the_identity(copy: Path, paired: Path, made: Path) -> None:
    manifest = CacheReader(paired / "cache").manifest
    assert manifest.views["pairs"] == {"version": 1, "mixup": 0.8, "cutmix": 1.0, "cutmix_share": 0.5, "share": 1.0}
    assert "canary.pairs" in manifest.environment
    text = format_info(describe(paired / "cache"))
    assert "pairs mixup 0.8 or cutmix 1 (0.5 of pairs) in 1 of views" in text
    with pytest.raises(CacheMismatch, match=r"views\.pairs\.mixup"):
        cache_teacher.run(recipe(copy, views=LAW | {"pairs": {"mixup": 0.7}}))
    plain = CacheReader(made / "cache").manifest
    assert "pairs" not in plain.views and "canary.pairs" not in plain.environment
    fields = {"stage": "finetune", "views": {"pairs": {}}, "model": {}, "weights": "hub", "optim": {"steps": 1}}
    with pytest.raises(ValidationError, match=r"views.pairs is for caches .* `augment` instead"):
        FinetuneRecipe.model_validate(
            fields | {"train": {"shards": "x"}, "val": {"shards": "x"}, "run": {"folder": "r"}}
        )


def test_the_contact_sheet_shows_partners_and_shares(copy: Path) -> None:
    found = views.run(recipe(copy), views.Options(copy / "v.html", images=2, views=3))
    assert "pairs mixup" in str(found["law"])
    page = (copy / "v.html").read_text()
    keys = list(open_shards(recipe(copy).source).shards[0].members().keys)
    rows = [row for row in page.split("<tr><td>")[1:] if "mixup " in row or "cutmix " in row]
    assert len(rows) >= 4 and any(f" with {key}" in row for row in rows for key in keys)
    assert any("pixels at (" in row and "cutmix 0." in row for row in rows)
    assert np.asarray(Image.open(copy / "v.png")).std() > 10
