"""Replayed batches: every record with its view, the due digest checks, and what a cache must hold."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, RecipeError, SourceError, UserError
from tinymim.configs.sections.loader import LoaderConfig, OrderConfig, VerifyConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.views import ViewConfig
from tinymim.pipeline import dataset, replay
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.decode import decode, pixel_digest
from tinymim.pipeline.joined import join
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import Items, SampleOrder
from tinymim.pipeline.records import of_layer
from tinymim.pipeline.replay import ReplayedViews
from tinymim.pipeline.shards import ShardSet, open_shards
from tinymim.pipeline.views import RandomViews, view_key
from tinymim.stages import make_shards
from tinymim.storage.layout import VIEWS, unit_file
from tinymim.storage.reader import CacheReader
from tinymim.tests.pipeline.cached import ARRAYS, records_of, write_cache

IMAGES, NUM_VIEWS = 32, 4
LAW = ViewConfig(size=48, seed=1)


def source_of(root: Path) -> ShardSet:
    return open_shards(SourceConfig(shards=root / "shards"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 images in four shards; four views each, digests in one unit, records in units of one (v0) and three (v1-3)."""
    root = tmp_path_factory.mktemp("replay")
    make_shards.run("drawn", root / "shards", make_shards.Options(count=IMAGES, images_per_shard=8))
    write_cache(root / "cache", source_of(root), LAW, {VIEWS: [(0, 4)], "layer": [(0, 1), (1, 3)]})
    return root


def replayed(root: Path, per_lane: int = 3, **verify: int) -> ReplayedViews:
    reader = CacheReader(root / "cache")
    joined = join(source_of(root), reader)
    arrays = {layer: ARRAYS for layer in joined.layers}
    return ReplayedViews(reader, reader.manifest, joined, arrays, VerifyConfig(**verify), per_lane=per_lane)


def shuffled_items(count: int) -> Items:
    """Some (shard, image, view) in any order, numbered."""
    rng = np.random.default_rng(3)
    items = [(unit, image, view) for unit in range(4) for image in range(8) for view in range(NUM_VIEWS)]
    picked = np.array(items, dtype=np.int64)[rng.permutation(len(items))[:count]]
    return np.concatenate([picked, np.arange(count)[:, None]], axis=1)


def test_every_record_stands_beside_its_view_in_any_order(made: Path) -> None:
    views = replayed(made)
    items = shuffled_items(100)
    batch = views.batch(items)  # every digest is checked
    law = RandomViews(LAW)
    for place, (shard, image, view, _) in enumerate(items.tolist()):
        key = views.source.shards[shard].members().keys[image]
        for name, records in records_of([key], [view]).items():
            np.testing.assert_array_equal(batch.records[f"layer/{name}"][place].numpy(), records[0, 0])
        assert batch.keys[place] == key and batch.views[place] == law(key, view, 80, 80)
        assert int(batch.view_keys[place]) == view_key(1, key, view)
    assert of_layer(batch.records, "layer").keys() == set(ARRAYS) and len(batch.records) == len(ARRAYS)
    assert batch.records["layer/code"].dtype == torch.uint8


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
    views = replayed(made, first=0, every=0)
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
    views = replayed(made, per_lane=8)
    config = OrderConfig(lanes=2, views_per_decode=4, views_per_epoch=4)
    order = SampleOrder(views.source.counts, config, 8, NUM_VIEWS)
    order.step = 2
    loader = LoaderConfig(workers=workers)
    found = list(batches(views.pixels, order.plan(12), loader, batches_per_entry=4, rank_part=views))
    expected = [views.batch(items) for _, items in order.steps(12)]
    for one, other in zip(found, expected, strict=True):
        same(one, other)


def test_one_decode_serves_all_views_of_a_chunk(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(data: bytes, *scale: int) -> torch.Tensor:
        calls.append(len(data))
        return decode(data, *scale)

    monkeypatch.setattr(dataset, "decode", counted)
    views = replayed(made, per_lane=8)
    order = SampleOrder(views.source.counts, OrderConfig(views_per_decode=4, views_per_epoch=4), 8, NUM_VIEWS)
    loader = LoaderConfig(workers=0)
    assert len(list(batches(views.pixels, order.plan(8), loader, batches_per_entry=4, rank_part=views))) == 8
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
    views = ImageViews(source.shards, RandomViews(LAW))
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


def test_records_are_gathered_into_pinned_memory_where_it_is_asked_for(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    empty = torch.empty

    def noted(*shape: Any, **options: Any) -> torch.Tensor:
        asked.append(options.pop("pin_memory", False))  # this machine may have no device to pin for
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", noted)
    monkeypatch.setattr(ViewBatch, "pin_memory", lambda batch: batch)
    views = replayed(made)
    for pin_memory in (False, True):
        asked.clear()
        list(batches(views.pixels, [shuffled_items(4)], LoaderConfig(workers=0), pin_memory, rank_part=views))
        assert asked.count(True) == (len(ARRAYS) if pin_memory else 0)


def test_entries_are_requested_ahead_but_not_where_a_spool_must_hold_their_tars(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = SampleOrder([8] * 4, OrderConfig(), 4, NUM_VIEWS)
    local = replayed(made)
    monkeypatch.setattr(replay, "Path", str)  # as if no shard were in a folder
    for views, ahead in ((local, replay._AHEAD), (replayed(made), 0)):
        plan = order.plan(8)
        next(views.prepared(plan))
        assert len(list(plan)) == 8 - 1 - ahead


# ---------------------------------------------------------------- what a cache must hold


def grown(root: Path, home: Path, layers: dict[str, Any], shards: slice = slice(None), **how: Any) -> CacheReader:
    """A cache of the shards of `root`, or more units of it, in `home`."""
    source = source_of(root)
    write_cache(home / "cache", source, LAW, layers, source.shards[shards], **how)
    return CacheReader(home / "cache")


def test_training_uses_the_views_that_all_shards_have(made: Path, tmp_path: Path) -> None:
    source = source_of(made)
    reader = grown(made, tmp_path, {VIEWS: [(0, 2)], "a": [(0, 2)]})
    assert join(source, reader).num_views == 2
    reader = grown(made, tmp_path, {VIEWS: [(2, 3)], "a": [(2, 1)]}, slice(1))  # a colleague begins to add views
    joined = join(source, reader)
    assert joined.num_views == 2 and joined.skipped == () and joined.counts == [8] * 4
    assert {len(infos) for each in joined.units.values() for infos in each.values()} == {1}  # only units in use
    only = join(source, reader, num_views=3, on_missing="skip")
    assert [shard.name for shard in only.shards] == [source.shards[0].name] and len(only.skipped) == 3
    existing = "layer views: 1 shard has 5 views, 3 shards have 2 views; "
    existing += "layer a: 1 shard has 3 views, 3 shards have 2 views"
    with pytest.raises(UserError, match="lacks 3 of 4 shards") as caught:
        join(source, reader, num_views=3)
    assert caught.value.got == existing and "set num_views: 2" in str(caught.value.hint)
    for on_missing in ("refuse", "skip"):
        with pytest.raises(RecipeError, match="num_views is more than the cache holds") as caught:
            join(source, reader, num_views=9, on_missing=on_missing)
        assert caught.value.expected == f"at most 3; {existing}"


def test_shards_without_any_view_are_an_error_or_skipped(made: Path, tmp_path: Path) -> None:
    source = source_of(made)
    reader = grown(made, tmp_path, {VIEWS: [(0, 2)], "a": [(0, 1)]}, slice(1, 4))
    with pytest.raises(UserError, match="lacks 1 of 4 shards") as caught:
        join(source, reader)
    assert "layer a: 3 shards have 1 view, 1 shard has none" in str(caught.value.got)
    joined = join(source, reader, on_missing="skip")
    assert joined.num_views == 1 and joined.skipped == (source.shards[0].name,)
    with pytest.raises(UserError, match="covers no shard of this source"):
        join(ShardSet(source.shards[:1]), reader, on_missing="skip")


def test_a_layer_is_named_where_there_are_several(made: Path, tmp_path: Path) -> None:
    reader = grown(made, tmp_path, {VIEWS: [(0, 2)], "a": [(0, 2)], "b": [(0, 1)]})
    source = source_of(made)
    assert [join(source, reader, names).num_views for names in ("a", "b", "ab")] == [2, 1, 1]
    assert join(source, reader, "ba").layers == ["b", "a"]
    with pytest.raises(RecipeError, match="more than the cache holds in layer b\n") as caught:
        join(source, reader, "ab", num_views=2)
    assert "layer a: 4 shards have 2 views; layer b: 4 shards have 1 view" in str(caught.value.expected)
    with pytest.raises(UserError, match="2 target layers"):
        join(source, reader)
    with pytest.raises(UserError, match="no layer c"):
        join(source, reader, ["c"])


def test_the_message_names_the_layer_that_lacks_shards(made: Path, tmp_path: Path) -> None:
    grown(made, tmp_path, {VIEWS: [(0, 2)], "a": [(0, 2)]})
    reader = grown(made, tmp_path, {"b": [(0, 2)]}, slice(1, 4))
    with pytest.raises(UserError, match="lacks 1 of 4 shards of this source in layer b, the first is"):
        join(source_of(made), reader, ["a", "b"])
    joined = join(source_of(made), reader, ["a", "b"], on_missing="skip")
    assert len(joined.shards) == 3 and joined.layers == ["a", "b"]


def test_a_batch_holds_the_records_of_all_layers(made: Path, tmp_path: Path) -> None:
    reader = grown(made, tmp_path, {VIEWS: [(0, 2)], "a": [(0, 2)], "b": [(0, 1), (1, 1)]})
    joined = join(source_of(made), reader, ["a", "b"])
    arrays = {"a": ["code"], "b": ARRAYS}
    views = ReplayedViews(reader, reader.manifest, joined, arrays, VerifyConfig(), per_lane=8)
    batch = views.batch(np.array([[2, 3, 1, 0], [0, 5, 0, 1]], np.int64))
    assert set(batch.records) == {"a/code", "b/code", "b/scale"}
    for place, view in enumerate((1, 0)):
        expected = records_of([batch.keys[place]], [view])
        np.testing.assert_array_equal(batch.records["a/code"][place].numpy(), expected["code"][0, 0])
        np.testing.assert_array_equal(batch.records["b/scale"][place].numpy(), expected["scale"][0, 0])


def test_images_without_a_record_are_named_or_counted(made: Path, tmp_path: Path) -> None:
    source = source_of(made)
    lost = source.shards[2].members().keys[3]
    reader = grown(made, tmp_path, {VIEWS: [(0, 1)], "a": [(0, 1)]}, lost=[lost])
    with pytest.raises(CacheMismatch, match=f"no record of '{lost}'"):
        join(source, reader)
    joined = join(source, reader, on_missing="skip")
    assert joined.counts == [8, 8, 7, 8] and joined.without_record == 1


def test_units_of_other_images_are_refused(made: Path, tmp_path: Path) -> None:
    grown(made, tmp_path, {VIEWS: [(0, 1)], "a": [(0, 1)]})
    source = source_of(made)
    reader = grown(made, tmp_path, {VIEWS: [(1, 1)], "a": [(1, 1)]}, lost=[source.shards[0].members().keys[0]])
    with pytest.raises(
        CacheMismatch, match=f"the units of shard {source.shards[0].name} hold different images"
    ) as caught:
        join(source, reader)
    assert re.fullmatch(
        r"views v0-0: 8 images, digest of keys \w{8}, views v1-1: 7 images, digest of keys \w{8}, a v0-0: 8 .*",
        str(caught.value.got),
    )
    assert join(source, reader, num_views=1).counts == [8] * 4


@pytest.mark.parametrize("layer", [VIEWS, "layer"])
def test_a_flipped_byte_is_named_where_it_is_read_and_harmless_elsewhere(
    layer: str, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "shards", tmp_path / "shards")
    shutil.copytree(made / "cache", tmp_path / "cache")
    views = replayed(tmp_path)
    unit = next(info for info in views.reader.units(layer) if 2 in info.unit.views)  # type: ignore[attr-defined]
    path = tmp_path / "cache" / unit_file(layer, unit.unit)
    data = bytearray(path.read_bytes())
    data[unit.parts.places()[2 - unit.unit.first_view] + 1] ^= 1
    path.write_bytes(data)
    shard = [shard.name for shard in views.source.shards].index(unit.unit.shard)
    items = np.array([[shard, image, view, 0] for image in range(8) for view in (0, 1, 3)], dtype=np.int64)
    assert len(views.batch(items).keys) == 24
    with pytest.raises(CacheCorrupt) as caught:
        views.batch(np.array([[shard, 5, 2, 0]], dtype=np.int64))
    for named in (unit.unit.shard, unit.unit.view_range, "view 2", *([layer] if layer != VIEWS else [])):
        assert named in caught.value.what
