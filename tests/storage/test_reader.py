"""A reader returns checked content or an error."""

import json
import pickle
import random
import shutil
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.storage.atomic import digest_hex
from tinymim.storage.blocks import decode_arrays, encode_arrays, unzipped
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.reader import CacheReader
from tinymim.storage.writer import CacheWriter
from tinymim.tests.storage import tiny
from tinymim.tests.storage.tiny import CLS, REL

NUM_FLIPS = 50
RECORDED = tiny.COMMITTED_CACHE.with_name("cache_v2_arrays.json")  # digests of every array of the committed cache


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
    assert [len(reader.units(layer)) for layer in (VIEWS, REL, CLS)] == [3, 3, 1]
    for layer in (VIEWS, REL, CLS):
        for info in reader.units(layer):
            arrays, stored = tiny.make_arrays(layer, info.unit), reader.read_views(info)
            assert list(reader.arrays(layer)) == sorted(arrays) == sorted(stored)
            assert info.num_records == 3 * info.unit.num_views
            assert info.statistics["kept_mass"] == 0.25 * info.unit.num_views
            assert (info.constants is None) == (layer != CLS)
            for name, values in arrays.items():
                assert stored[name].dtype == values.dtype
                np.testing.assert_array_equal(stored[name], values)
    for shard in reader.manifest.shards:
        assert reader.keys(shard) == tiny.make_keys(shard)
    constants = reader.constants(CLS)
    assert constants is not None
    for name, values in tiny.make_constants().items():
        np.testing.assert_array_equal(constants[name], values)


def test_round_trip(made_cache: Path) -> None:
    check_values(made_cache)


def test_the_committed_version_2_cache_stays_readable_to_the_byte() -> None:
    check_values(tiny.COMMITTED_CACHE)
    reader = CacheReader(tiny.COMMITTED_CACHE)
    assert reader.manifest == tiny.make_manifest()
    assert reader.layers == {name: tiny.make_layer(name=name) for name in (CLS, REL)}
    found = {}
    for layer in (VIEWS, REL, CLS):
        for info in reader.units(layer):
            for name, values in reader.read_views(info).items():
                label = f"{layer} {info.unit} {name} {values.dtype} {list(values.shape)}"
                found[label] = digest_hex(values.tobytes())
    for name, values in (reader.constants(CLS) or {}).items():
        found[f"{CLS} constants {name} {values.dtype} {list(values.shape)}"] = digest_hex(values.tobytes())
    assert found == json.loads(RECORDED.read_bytes())


@pytest.mark.skipif(numcodecs.__version__ != tiny.MADE_WITH_NUMCODECS, reason="another zstd may compress otherwise")
def test_the_committed_version_2_cache_is_rewritten_byte_for_byte(made_cache: Path) -> None:
    assert tiny.tree(made_cache) == tiny.tree(tiny.COMMITTED_CACHE)


def test_plain_zarr_reads_every_array_and_the_groups() -> None:
    root = zarr.open_group(tiny.COMMITTED_CACHE, mode="r")
    assert root.attrs["tinymim"]["format_version"] == 2  # type: ignore[index,call-overload]
    layer = zarr.open_group(tiny.COMMITTED_CACHE / "layers" / REL, mode="r")
    assert layer.attrs["tinymim"]["target"]["taps"] == ["qkv@2"]  # type: ignore[index,call-overload]
    seen = 0
    for path in tiny.COMMITTED_CACHE.rglob("v*.zip"):
        first, last = map(int, path.stem[1:].split("-"))
        unit, name = UnitId(f"{path.parent.name}.tar", first, last - first + 1), path.parts[-3]
        group = zarr.open_group(ZipStore(path, mode="r"), mode="r")
        for array, values in tiny.make_arrays(name, unit).items():
            np.testing.assert_array_equal(group[array][...], values)  # type: ignore[index]
            seen += 1
        if name == VIEWS and first == 0:
            joined, ends = (np.asarray(group[key][...]).tolist() for key in ("key_bytes", "key_ends"))  # type: ignore[index]
            starts = [0, *ends[:-1]]
            keys = [bytes(joined[a:b]).decode() for a, b in zip(starts, ends, strict=True)]
            assert keys == tiny.make_keys(unit.shard)
    assert seen == 3 + 2 * 3 + 2


def test_some_views_and_arrays_are_those_of_the_whole(made_cache: Path) -> None:
    reader = CacheReader(made_cache)
    info = reader.units(REL)[0]
    whole = reader.read_views(info)
    for views in ([0], [1], [0, 1], [1, 0], []):
        part = reader.read_views(info, views)
        assert all(np.array_equal(values, whole[name][views]) for name, values in part.items())
        assert part["qk_index"].shape == (len(views), 3, 3, 4, 2)
    assert list(reader.read_views(info, [1], ["qk_scale"])) == ["qk_scale"]
    assert reader.read_views(info, [1], []) == {}
    with pytest.raises(CacheCorrupt, match=r"it does not hold \['nonsense'\]"):
        reader.read_views(info, [1], ["nonsense"])
    with pytest.raises(CacheCorrupt, match=r"it does not hold \[1, 2\]"):
        reader.read_views(info, [1, 2])


def test_coverage_and_size_of_a_partial_cache(made_cache: Path) -> None:
    reader = CacheReader(made_cache)
    coverage = reader.coverage(REL)
    assert not coverage.complete
    assert str(coverage) == "2 of 2 shards with 2 to 3 views of each image, 15 records"
    assert (coverage.complete_views, coverage.most_views, coverage.num_images) == (2, 3, 6)
    partial = reader.coverage(CLS)
    assert (partial.begun_shards, partial.complete_shards, partial.complete_views) == (1, 1, 2)
    sizes = reader.bytes_by_component()
    assert sum(sum(each.values()) for each in sizes.values()) == sum(map(len, tiny.tree(made_cache).values()))
    assert sizes[REL]["records"] > sizes[VIEWS]["records"] > 0 and sizes[VIEWS]["keys"] > sizes[REL]["keys"] == 0


def test_a_layer_is_found_by_name_or_because_it_is_the_only_one(made_cache: Path, tmp_path: Path) -> None:
    reader = CacheReader(made_cache)
    assert reader.layer(CLS).name == CLS
    with pytest.raises(UserError, match=r"has 2 target layers\n  got: cls, rel"):
        reader.layer()
    with pytest.raises(UserError, match=r"has no layer nothing\n  got: cls, rel"):
        reader.units("nothing")
    CacheWriter.open(tmp_path / "none", tiny.make_manifest()).close()
    with pytest.raises(UserError, match="no target layer"):
        CacheReader(tmp_path / "none").layer()


def test_pickled_reader_reads_the_same(made_cache: Path) -> None:
    reader = CacheReader(made_cache)
    reader.units(REL)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.units(REL) == reader.units(REL) and copy.units() == reader.units()
    theirs, ours = copy.read_views(copy.units(REL)[0]), reader.read_views(reader.units(REL)[0])
    assert all(np.array_equal(values, theirs[name]) for name, values in ours.items())


def test_flipped_bits_are_found_and_named(cache: Path) -> None:
    rng = random.Random(1)
    reader = CacheReader(cache)
    for _ in range(NUM_FLIPS):
        info = rng.choice([info for layer in (VIEWS, REL, CLS) for info in reader.units(layer)])
        places = info.parts.places()
        number = rng.randrange(info.unit.num_views)
        path, view = cache / info.path, number + info.unit.first_view
        intact = path.read_bytes()
        path.write_bytes(tiny.changed(intact, rng.randrange(places[number], places[number + 1]), 1 << rng.randrange(8)))
        owner = rf"unit {info.unit} of layer {info.layer} of .*: view {view} .*checksum\n *hint: .*repair"
        with pytest.raises(CacheCorrupt, match=owner):
            reader.read_views(info)
        path.write_bytes(intact)
        reader.read_views(info)


def test_damaged_or_foreign_commit_records_are_refused(cache: Path) -> None:
    path = cache / "layers/rel/train-000/v0-1.json"
    intact = path.read_text()
    for damaged in (
        intact[:-20],
        "[]",
        intact.replace('"num_images": 3', '"num_images": 2'),
        intact.replace('"kept_mass": 0.5', '"kept_mass": 0.6'),
    ):
        path.write_text(damaged)
        with pytest.raises(CacheCorrupt, match=r"rel/train-000/v0-1\.json is damaged"):
            CacheReader(cache).units(REL)
        assert len(CacheReader(cache).units()) == 3  # other layers are as they were
    path.write_text(intact.replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(CacheMismatch, match="format_version"):
        CacheReader(cache).units(REL)
    for other, text in (
        ("layers/rel/train-000/v2-2.json", r"it is about train-000\.tar v2-2 of layer rel"),
        ("layers/rel/train-001/v0-1.json", "does not belong to the cache's manifest|it is about train-001"),
        ("layers/cls/train-000/v0-1.json", "does not belong"),
        ("views/train-000/v0-1.json", "does not belong"),
    ):
        shutil.copy(cache / other, path)
        with pytest.raises(CacheCorrupt, match=text):
            CacheReader(cache).units(REL)


def test_foreign_files_beside_commit_records_are_ignored(cache: Path) -> None:
    """A synchronising folder and macOS leave such files; they must not stop anybody."""
    folder = cache / "layers/rel/train-000"
    for name in ("._v0-1.json", "v0-1 (conflicted copy).json", "v00-1.json", "v1-0.json", ".DS_Store", "v0-1.json~"):
        (folder / name).write_bytes(b"\0")
    (folder / "v9-9").mkdir()
    (cache / "layers/rel/other").mkdir()
    (cache / "layers/rel/other/v0-1.json").write_bytes(b"\0")
    (folder / "v5-5 (copy).zip").write_bytes(b"mine")
    check_values(cache)
    manifest, layer = tiny.make_manifest(), tiny.make_layer()
    with CacheWriter.open(cache, manifest, [layer]) as writer:
        tiny.write_units(writer, [UnitId("train-000.tar", 3, 1)])
    assert (folder / "v5-5 (copy).zip").read_bytes() == b"mine"


def test_record_of_another_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    other, manifest = tmp_path / "other", tiny.make_manifest(views={"seed": 9})
    with CacheWriter.open(other, manifest, [tiny.make_layer(manifest)]) as writer:
        tiny.write_units(writer, [UnitId("train-000.tar", 0, 2)])
    for layer, folder in ((VIEWS, "views"), (REL, "layers/rel")):
        shutil.copy(other / folder / "train-000/v0-1.json", cache / folder / "train-000/v0-1.json")
        with pytest.raises(CacheCorrupt, match="does not belong"):
            CacheReader(cache).units(layer)


def test_units_that_share_views_are_refused(cache: Path) -> None:
    with CacheWriter.open(cache, tiny.make_manifest(), [tiny.make_layer()]) as writer:
        writer.of_shard = lambda layer, shard: []  # type: ignore[method-assign]
        tiny.write_units(writer, [UnitId("train-000.tar", 1, 3)])
    with pytest.raises(CacheCorrupt, match=r"train-000\.tar v0-1 and train-000\.tar v1-3 of layer rel .* share views"):
        CacheReader(cache).units(REL)


def test_units_without_images_are_units(tmp_path: Path) -> None:
    """No image of a shard is readable."""
    empty = UnitId("train-001.tar", 0, 3)
    manifest = tiny.make_manifest(num_samples=100)
    with CacheWriter.open(tmp_path, manifest, [tiny.make_layer(), tiny.make_layer(name=CLS)]) as writer:
        tiny.write_units(writer, [UnitId("train-000.tar", 0, 3)], num_images=90)
        tiny.write_units(writer, [empty], num_images=0)
    reader = CacheReader(tmp_path)
    assert reader.keys(empty.shard) == [] and len(reader.keys("train-000.tar")) == 90
    for layer in (VIEWS, REL, CLS):
        info = reader.units(layer)[1]
        stored = reader.read_views(info)
        assert info.num_images == 0 and {values.shape[:2] for values in stored.values()} == {(3, 0)}
        assert reader.read_views(info, [2], []) == {}
        group = zarr.open_group(ZipStore(tmp_path / info.path, mode="r"), mode="r")
        for name, values in stored.items():
            found = group[name]
            assert isinstance(found, zarr.Array) and found.shape == values.shape and found.dtype == values.dtype
    assert reader.coverage(REL).num_records == 270


@pytest.mark.parametrize("shape", [(1,), (64, 3), (65, 2, 3), (0, 5), (7, 0)])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "float32"])
def test_whole_arrays_are_what_zarr_reads(shape: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    size = int(np.prod(shape))
    values = (np.arange(size) * 7919 % 251).astype(dtype).reshape(shape)
    data = encode_arrays({"values": values})
    got = decode_arrays(unzipped(data))["values"]
    assert got.dtype == values.dtype and np.array_equal(got, values)
    (tmp_path / "a.zip").write_bytes(data)
    stored = zarr.open_group(ZipStore(tmp_path / "a.zip", mode="r"), mode="r")["values"]
    assert isinstance(stored, zarr.Array) and np.array_equal(np.asarray(stored[...]), values)


def test_a_reader_is_a_snapshot(cache: Path) -> None:
    reader, late = CacheReader(cache), CacheReader(cache)
    assert len(reader.units(REL)) == 3
    with CacheWriter.open(cache, tiny.make_manifest(), [tiny.make_layer()]) as writer:
        tiny.write_units(writer, [UnitId("train-001.tar", 2, 1)])
    assert len(reader.units(REL)) == 3 and len(late.units(REL)) == len(CacheReader(cache).units(REL)) == 4
