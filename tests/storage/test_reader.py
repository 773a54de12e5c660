"""A reader returns checked content or an error."""

import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from tinymim.configs.errors import CacheCorrupt, CacheMismatch
from tinymim.storage import layout
from tinymim.storage.layout import UnitId
from tinymim.storage.reader import CacheReader
from tinymim.storage.writer import CacheWriter
from tinymim.tests.storage import tiny

NUM_FLIPS = 50


@pytest.fixture(scope="module")
def made_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made")
    tiny.make_tiny_cache(path)
    return path


@pytest.fixture
def cache(made_cache: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made_cache, tmp_path / "cache"))


def check_values(path: Path) -> None:
    reader = CacheReader(path)
    assert len(reader.units()) == 3
    for info in reader.units():
        keys, arrays = tiny.make_unit(info.unit)
        records = reader.read_unit(info)
        assert records.keys == keys

        assert info.arrays == sorted(arrays) == list(records.arrays)
        assert info.num_records == len(keys) * info.unit.num_views
        assert info.statistics["kept_mass"] == 0.25 * info.unit.num_views
        for name, values in arrays.items():
            assert records.arrays[name].dtype == values.dtype
            np.testing.assert_array_equal(records.arrays[name], values)


def test_round_trip(made_cache: Path) -> None:
    check_values(made_cache)


@pytest.mark.parametrize("name", ["cache_v1", "cache_v1_first"])
def test_committed_version_1_caches_stay_readable(name: str) -> None:
    """The first caches had no manifest digest, no checksums, and zarr's own layout of JSON."""
    place = tiny.COMMITTED_CACHE.with_name(name)
    check_values(place)
    assert CacheReader(place).manifest == tiny.make_manifest()


def test_a_flipped_byte_of_a_first_cache_is_found(tmp_path: Path) -> None:
    place = shutil.copytree(tiny.COMMITTED_CACHE.with_name("cache_v1_first"), tmp_path / "cache")
    path = place / "units/train-000/v0-1/qk_index/c/0/0/0/0"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    reader = CacheReader(place)
    with pytest.raises(CacheCorrupt, match="does not have its committed digest"):
        reader.read_unit(reader.units()[0])


@pytest.mark.skipif(zarr.__version__ != tiny.MADE_WITH_ZARR, reason="other zarr versions may order JSON otherwise")
def test_committed_version_1_cache_is_rewritten_byte_for_byte(made_cache: Path) -> None:
    assert tiny.tree(made_cache) == tiny.tree(tiny.COMMITTED_CACHE)


def test_plain_zarr_reads_every_array() -> None:
    root = zarr.open_group(tiny.COMMITTED_CACHE, mode="r")
    assert root.attrs["tinymim"]["format_version"] == 1  # type: ignore[index,call-overload]
    members = dict(zarr.open_group(tiny.COMMITTED_CACHE / "units", mode="r").members(max_depth=None))
    arrays = {name: member for name, member in members.items() if isinstance(member, zarr.Array)}
    assert len(arrays) == 3 * 7
    _, expected = tiny.make_unit(UnitId("train-000.tar", 0, 2))
    for name, values in expected.items():
        np.testing.assert_array_equal(arrays[f"train-000/v0-1/{name}"][...], values)


def test_row_order_keeps_the_views_of_an_image_together(made_cache: Path) -> None:
    reader = CacheReader(made_cache)
    both, last = reader.read_unit(reader.units()[0]), reader.read_unit(reader.units()[1])
    assert [both.unit.row(image, view) for image in range(3) for view in (0, 1)] == list(range(6))
    assert [last.unit.row(image, 2) for image in range(3)] == [0, 1, 2]


def test_one_array_is_read_without_touching_the_others(cache: Path) -> None:
    shutil.rmtree(cache / "units/train-000/v0-1/qk_index")
    reader = CacheReader(cache)
    records = reader.read_unit(reader.units()[0], arrays=["box"])
    assert list(records.arrays) == ["box"]
    with pytest.raises(CacheCorrupt, match="no array nonsense"):
        reader.read_unit(reader.units()[0], arrays=["nonsense"])


def test_coverage_and_size_of_a_partial_cache(made_cache: Path) -> None:
    reader = CacheReader(made_cache)
    coverage = reader.coverage()
    assert not coverage.complete
    assert str(coverage) == "1 of 2 shards complete, 15 of 18 views cached, 15 records"
    sizes = reader.bytes_by_component()
    assert sum(sizes.values()) == sum(map(len, tiny.tree(made_cache).values()))
    assert sizes["qk_index"] > 0


def test_pickled_reader_reads_the_same(made_cache: Path) -> None:
    reader = CacheReader(made_cache)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.units() == reader.units()
    assert copy.read_unit(copy.units()[0]).keys == reader.read_unit(reader.units()[0]).keys


@pytest.mark.parametrize("verify", [True, False])
def test_flipped_bits_are_found_and_named(cache: Path, verify: bool) -> None:
    """Without `verify` the checksum finds them."""
    rng = random.Random(1)
    reader = CacheReader(cache)
    for _ in range(NUM_FLIPS):
        info = rng.choice(reader.units())
        name = rng.choice([name for name in info.files if "/c/" in name])
        path = cache / "units" / info.unit.shard[:-4] / info.unit.view_range / name
        intact = path.read_bytes()
        damaged = bytearray(intact)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CacheCorrupt, match=f"unit {info.unit} .*{name.split('/')[0]}.*\n *hint: .*repair"):
            reader.read_unit(info, verify=verify)
        path.write_bytes(intact)
    for info in reader.units():
        reader.read_unit(info, verify=verify)


@pytest.mark.parametrize("array", ["key_bytes", "flip", "qk_index"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "metadata"])
def test_lost_bytes_are_found_and_named(cache: Path, array: str, damage: str) -> None:
    folder = cache / "units/train-000/v0-1" / array
    payload = next(path for path in (folder / "c").rglob("*") if path.is_file())
    if damage == "cut":
        payload.write_bytes(payload.read_bytes()[:-1])
    elif damage == "empty":
        payload.write_bytes(b"")
    elif damage == "gone":
        payload.unlink()
    else:
        text = (folder / "zarr.json").read_text()
        (folder / "zarr.json").write_text(text.replace('"fill_value":0', '"fill_value":1'))
    reader = CacheReader(cache)
    with pytest.raises(CacheCorrupt, match=rf"unit train-000.tar v0-1 .*{array}"):
        reader.read_unit(reader.units()[0], verify=False)


def test_damaged_or_foreign_commit_records_are_refused(cache: Path) -> None:
    path = cache / "commits" / "train-000.v0-1.json"
    intact = path.read_text()
    for damaged in (
        intact[:-20],
        "[]",
        intact.replace('"num_images": 3', '"num_images": 2'),
        intact.replace('"kept_mass": 0.5', '"kept_mass": 0.6'),
    ):
        path.write_text(damaged)
        with pytest.raises(CacheCorrupt, match=r"train-000\.v0-1\.json is damaged"):
            CacheReader(cache)
    path.write_text(intact.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CacheMismatch, match="format_version"):
        CacheReader(cache)
    path.unlink()
    shutil.copy(cache / "commits" / "train-000.v2-2.json", path)
    with pytest.raises(CacheCorrupt, match=r"it is about train-000\.tar v2-2"):
        CacheReader(cache)


def test_record_of_another_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with CacheWriter.open(other, tiny.make_manifest(views={"seed": 9})) as writer:
        tiny.write_units(writer, [UnitId("train-000.tar", 0, 2)])
    shutil.copy(other / "commits" / "train-000.v0-1.json", cache / "commits" / "train-000.v0-1.json")
    with pytest.raises(CacheCorrupt, match="does not belong"):
        CacheReader(cache)


def test_large_and_empty_units(tmp_path: Path) -> None:
    large, empty = UnitId("train-000.tar", 0, 3), UnitId("train-001.tar", 0, 3)
    with CacheWriter.open(tmp_path, tiny.make_manifest(num_samples=100)) as writer:
        tiny.write_units(writer, [large], num_images=90)  # 270 records: several inner chunks, the last one short
        tiny.write_units(writer, [empty], num_images=0)
    reader = CacheReader(tmp_path)
    records, nothing = (reader.read_unit(info) for info in reader.units())
    for name, values in tiny.make_unit(large, 90)[1].items():
        np.testing.assert_array_equal(records.arrays[name], values)
    assert nothing.keys == []
    assert nothing.arrays["box"].shape == (0, 4)
    array = zarr.open_array(tmp_path / "units/train-000/v0-2/qk_index", mode="r")
    assert (array.chunks, array.shards) == ((64, 3, 4, 2), (320, 3, 4, 2))


@pytest.mark.parametrize("shape", [(1,), (64, 3), (65, 2, 3), (130, 4), (0, 5), (7, 0)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64", "float16", "float32"])
def test_checked_arrays_are_what_zarr_reads(shape: tuple[int, ...], dtype: str) -> None:
    size = int(np.prod(shape))
    values = (np.arange(size) * 7919 % 251).astype(dtype).reshape(shape)
    files = layout.encode_array("values", values)
    got = layout.decode_array("values", files, len(values))
    assert got.dtype == values.dtype and np.array_equal(got, values)
    store = MemoryStore({path: Buffer.from_bytes(data) for path, data in files.items()}, read_only=True)
    assert np.array_equal(np.asarray(zarr.open_array(store, path="values", mode="r")[...]), values)


def test_checked_arrays_of_other_codecs_are_refused() -> None:
    files = layout.encode_array("values", np.arange(9, dtype="u1"))
    files["values/zarr.json"] = files["values/zarr.json"].replace(b"zstd", b"gzip")
    with pytest.raises(ValueError, match="not those of format version 1"):
        layout.decode_array("values", files, 9)


def test_units_in_a_row_are_what_they_are_one_by_one(made_cache: Path, cache: Path) -> None:
    reader = CacheReader(made_cache)
    for streamed, info in zip(reader.read_units(arrays=["box", "qk_index"]), reader.units(), strict=True):
        alone = reader.read_unit(info, ["box", "qk_index"])
        assert (streamed.unit, streamed.keys, list(streamed.arrays)) == (alone.unit, alone.keys, list(alone.arrays))
        assert all(np.array_equal(values, alone.arrays[name]) for name, values in streamed.arrays.items())
    assert [records.unit for records in reader.read_units(reader.units()[1:])] == [i.unit for i in reader.units()[1:]]
    (cache / "units/train-000/v2-2/flip/c/0").unlink()
    stream = CacheReader(cache).read_units()
    assert next(stream).unit.first_view == 0  # units before the damage are intact
    with pytest.raises(CacheCorrupt, match=r"train-000\.tar v2-2.*flip/c/0"):
        next(stream)
