"""I9: a read of k views costs k records, whatever the unit holds, and every byte of it is checked."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinymim.configs.errors import CacheCorrupt
from tinymim.storage import objects
from tinymim.storage.commit import UnitInfo, holds_keys
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.reader import CacheReader
from tinymim.storage.writer import CacheWriter
from tinymim.tests import s3_server
from tinymim.tests.storage import tiny
from tinymim.tests.storage.tiny import CLS, REL

IMAGES = 1000
UNIT_VIEWS = (1, 4, 16, 64, 300)
MOST = 1.1  # bytes read per view, of its own stored bytes


def make_cache(place: Path | str, num_views: int) -> None:
    """A unit of 1,000 images."""
    manifest = tiny.make_manifest(1, num_samples=IMAGES)
    with CacheWriter.open(place, manifest, [tiny.make_layer(manifest)]) as writer:
        tiny.write_units(writer, [UnitId("train-000.tar", 0, num_views)], IMAGES, views_per_part=8)


def choices(num_views: int) -> list[list[int]]:
    """k = 1, 4 and all of V views: apart, adjacent, first and last."""
    spread = sorted({0, num_views // 3, num_views // 2, num_views - 1})
    last = list(range(max(0, num_views - 4), num_views))
    return [[0], [num_views // 2], [num_views - 1], spread, last, list(range(num_views))]


def runs_of(views: list[int]) -> int:
    return sum(view - 1 not in views for view in views)


@pytest.fixture
def preads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Offset and size of every pread."""
    found: list[tuple[int, int]] = []
    real = os.pread

    def pread(fd: int, size: int, offset: int) -> bytes:
        found.append((offset, size))
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    return found


@pytest.mark.parametrize("num_views", UNIT_VIEWS)
def test_bytes_and_requests_of_a_read_from_disk(tmp_path: Path, num_views: int, preads: list[tuple[int, int]]) -> None:
    make_cache(tmp_path, num_views)
    reader = CacheReader(tmp_path)
    for layer in (VIEWS, REL):
        [info] = reader.units(layer)
        for views in choices(num_views):
            preads.clear()
            reader.read_views(info, views)
            # One pass over the file per run of adjacent views, a view at a time.
            jumps = [ours for before, ours in itertools.pairwise(preads) if ours[0] != sum(before)]
            assert len(preads) == len(views) and 1 + len(jumps) == runs_of(views)
            check_bytes(info, views, sum(size for _, size in preads))


@pytest.mark.parametrize("num_views", UNIT_VIEWS)
def test_bytes_and_requests_of_a_read_from_an_object_store(served: s3_server.Log, num_views: int) -> None:
    make_cache(PLACE, num_views)
    reader = CacheReader(PLACE)
    for layer in (VIEWS, REL):
        [info] = reader.units(layer)
        for views in choices(num_views):
            served.clear()
            reader.read_views(info, views)
            assert len(served.gets) == runs_of(views)
            check_bytes(info, views, sum(get.end - get.start for get in served.gets))


@pytest.mark.parametrize("num_views", UNIT_VIEWS)
def test_a_pass_over_views_reads_each_once(tmp_path: Path, num_views: int, preads: list[tuple[int, int]]) -> None:
    make_cache(tmp_path, num_views)
    reader = CacheReader(tmp_path)
    for info in (reader.units(layer)[0] for layer in (VIEWS, REL)):
        for views in choices(num_views):
            expected = reader.read_views(info, views)
            preads.clear()
            for row, (view, found) in enumerate(reader.each_view(info, views)):
                assert view == views[row] and len(preads) == row + 1  # nothing is read before it is wanted
                assert_equal(found, {name: values[row] for name, values in expected.items()})
            check_bytes(info, views, sum(size for _, size in preads))
    assert [list(found) for _, found in reader.each_view(info, [0], ["qk_scale"])] == [["qk_scale"]]
    with pytest.raises(CacheCorrupt, match="it does not hold"):
        next(reader.each_view(info, [num_views]))


def test_a_pass_over_an_object_store_fetches_some_views_a_request(
    served: s3_server.Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(PLACE, 16)
    reader = CacheReader(PLACE)
    [info] = reader.units(REL)
    largest = max(block.size_bytes for block in info.parts.views)
    for room, requests in ((5 * largest, 4), (1, 16), (2**25, 1)):  # of 16 views: 5 + 5 + 5 + 1, one by one, all
        monkeypatch.setattr("tinymim.storage.reader._RUN_BYTES", room)
        served.clear()
        assert [view for view, _ in reader.each_view(info)] == list(range(16))
        assert len(served.gets) == requests
        check_bytes(info, list(range(16)), sum(get.end - get.start for get in served.gets))


def check_bytes(info: UnitInfo, views: list[int], read: int) -> None:
    """Bytes read per view: those of its own records, within MOST."""
    own = sum(info.parts.views[view].size_bytes for view in views)
    assert own <= read <= MOST * own
    # The records themselves, without the names and checksums of zip members, which a unit of one view has too.
    members = 2 if info.layer == REL else 1
    assert read <= MOST * (own - members * len(views) * (30 + len("qk_index/c/100/0/0/0/0"))) + 200 * len(views)


def test_a_view_of_a_large_unit_costs_what_a_one_view_unit_costs(tmp_path: Path, preads: list[tuple[int, int]]) -> None:
    costs = {}
    for num_views in UNIT_VIEWS:
        make_cache(tmp_path / str(num_views), num_views)
        reader = CacheReader(tmp_path / str(num_views))
        preads.clear()
        reader.read_views(reader.units(REL)[0], [num_views // 2])
        costs[num_views] = sum(size for _, size in preads)
    assert max(costs.values()) <= 1.1 * costs[1], costs


def test_the_view_layer_is_small(tmp_path: Path) -> None:
    """At most 8 bytes a view, all included, beside the keys, which are stored once."""
    make_cache(tmp_path, 10)
    sizes = CacheReader(tmp_path).bytes_by_component()[VIEWS]
    on_disk = sum(path.stat().st_size for path in (tmp_path / "views" / "train-000").iterdir())
    assert on_disk <= 8 * 10 * IMAGES
    assert 4 <= sizes["records"] / (10 * IMAGES) < 4.2


def test_a_unit_is_two_objects_in_each_layer(tmp_path: Path, served: s3_server.Log) -> None:
    for place, folder in ((tmp_path / "cache", tmp_path / "cache"), (PLACE, tmp_path / "bucket/cache")):
        make_cache(place, 64)
        for layer in ("views", "layers/rel"):
            assert sorted(item.name for item in (folder / layer / "train-000").iterdir()) == ["v0-63.json", "v0-63.zip"]
        assert sum(item.is_file() for item in folder.rglob("*")) == 2 * 2 + 4


# ---- every byte that is read is compared


def test_every_byte_of_a_unit_in_turn(tmp_path: Path) -> None:
    """Flip each byte, read each view alone, and the keys: refused if and only if the byte is of that part."""
    tiny.make_tiny_cache(tmp_path)
    reader, flips = CacheReader(tmp_path), 0
    for layer in (VIEWS, REL, CLS):
        info = reader.units(layer)[0]
        path, places = tmp_path / info.path, info.parts.places()
        intact = path.read_bytes()
        expected = {view: reader.read_views(info, [view]) for view in info.unit.views}
        for at in range(len(intact)):
            path.write_bytes(tiny.changed(intact, at, 1 << at % 8))
            flips += 1
            for view in info.unit.views:
                if places[view] <= at < places[view + 1]:
                    owner = rf"^unit train-000\.tar v0-1 of layer {layer} of .*: view {view} "
                    with pytest.raises(CacheCorrupt, match=owner):
                        reader.read_views(info, [view])
                else:
                    assert_equal(reader.read_views(info, [view]), expected[view])
            if holds_keys(layer, info.unit):
                if info.parts.head.size_bytes <= at < places[0]:
                    with pytest.raises(CacheCorrupt, match=r"^unit train-000\.tar v0-1 of layer views .*: the keys "):
                        reader.read_keys(info)
                else:
                    assert reader.read_keys(info) == tiny.make_keys(info.unit.shard)
        path.write_bytes(intact)
    assert flips > 5000


def test_a_cut_file_serves_the_views_before_the_cut(tmp_path: Path) -> None:
    make_cache(tmp_path, 16)
    reader = CacheReader(tmp_path)
    [info] = reader.units(REL)
    path, places = tmp_path / info.path, info.parts.places()
    expected = reader.read_views(info)
    with open(path, "r+b") as file:
        file.truncate(places[9] + 5)
    assert_equal(reader.read_views(info, range(9)), {name: values[:9] for name, values in expected.items()})
    for views in ([9], [3, 9], range(16)):
        with pytest.raises(CacheCorrupt, match="view 9 is cut short"):
            reader.read_views(info, views)


def test_views_in_any_order_and_number(tmp_path: Path) -> None:
    make_cache(tmp_path, 4)
    reader = CacheReader(tmp_path)
    [info] = reader.units(REL)
    whole = reader.read_views(info)
    for count in range(5):
        for views in itertools.permutations(range(4), count):
            expected = {name: values[list(views)] for name, values in whole.items()}
            assert_equal(reader.read_views(info, views), expected)


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name])


PLACE = f"s3://{s3_server.BUCKET}/cache"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3_server.Log]:
    """The log of an S3 server."""
    (tmp_path / "bucket").mkdir()
    with s3_server.served(tmp_path / "bucket", writable=True) as (endpoint, log):
        for name, value in s3_server.environment(endpoint).items():
            monkeypatch.setenv(name, value)
        objects._connect.cache_clear()
        yield log
    objects._connect.cache_clear()
