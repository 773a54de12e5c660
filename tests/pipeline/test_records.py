"""One reader a rank: each slice is read once per pass, whatever the workers, in bounded memory; damage has its turn."""

import multiprocessing
import os
import pickle
import signal
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tinymim.configs.errors import CacheCorrupt, LoaderKilled, ViewMismatch
from tinymim.configs.sections.loader import LoaderConfig, OrderConfig, VerifyConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.views import ViewConfig
from tinymim.pipeline import replay
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.joined import CachedSource
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.records import Arrays
from tinymim.pipeline.replay import ReplayedViews
from tinymim.pipeline.shards import ShardSet, open_shards
from tinymim.pipeline.views import RandomViews, view_key
from tinymim.stages import make_shards
from tinymim.storage.blocks import DIGEST
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.manifest import Manifest, SourceShard

SHARDS, IMAGES, NUM_VIEWS = 12, 5, 4
LAW = ViewConfig(size=16, seed=2)
RANGES = {VIEWS: [(0, 4)], "layer": [(0, 1), (1, 3)]}  # first view and number of views of the units of each layer
NO_CHECK = VerifyConfig(first=0, every=0)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # four workers on two cores


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("records") / "shards"
    make_shards.run("drawn", folder, make_shards.Options(images_per_shard=IMAGES, count=SHARDS * IMAGES))
    return open_shards(SourceConfig(shards=folder))


@pytest.fixture(scope="module")
def digests(source: ShardSet) -> dict[tuple[str, int], list[int]]:
    """The low 32 bits of the pixel digests of every shard and view."""
    drawn = ImageViews(source.shards, RandomViews(LAW), LAW.seed)
    return {
        (shard.name, view): (
            drawn.batch(np.array([[number, image, view] for image in range(IMAGES)])).digests().numpy() & (2**32 - 1)
        ).tolist()
        for number, shard in enumerate(source.shards)
        for view in range(NUM_VIEWS)
    }


class CountingReader:
    """Makes records from key and view, counts reads by (layer, shard, view), and what is in memory."""

    def __init__(self, source: ShardSet, digests: dict[tuple[str, int], list[int]]) -> None:
        self.source, self.digests = source.by_name(), digests
        self.reads: Counter[tuple[str, str, int]] = Counter()
        self.calls: list[tuple[str, str, list[int]]] = []
        self.key_reads: Counter[str] = Counter()
        self.damaged: set[tuple[str, str, int]] = set()
        self.damaged_keys: set[str] = set()
        self.alive = self.most_alive = 0
        self._lock = threading.Lock()

    def read_views(self, info: Any, views: Sequence[int], arrays: Sequence[str] | None = None) -> Arrays:
        assert threading.current_thread() is not threading.main_thread()
        shard, layer = info.unit.shard, info.layer
        assert set(views) <= set(info.unit.views) and list(views) == sorted(views)
        with self._lock:
            self.reads.update((layer, shard, view) for view in views)
            self.calls.append((layer, shard, list(views)))
        for view in views:
            if (layer, shard, view) in self.damaged:
                raise CacheCorrupt(f"{layer}: {info.unit}: view {view} does not have its committed checksum")
        if layer == VIEWS:
            assert arrays == [DIGEST]
            return {DIGEST: np.array([self.digests[shard, view] for view in views], dtype=np.uint32)}
        assert arrays == ["code", "scale"]
        codes = np.stack([self.codes(shard, view) for view in views])
        with self._lock:
            self.alive += len(views)
            self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(codes, self._freed, len(views))
        return {"code": codes, "scale": codes.astype(np.float16)[..., 0, :]}

    def codes(self, shard: str, view: int) -> Any:
        """uint8 [I, 8, 1]."""
        identities = np.array([view_key(0, key, view) for key in self.keys_of(shard)])
        return identities.view(np.uint8).reshape(-1, 8, 1)

    def keys_of(self, shard: str) -> list[str]:
        # In an order of its own, and without the tar's first image, which was unreadable.
        return list(self.source[shard].members().keys[:0:-1])

    def keys(self, shard: str) -> list[str]:
        self.key_reads[shard] += 1
        if shard in self.damaged_keys:
            raise CacheCorrupt(f"views: {shard}: the keys do not have their committed checksum")
        return self.keys_of(shard)

    def _freed(self, views: int) -> None:
        with self._lock:
            self.alive -= views


CACHED = IMAGES - 1  # of every shard


def replayed(
    reader: CountingReader, source: ShardSet, order: SampleOrder | None = None, verify: VerifyConfig = NO_CHECK
) -> ReplayedViews:
    units: Any = {
        layer: {
            shard.name: tuple(
                SimpleNamespace(layer=layer, unit=UnitId(shard.name, *each), num_images=CACHED) for each in ranges
            )
            for shard in source.shards
        }
        for layer, ranges in RANGES.items()
    }
    shards = tuple(SourceShard(s.name, s.size_bytes, s.num_samples, s.content_hash) for s in source.shards)
    manifest = Manifest(shards, LAW.identity(), {"tinymim": "0", "canary": "0"})
    joined = CachedSource(source.shards, NUM_VIEWS, units)
    sizes = {} if order is None else {"lanes": len(order.lanes), "per_lane": order.slices_per_lane}
    return ReplayedViews(reader, manifest, joined, {"layer": ["code", "scale"]}, verify, **sizes)


def order_of(batch_size: int = 12, **config: Any) -> SampleOrder:
    return SampleOrder([CACHED] * SHARDS, OrderConfig.model_validate(config), batch_size, NUM_VIEWS)


def same(one: ViewBatch, other: ViewBatch) -> None:
    np.testing.assert_array_equal(one.items, other.items)
    assert one.keys == other.keys and one.views == other.views
    assert torch.equal(one.pixels, other.pixels) and torch.equal(one.view_keys, other.view_keys)
    assert one.records.keys() == other.records.keys() == {"layer/code", "layer/scale"}
    assert all(torch.equal(one.records[name], other.records[name]) for name in one.records)


ORDERS: list[dict[str, Any]] = [
    {"shuffle_units": 1, "views_per_epoch": 2},
    {"shuffle_units": 3, "views_per_decode": 4, "views_per_epoch": 4},
    {"shuffle_units": 2, "lanes": 2, "views_per_epoch": 2},
    {"shuffle_units": 2, "lanes": 3, "views_per_decode": 4, "views_per_epoch": 4},
]


@pytest.mark.parametrize("config", ORDERS, ids=str)
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_each_slice_is_read_once_a_pass_and_every_record_stands_beside_its_view(
    workers: int, config: dict[str, Any], source: ShardSet, digests: dict[tuple[str, int], list[int]]
) -> None:
    order, reader = order_of(**config), CountingReader(source, digests_of_cached(digests))
    views = replayed(reader, source, order, VerifyConfig(first=10**9))
    last = order.steps_per_epoch
    loader = LoaderConfig(workers=workers, prefetch=2)
    found = list(
        batches(views.pixels, order.plan(last), loader, batches_per_entry=order.order.views_per_decode, rank_part=views)
    )
    used = range(config["views_per_epoch"])  # one or two passes, each with other views
    names = [(layer, shard.name, view) for layer in RANGES for shard in source.shards for view in used]
    assert reader.reads == Counter(names) and len(found) == last
    passes = config["views_per_epoch"] // order.order.views_per_decode
    assert reader.key_reads.keys() == reader.source.keys() and max(reader.key_reads.values()) <= passes
    if order.order.views_per_decode == 4:  # all views of a unit in one call
        assert {tuple(views) for layer, _, views in reader.calls if layer == "layer"} == {(0,), (1, 2, 3)}
    for batch, (_, items) in zip(found, order.steps(last), strict=True):
        for place, (shard, image, view, _) in enumerate(items.tolist()):
            name = source.shards[shard].name
            assert batch.keys[place] == reader.keys_of(name)[image]
            code = reader.codes(name, view)[image]
            assert batch.records["layer/code"][place].numpy().tolist() == code.tolist()
            assert batch.records["layer/scale"][place].tolist() == code[0].astype(np.float16).tolist()
    if workers:
        fresh = replayed(CountingReader(source, digests), source, order)
        alone = list(batches(fresh.pixels, order.plan(last), LoaderConfig(workers=0), rank_part=fresh))
        for one, other in zip(found, alone, strict=True):
            same(one, other)


def digests_of_cached(digests: dict[tuple[str, int], list[int]]) -> dict[tuple[str, int], list[int]]:
    """The digests in the order of the cached images."""
    return {name: each[:0:-1] for name, each in digests.items()}


@pytest.mark.parametrize("config", ORDERS, ids=str)
def test_the_rest_of_a_pass_reads_no_slice_twice(
    config: dict[str, Any], source: ShardSet, digests: dict[tuple[str, int], list[int]]
) -> None:
    order = order_of(**config)
    for step in range(order.steps_per_epoch):
        order.step, reader = step, CountingReader(source, digests)
        views = replayed(reader, source, order)
        for _ in views.prepared(order.plan(order.steps_per_epoch)):
            views._in_flight.clear()
        views._slices.pool.shutdown()
        assert set(reader.reads.values()) == {1}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("config", ORDERS, ids=str)
def test_no_more_slices_are_in_memory_than_those_kept_and_those_in_flight(
    config: dict[str, Any],
    workers: int,
    source: ShardSet,
    digests: dict[tuple[str, int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replay, "_AHEAD", 1)  # otherwise all of so few shards are in flight
    order, reader = order_of(batch_size=6, **config), CountingReader(source, digests)
    views = replayed(reader, source, order)
    last = 4 * order.steps_per_epoch
    loader = LoaderConfig(workers=workers, prefetch=1)
    k = order.order.views_per_decode
    for _ in batches(views.pixels, order.plan(last), loader, batches_per_entry=k, rank_part=views):
        pass
    needed = [{(s, v) for s, _, v, _ in entry.reshape(-1, 4).tolist()} for entry in order.plan(last)]
    flying = 2 + replay._AHEAD + workers  # one is being requested, and one is at the consumer
    in_flight = max(len(set().union(*needed[first : first + flying])) for first in range(len(needed)))
    assert reader.most_alive <= len(order.lanes) * order.slices_per_lane + in_flight < sum(reader.reads.values())
    held = reader.alive
    assert held <= len(order.lanes) * order.slices_per_lane
    del views
    assert reader.alive == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_slice_stops_the_batch_that_needs_it_and_no_other(
    workers: int, source: ShardSet, digests: dict[tuple[str, int], list[int]]
) -> None:
    order = order_of(shuffle_units=1, views_per_epoch=1)
    last = order.steps_per_epoch
    plan = [items for _, items in order.steps(last)]
    shard = int(plan[2][0, 0])
    first = next(number for number, items in enumerate(plan) if shard in items[:, 0])
    name = source.shards[shard].name
    loader = LoaderConfig(workers=workers)

    def run(reader: CountingReader) -> int:
        views = replayed(reader, source, order)
        count = 0
        for _ in batches(views.pixels, order.plan(last), loader, rank_part=views):
            count += 1
            counts.append(count)
        return count

    counts: list[int] = []
    reader = CountingReader(source, digests)
    reader.damaged = {("layer", name, 1), (VIEWS, name, 0)}  # another view, and digests that are not compared
    assert run(reader) == last
    for damage in ({"damaged": {("layer", name, 0)}}, {"damaged_keys": {name}}):
        counts.clear()
        reader = CountingReader(source, digests)
        vars(reader).update(damage)
        with pytest.raises(CacheCorrupt, match=name):
            run(reader)
        assert len(counts) == first > 0  # all batches before it


@pytest.mark.parametrize("workers", [0, 1])
def test_digests_that_are_due_are_compared_in_their_low_bits(
    workers: int, source: ShardSet, digests: dict[tuple[str, int], list[int]]
) -> None:
    stored = digests_of_cached(digests)
    name = source.shards[3].name
    stored[name, 2] = [value ^ 1 if image == 1 else value for image, value in enumerate(stored[name, 2])]
    items = np.array([[3, image, 2, number] for number, image in enumerate((0, 2, 1, 3))])
    loader = LoaderConfig(workers=workers)
    for verify in (VerifyConfig(first=2, every=0), VerifyConfig(first=0, every=3), NO_CHECK):
        views = replayed(CountingReader(source, stored), source, verify=verify)
        assert len(list(batches(views.pixels, [items], loader, rank_part=views))) == 1
    for verify in (VerifyConfig(first=3, every=0), VerifyConfig(first=0, every=2)):
        views = replayed(CountingReader(source, stored), source, verify=verify)
        with pytest.raises(ViewMismatch, match=f"of shard {name}, view 2") as caught:
            list(batches(views.pixels, [items], loader, rank_part=views))
        assert f"'{source.shards[3].members().keys[3]}'" in caught.value.what
        assert caught.value.expected == f"digest {stored[name, 2][1]:08x}"


def test_digests_are_read_only_where_one_is_due(source: ShardSet, digests: dict[tuple[str, int], list[int]]) -> None:
    reader = CountingReader(source, digests_of_cached(digests))
    items = np.array([[shard, 0, shard % 4, shard] for shard in range(8)])
    replayed(reader, source, verify=VerifyConfig(first=1, every=4)).batch(items)
    assert {name for name in reader.reads if name[0] == VIEWS} == {
        (VIEWS, source.shards[shard].name, 0) for shard in (0, 4)
    }


def test_workers_get_no_unit(source: ShardSet, digests: dict[tuple[str, int], list[int]]) -> None:
    views = replayed(CountingReader(source, digests), source)
    alone = ImageViews(source.shards, RandomViews(LAW), LAW.seed)
    assert len(pickle.dumps(views.pixels)) < len(pickle.dumps(alone)) + 1000


def test_a_killed_worker_is_named_with_a_remedy(source: ShardSet, digests: dict[tuple[str, int], list[int]]) -> None:
    order = order_of()
    views = replayed(CountingReader(source, digests), source, order)
    loader = LoaderConfig(workers=1, prefetch=1)
    before = set(multiprocessing.active_children())  # of tests whose generators are not collected yet
    stream = batches(views.pixels, order.plan(10**6), loader, rank_part=views)
    next(stream)
    (worker,) = [child for child in multiprocessing.active_children() if child.daemon and child not in before]
    os.kill(worker.pid or 0, signal.SIGKILL)
    with pytest.raises(LoaderKilled, match=r"killed by SIGKILL\n  got: worker 1 of 1, process \d+\n  hint: .*memory"):
        list(stream)
