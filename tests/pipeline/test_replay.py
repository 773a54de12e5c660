"""Replayed batches: every record with its view, at most `resident_units` in memory, and the due digest checks."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from tinymim.configs.errors import SourceError
from tinymim.configs.schema import CacheTeacherRecipe
from tinymim.configs.sections import LoaderConfig, OrderConfig, SourceConfig, VerifyConfig
from tinymim.pipeline import dataset, replay
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.decode import decode, pixel_digest
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import Items, SampleOrder
from tinymim.pipeline.replay import ReplayedViews, ResidentUnit, join
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews, view_key
from tinymim.stages import cache_teacher, make_shards
from tinymim.storage.commit import UnitInfo
from tinymim.storage.reader import CacheReader, UnitRecords
from tinymim.tests.stages.tiny import STATED

SIZES: dict[str, Any] = {"img_size": 48, "patch_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 2}
ARRAYS = ("qk_tail_gap", "vv_tail_gap")
IMAGES, VIEWS = 32, 4


def recipe(root: Path, num_views: int) -> CacheTeacherRecipe:
    fields: dict[str, Any] = {
        "stage": "cache-teacher",
        "source": {"shards": root / "shards"},
        "views": {"size": 48},
        "num_views": num_views,
        "teacher": {"name": "vit_tiny_patch16_224", "block": 1, "weights": str(root / "teacher.safetensors"), **SIZES},
        "codec": {"rows": 4, "tail_k": 2},
        "cache": root / "cache",
        "audit_views": 0,
        "loader": {"workers": 0},
        "run": {"folder": root / "run", "device": "cpu", "threads": 1},
    }
    return CacheTeacherRecipe.model_validate(fields)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 images in four shards; four views each, in units of one (v0) and three (v1-3)."""
    root = tmp_path_factory.mktemp("replay")
    make_shards.run("drawn", root / "shards", make_shards.Options(count=IMAGES, images_per_shard=8))
    torch.manual_seed(0)
    save_file(
        timm.create_model("vit_tiny_patch16_224", num_classes=0, **SIZES).state_dict(),
        root / "teacher.safetensors",
        STATED,
    )
    cache_teacher.run(recipe(root, 1))
    cache_teacher.run(recipe(root, VIEWS))
    return root


def replayed(root: Path, resident_units: int = 3, **verify: int) -> ReplayedViews:
    reader = CacheReader(root / "cache")
    source = join(open_shards(SourceConfig(shards=root / "shards")), reader)
    return ReplayedViews(reader, source, ARRAYS, VerifyConfig(**verify), resident_units)


def shuffled_items(count: int) -> Items:
    """Some (shard, image, view) in any order, numbered."""
    rng = np.random.default_rng(3)
    items = [(unit, image, view) for unit in range(4) for image in range(8) for view in range(VIEWS)]
    picked = np.array(items, dtype=np.int64)[rng.permutation(len(items))[:count]]
    return np.concatenate([picked, np.arange(count)[:, None]], axis=1)


def test_every_record_stands_beside_its_view_in_any_order(made: Path) -> None:
    views = replayed(made)
    items = shuffled_items(100)
    batch = views.batch(items)  # every digest is checked
    units = [views.reader.read_unit(info) for info in views.reader.units()]
    for place, (shard, image, view, _) in enumerate(items.tolist()):
        [unit] = [u for u in units if u.unit.shard == views.source.shards[shard].name and view in u.unit.views]
        row = unit.unit.row(image, view)
        for name in ARRAYS:
            np.testing.assert_array_equal(batch.records[name][place].numpy(), unit.arrays[name][row])
        assert list(batch.views[place][:4]) == unit.arrays["box"][row].tolist()
        assert batch.keys[place] == unit.keys[image]
        assert int(batch.view_keys[place]) == view_key(0, unit.keys[image], view)
    assert set(batch.records) == set(ARRAYS) and batch.records[ARRAYS[0]].dtype == torch.uint8


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_no_more_units_are_resident_than_said_and_each_is_read_once_a_pass(
    at_once: int, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = OrderConfig(shuffle_units=2, views_per_decode=at_once, views_per_epoch="all")
    reader = CacheReader(made / "cache")
    source = join(open_shards(SourceConfig(shards=made / "shards")), reader)
    order = SampleOrder(source.counts, config, 4, VIEWS)
    assert source.units_per_shard == 2
    allowed = order.resident_units(source.units_per_shard)
    assert allowed == 3 * min(2, at_once)
    views = ReplayedViews(reader, source, ARRAYS, VerifyConfig(), allowed)
    others = {id(unit) for unit in gc.get_objects() if type(unit) is ResidentUnit}
    alive: list[int] = []

    def counting(info: UnitInfo, arrays: Any = None) -> UnitRecords:
        # The unit about to be read counts with those still in memory.
        alive.append(1 + sum(type(o) is ResidentUnit and id(o) not in others for o in gc.get_objects()))
        return CacheReader.read_unit(reader, info, arrays)

    monkeypatch.setattr(reader, "read_unit", counting)
    for entry in order.plan(order.steps_per_epoch):
        views.batch(entry.reshape(-1, 4))
    units_of_views = {1: 4 * VIEWS, 2: 4 * 3, 4: 4 * 2}  # views 0, 1; then 2, 3, of units v0 and v1-3
    assert max(alive) <= allowed and len(alive) <= units_of_views[at_once]


def test_only_the_views_in_use_are_kept(made: Path) -> None:
    views = replayed(made)
    one_view = np.array([[0, image, 2, image] for image in range(8)], dtype=np.int64)
    views.batch(one_view)
    [unit] = views._resident.values()
    assert unit.views == (2,) and {len(array) for array in unit.arrays.values()} == {8}
    views.batch(shuffled_items(128))
    assert {held.views for held in views._resident.values()} == {(0,), (1, 2, 3)}


def test_digests_are_checked_for_the_first_and_then_for_one_in_so_many(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = replayed(made, first=5, every=4)
    checked: list[torch.Tensor] = []

    def counted(pixels: torch.Tensor) -> int:
        checked.append(pixels)
        return pixel_digest(pixels)

    monkeypatch.setattr(replay, "pixel_digest", counted)
    views.batch(shuffled_items(20))
    assert len(checked) == 5 + 3  # 0 to 4, then 8, 12, 16
    checked.clear()
    views.verify = VerifyConfig(first=0, every=0)
    views.batch(shuffled_items(20))
    assert checked == []


def same(a: ViewBatch, b: ViewBatch) -> None:
    np.testing.assert_array_equal(a.items, b.items)
    assert a.keys == b.keys and a.views == b.views
    assert torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels)
    assert torch.equal(a.view_keys, b.view_keys) and a.records.keys() == b.records.keys()
    assert all(torch.equal(a.records[name], b.records[name]) for name in a.records)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_batches_of_one_decode_are_those_made_one_by_one(made: Path, workers: int) -> None:
    views = replayed(made, resident_units=8)
    config = OrderConfig(lanes=2, views_per_decode=4, views_per_epoch=4)
    order = SampleOrder(views.source.counts, config, 8, VIEWS)
    order.step = 2
    loader = LoaderConfig(workers=workers)
    found = list(batches(views, order.plan(12), loader, batches_per_entry=4))
    expected = [views.batch(items) for _, items in order.steps(12)]
    for one, other in zip(found, expected, strict=True):
        same(one, other)


def test_one_decode_serves_all_views_of_a_chunk(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(data: bytes, *scale: int) -> torch.Tensor:
        calls.append(len(data))
        return decode(data, *scale)

    monkeypatch.setattr(dataset, "decode", counted)
    views = replayed(made, resident_units=8)
    order = SampleOrder(views.source.counts, OrderConfig(views_per_decode=4, views_per_epoch=4), 8, VIEWS)
    assert len(list(batches(views, order.plan(8), LoaderConfig(workers=0), batches_per_entry=4))) == 8
    assert len(calls) == 16  # two chunks of eight images, four views each


def test_a_lost_image_is_named_and_its_neighbours_boxes_stay_theirs(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = replayed(made)
    lost = views.source.shards[1].read(3)
    monkeypatch.setattr(dataset, "decode", lambda data, *scale: decode(b"?" if data == lost else data, *scale))
    items = np.array([[1, 3, 0, 0], [1, 4, 0, 1], [1, 5, 1, 2]], dtype=np.int64)
    with pytest.raises(SourceError, match="can no longer be read"):
        views.batch(items)


def test_an_unreadable_image_is_missing_from_every_batch_of_its_chunk(
    drawn_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_shards(SourceConfig(shards=drawn_shards))
    views = ImageViews(source.shards, RandomViews(recipe(drawn_shards, 1).views))
    order = SampleOrder(source.counts, OrderConfig(views_per_decode=2, views_per_epoch=2), 20, None)
    expected = [items[:, :3] for _, items in order.steps(6)]
    broken = (2, 1)
    lost = source.shards[2].read(1)
    monkeypatch.setattr(dataset, "decode", lambda data, *scale: decode(b"?" if data == lost else data, *scale))
    found = list(batches(views, order.plan(6), LoaderConfig(workers=0), batches_per_entry=2))
    for batch, items in zip(found, expected, strict=True):
        kept = [row for row in items.tolist() if tuple(row[:2]) != broken]
        assert batch.items.tolist() == kept and len(batch.pixels) == len(kept)
        assert len(batch.unreadable) == len(items) - len(kept)


def test_all_that_goes_to_the_device_is_pinned(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = replayed(made).batch(shuffled_items(4))
    pinned: set[int] = set()

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        pinned.add(id(tensor))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", noted)
    again = batch.pin_memory()
    assert pinned == {id(tensor) for tensor in (batch.pixels, batch.view_keys, *batch.records.values())}
    same(batch, again)
