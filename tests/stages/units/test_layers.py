"""A layer that is added to a cache: what it may change, what it compares, and what memory it takes."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinymim.configs.errors import CacheMismatch, SourceError, UnitsFailed, ViewMismatch
from tinymim.pipeline import dataset
from tinymim.pipeline.dataset import ViewBatch
from tinymim.stages import cache_teacher
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.units import draft
from tinymim.stages.units.draft import UnitPart
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages.tiny import cache_recipe, copied, tree, unit_names, write_set, write_teacher

LAYER = cache_recipe(Path()).layer_name
VIEW_UNITS = [f"shard-00000{number}.tar {views}" for number in (0, 1) for views in ("v0-2", "v3-4")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 7 images, two teachers, and a cache of 5 views in units of 3, made 2 views at a time."""
    root = write_set(tmp_path_factory.mktemp("layers"), 14, 7)
    write_teacher(root / "other.safetensors", seed=1)
    cache_teacher.run(recipe(root))
    return root


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    return copied(made, tmp_path / "home")


def recipe(root: Path, **changes: Any) -> Any:
    parts = {"num_views": 5, "views_per_unit": 3, "views_per_decode": 2, "batch_size": 3}
    return cache_recipe(root, **parts | changes)


def other_teacher(root: Path) -> Any:
    return recipe(root).teacher.model_copy(update={"weights": str(root / "other.safetensors")})


@pytest.mark.parametrize("views_per_unit", [3, 2, 50])
def test_another_codec_or_teacher_adds_a_layer_and_changes_no_byte(home: Path, views_per_unit: int) -> None:
    before = tree(home / "cache")
    both = {"views_per_unit": views_per_unit, "views_per_decode": 1}
    cache_teacher.run(recipe(home, layer="dense", codec={"name": "dense"}, **both))
    cache_teacher.run(recipe(home, layer="other", teacher=other_teacher(home), audit_views=4, **both))
    after = tree(home / "cache")
    assert {name: data for name, data in after.items() if name in before} == before
    assert {name.split("/")[1] for name in after.keys() - before.keys()} == {"dense", "other"}
    names = unit_names(home / "cache")
    assert names[VIEWS] == names[LAYER] == VIEW_UNITS
    cut_finer = ["v0-1", "v2-2", "v3-3", "v4-4"]
    wanted = [f"shard-00000{n}.tar {v}" for n in (0, 1) for v in cut_finer] if views_per_unit == 2 else VIEW_UNITS
    assert names["dense"] == names["other"] == wanted
    reader = CacheReader(home / "cache")
    assert reader.layers["other"].teacher["weights_sha256"] != reader.layers[LAYER].teacher["weights_sha256"]
    # The first part alone is audited, one view of each image.
    assert {info.statistics["fidelity"]["views"] for info in reader.units("other")} == {4}


def test_a_layer_with_more_views_adds_them_to_the_view_layer(home: Path) -> None:
    before = tree(home / "cache")
    cache_teacher.run(recipe(home, layer="dense", codec={"name": "dense"}, num_views=7))
    names = unit_names(home / "cache")
    assert names["dense"] == names[VIEWS]
    assert names[LAYER] == VIEW_UNITS and f"{VIEW_UNITS[0][:16]} v5-5" in names["dense"]
    after = tree(home / "cache")
    assert {name: data for name, data in after.items() if name in before} == before
    cache_teacher.run(recipe(home, num_views=7))
    assert len(set(map(tuple, unit_names(home / "cache").values()))) == 1


def test_records_do_not_depend_on_units_and_parts(made: Path, tmp_path: Path) -> None:
    cache_teacher.run(recipe(made, cache=tmp_path, views_per_unit=50, views_per_decode=8))
    cut, whole = CacheReader(made / "cache"), CacheReader(tmp_path)
    for layer in (VIEWS, LAYER):
        assert len(whole.units(layer)) == 2
        for info in whole.units(layer):
            found = whole.read_views(info)
            parts = [cut.read_views(part) for part in cut.by_shard(layer)[info.unit.shard]]
            assert all(np.array_equal(v, np.concatenate([p[name] for p in parts])) for name, v in found.items())


def test_other_pixels_are_refused_by_name_and_nothing_is_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, render = tree(home / "cache"), dataset.render_items
    manifest = CacheReader(home / "cache").manifest

    def changed(shards: Any, items: Any, law: Any, seed: int | None, further: Any) -> ViewBatch:
        batch = render(shards, items, law, seed, further)
        rows = np.flatnonzero((batch.items == [1, 4, 3]).all(axis=1))
        batch.pixels[torch.from_numpy(rows)] ^= 1
        return batch

    monkeypatch.setattr("tinymim.pipeline.dataset.render_items", changed)
    with pytest.raises(
        ViewMismatch, match=r"image '.*' of shard shard-000001\.tar, view 3: the pixels are not"
    ) as caught:
        cache_teacher.run(recipe(home, layer="dense", codec={"name": "dense"}))
    assert str(caught.value.got).startswith("digest ") and len(str(caught.value.got)) == len("digest ") + 8
    assert "none, so the image changed" in str(caught.value.hint)
    monkeypatch.setattr("tinymim.pipeline.mismatch.environment", lambda: {**manifest.environment, "pillow": "0.1"})
    with pytest.raises(ViewMismatch) as caught:
        cache_teacher.run(recipe(home, layer="dense", codec={"name": "dense"}))
    assert "pillow" in str(caught.value.hint) and "-> 0.1" in str(caught.value.hint)
    after = tree(home / "cache")
    assert {name: data for name, data in after.items() if name in before} == before
    assert unit_names(home / "cache")["dense"] == VIEW_UNITS[:3]
    monkeypatch.undo()
    cache_teacher.run(recipe(home, layer="dense", codec={"name": "dense"}))
    assert unit_names(home / "cache")["dense"] == VIEW_UNITS


def unreadable(monkeypatch: pytest.MonkeyPatch, sample: int, views: set[int]) -> None:
    """One image of every shard cannot be decoded for these views."""
    render = dataset.render_items

    def some(shards: Any, items: Any, law: Any, seed: int | None, further: Any) -> ViewBatch:
        batch = render(shards, items, law, seed, further)
        rows = (batch.items[:, 1] != sample) | ~np.isin(batch.items[:, 2], list(views))
        if rows.all():
            return batch
        key = batch.keys[int(np.flatnonzero(~rows)[0])]
        return replace(batch.pick(np.flatnonzero(rows)), unreadable=[(key, "cut short")])

    monkeypatch.setattr("tinymim.pipeline.dataset.render_items", some)


def test_unreadable_images_are_left_out_of_both_layers(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable(monkeypatch, 2, set(range(5)))
    cache_teacher.run(recipe(made, cache=tmp_path, max_unreadable=0.2))
    reader, whole = CacheReader(tmp_path), CacheReader(made / "cache")
    for info in reader.units():
        [(key, reason)] = info.statistics["unreadable"]
        assert key == whole.keys(info.unit.shard)[2] and reason == "cut short" and info.num_images == 6
    assert {info.num_images for info in reader.units(LAYER)} == {6}
    kept = [0, 1, 3, 4, 5, 6]
    for ours, theirs in zip(reader.units(LAYER), whole.units(LAYER), strict=True):
        found, wanted = reader.read_views(ours), whole.read_views(theirs)
        assert all(np.array_equal(found[name], wanted[name][:, kept]) for name in wanted)


def test_an_image_that_the_view_layer_has_must_be_readable(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreadable(monkeypatch, 2, set(range(9)))
    for changes in ({"layer": "dense", "codec": {"name": "dense"}}, {"num_views": 6}):
        with pytest.raises(CacheMismatch, match=r"units of shard shard-000000\.tar hold different images") as caught:
            cache_teacher.run(recipe(home, max_unreadable=0.5, **changes))
        assert "6 images that can be read" in str(caught.value.got) and "cut short" in str(caught.value.got)
    assert unit_names(home / "cache")[VIEWS] == VIEW_UNITS


def test_an_image_that_can_be_read_now_and_then_fails_its_unit(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unreadable(monkeypatch, 2, {2})
    with pytest.raises(UnitsFailed, match=f"2 unit.s. of layer {LAYER}"):
        cache_teacher.run(recipe(made, cache=tmp_path, max_unreadable=0.5, retries=0))
    assert "can be read for some views only" in capsys.readouterr().err
    assert {name.rsplit(" ")[-1] for name in unit_names(tmp_path)[LAYER]} == {"v3-4"}
    monkeypatch.undo()
    cache_teacher.run(recipe(made, cache=tmp_path))
    assert tree(tmp_path) == tree(made / "cache")


def test_each_layer_has_its_own_constants(home: Path) -> None:
    hidden: dict[str, Any] = {"name": "hidden", "basis": "channels", "bits": 8, "calibration_views": 5}
    for name, changes in {"a": {}, "b": {"teacher": other_teacher(home)}}.items():
        cache_teacher.run(recipe(home, layer=name, codec=hidden, **changes))
    reader = CacheReader(home / "cache")
    ours, theirs, none = (reader.constants(name) for name in ("a", "b", LAYER))
    assert none is None and ours is not None and theirs is not None
    assert any(not np.array_equal(ours[name], theirs[name]) for name in ours)
    assert len(reader.units("a")) == len(reader.units("b")) == len(VIEW_UNITS)


def test_a_recipe_that_names_too_many_views_harms_nobody(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The typing error is noticed and the job is stopped; the others' recipe goes on as if nothing had been."""
    manifest, layer = (home / "cache" / name for name in ("zarr.json", f"layers/{LAYER}/zarr.json"))
    before = manifest.read_bytes(), layer.read_bytes()
    encode, calls = draft.encode, iter(range(10**6))

    def stop_soon(*args: Any) -> Any:
        if next(calls) == 2:
            os.kill(os.getpid(), 2)
        return encode(*args)

    monkeypatch.setattr("tinymim.stages.units.job.encode", stop_soon)
    with pytest.raises(Interrupted):
        cache_teacher.run(recipe(home, num_views=30_000))
    monkeypatch.undo()
    assert (manifest.read_bytes(), layer.read_bytes()) == before
    coverage = CacheReader(home / "cache").coverage(LAYER)
    assert coverage.complete_views == 5 and coverage.complete_shards == 2
    cache_teacher.run(recipe(home))  # nothing to do
    cache_teacher.run(recipe(home, num_views=6))
    assert CacheReader(home / "cache").coverage(LAYER).complete_views >= 6


def test_no_more_than_two_parts_are_held(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of views: one part is written while the next is collected."""
    held: list[int] = []
    living: set[int] = set()

    class Counted(UnitPart):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            living.add(id(self))
            held.append(len(living) * len(self.views))

        def __del__(self) -> None:
            living.discard(id(self))

    monkeypatch.setattr("tinymim.stages.units.job.UnitPart", Counted)
    cache_teacher.run(recipe(made, cache=tmp_path, num_views=40, views_per_unit=20))
    assert len(held) == 40 and max(held) <= 2 * 2
    assert CacheReader(tmp_path).coverage(LAYER).complete_views == 40


@pytest.fixture(autouse=True)
def _leases_are_given_back(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob("leases/**/*.json"))


@pytest.mark.parametrize(
    ("lost", "most", "text"),
    [
        (24, 1.0, "no readable image.*got: 24 of 24 unreadable.*expected: at least one readable image.*or remove"),
        (24, 0.1, "no readable image.*expected: at least one readable image.*or remove"),
        (3, 0.1, "too many unreadable.*got: 3 of 24 unreadable.*expected: at most 10.0% unreadable.*max_unreadable"),
    ],
)
def test_unreadable_images_are_refused_with_a_limit_that_was_passed(lost: int, most: float, text: str) -> None:
    part = UnitPart(UnitId("shard-000000.tar", 0, 1), range(1), 24, {}, {})
    part.unreadable = [(f"k{number}", "cut short") for number in range(lost)]
    with pytest.raises(SourceError) as caught:
        part.refuse_too_many_unreadable(most)
    assert re.search(text, str(caught.value), re.DOTALL)
