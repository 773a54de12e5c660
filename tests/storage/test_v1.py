"""Format 1 is read exactly or refused. No code writes it any more, so all inputs are committed caches, or made of them.

The last code that wrote format 1 made `cache_v1_hidden` and `cache_v1_sketch`, with `tests/stages/tiny.py`:
`write_set(root, count=6, images_per_shard=4)`, then `cache_recipe(root, audit_views=2)` for the sketch, and
`cache_recipe(root, audit_views=2, codec={"name": "hidden", "bits": 4, "calibration_views": 6})` with `num_views` 2 and
then 3. It also read the records whose digests `cache_v1_records.json` holds. `cache_v1` and `cache_v1_first` are older;
their records are arithmetic.
"""

import ast
import copy
import json
import pickle
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs import Zstd
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.configs.taps import Shapes
from tinymim.storage import v1
from tinymim.storage.atomic import canonical_json, digest_hex
from tinymim.storage.store import open_store
from tinymim.storage.v1 import OldCache, decode_array, is_v1

DATA = Path(__file__).parents[1] / "data"
RECORDS = json.loads((DATA / "cache_v1_records.json").read_bytes())
NUM_FLIPS = 40
COMMIT = "commits/train-000.v0-1.json"
UNIT = "units/train-000/v0-1"
EXAMPLES = settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
Change = Callable[[dict[str, Any]], object]


def copied(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / name, tmp_path / name))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return copied("cache_v1", tmp_path)


@pytest.fixture
def hidden(tmp_path: Path) -> Path:
    return copied("cache_v1_hidden", tmp_path)


def form_of(values: npt.NDArray[Any]) -> str:
    return f"{values.dtype.str} {list(values.shape)} {digest_hex(values.tobytes())}"


def resign(path: Path, change: Change) -> None:
    """Change a record and give it a valid digest."""
    record = json.loads(path.read_bytes())
    del record["record_digest"]
    change(record)
    path.write_bytes(canonical_json({**record, "record_digest": digest_hex(canonical_json(record))}))


def reissue(path: Path, change: Change) -> None:
    """Change a manifest and give it a valid digest."""
    root = json.loads((path / "zarr.json").read_bytes())
    manifest = root["attributes"]["tinymim"]
    change(manifest)
    root["attributes"] = {"tinymim": manifest, "tinymim_digest": digest_hex(canonical_json(manifest))}
    (path / "zarr.json").write_bytes(canonical_json(root))


def forge(cache: Path, files: dict[str, bytes], **changes: Any) -> None:
    """Replace files of the first unit and fields of its record; every digest is valid."""

    def change(record: dict[str, Any]) -> None:
        for name, data in files.items():
            (cache / UNIT / name).write_bytes(data)
            record["files"][name] = {"size_bytes": len(data), "blake2b": digest_hex(data)}
        record.update(changes)

    resign(cache / COMMIT, change)


def encoded(name: str, values: npt.NDArray[Any], chunk: int | None = None) -> dict[str, bytes]:
    """An array as format 1 stores it, by zarr itself."""
    length, inner = max(len(values), 1), tuple(max(size, 1) for size in values.shape[1:])
    chunk = chunk or length
    files: dict[str, Any] = {}
    array = zarr.create_array(
        store=MemoryStore(files),
        name=name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(chunk, *inner),
        shards=(-(-length // chunk) * chunk, *inner),
        compressors=(ZstdCodec(level=1), Crc32cCodec()),
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    array[...] = values
    return {path: data.to_bytes() for path, data in files.items() if path.startswith(f"{name}/")}


def encoded_keys(data: bytes, ends: list[int]) -> tuple[dict[str, bytes], str]:
    """The files of `key_bytes` and `key_ends`, and their digest."""
    arrays = {"key_bytes": np.frombuffer(data, "u1"), "key_ends": np.array(ends, "<i8")}
    files = {path: file for name, values in arrays.items() for path, file in encoded(name, values).items()}
    return files, digest_hex(arrays["key_ends"].tobytes() + data)


def refusal(cache: Path, match: str, error: type[UserError] = CacheCorrupt) -> UserError:
    """The refusal of a cache or, if it opens, of its first unit; it gives a hint that this version can keep."""

    def read() -> None:
        opened = OldCache(cache)
        opened.read_unit(opened.units[0])

    with pytest.raises(error, match=match) as caught:
        read()
    assert caught.value.hint and "repair" not in caught.value.hint
    return caught.value


# ---- intact caches


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_committed_caches_decode_to_the_recorded_arrays(name: str) -> None:
    old = OldCache(DATA / name)
    assert [str(unit) for unit in old.units] == list(RECORDS[name]["units"])
    for unit in old.units:
        keys, arrays = old.read_unit(unit)
        expected = RECORDS[name]["units"][str(unit)]
        assert keys == expected["keys"] and len(keys) == unit.num_images
        assert {array: form_of(values) for array, values in arrays.items()} == expected["arrays"]
        assert list(arrays) == unit.arrays and {"box", "flip", "digest"} < set(arrays)
        assert all(values.dtype.isnative for values in arrays.values())
    constants = old.constants()
    found = None if constants is None else {array: form_of(values) for array, values in constants.items()}
    assert found == RECORDS[name]["constants"]


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_every_byte_is_counted(name: str) -> None:
    sizes = OldCache(DATA / name).bytes_by_component()
    assert sum(sizes.values()) == sum(path.stat().st_size for path in (DATA / name).rglob("*") if path.is_file())
    assert ("constants" in sizes) == (name == "cache_v1_hidden") and sizes["box"] > 0


def test_the_manifest_is_as_stored() -> None:
    manifest = OldCache(DATA / "cache_v1").manifest
    assert manifest == OldCache(DATA / "cache_v1_first").manifest
    assert manifest.spec_id == "1eb10fae5e655edc"
    assert manifest.block == 2 and manifest.shapes == Shapes(3, 64, 197, 1, (14, 14))
    stored = json.loads((DATA / "cache_v1" / "zarr.json").read_bytes())["attributes"]["tinymim"]
    assert manifest.model_dump() == stored and list(manifest.shards) == ["train-000.tar", "train-001.tar"]
    assert canonical_json(dict(manifest.views)) == canonical_json(stored["views"])  # 1.0 stays 1.0


def test_coverage_counts_what_is_committed(cache: Path) -> None:
    counts = {"num_shards": 2, "complete_shards": 1, "num_views": 18, "covered_views": 15, "num_records": 15}
    assert OldCache(cache).coverage() == counts | {"complete": False, "unreadable_views": 0}
    (cache / "commits/train-000.v2-2.json").unlink()
    shutil.copytree(cache / UNIT, cache / "units/train-000/v5-6")  # never committed
    for name in ("train-000.v2-2.json.partial", "notes.txt"):
        (cache / "commits" / name).write_text("{}")
    assert OldCache(cache).coverage()["complete_shards"] == 0
    assert [str(unit) for unit in OldCache(cache).units] == ["train-000.tar v0-1", "train-001.tar v0-1"]
    assert OldCache(DATA / "cache_v1_hidden").coverage()["complete"]


def test_a_pickled_cache_reads_the_same() -> None:
    old = OldCache(DATA / "cache_v1_hidden")
    again = pickle.loads(pickle.dumps(old))
    assert again.units == old.units and again.read_unit(again.units[0])[0] == old.read_unit(old.units[0])[0]


def test_units_without_images_are_read(cache: Path) -> None:
    arrays = {array: values[:0] for array, values in OldCache(cache).read_unit(OldCache(cache).units[0])[1].items()}
    files, digest = encoded_keys(b"", [])
    for array, values in arrays.items():
        files |= encoded(array, values)
    resign(cache / COMMIT, lambda record: record["files"].clear())
    forge(cache, files, num_images=0, num_records=0, key_digest=digest)
    old = OldCache(cache)
    keys, got = old.read_unit(old.units[0])
    assert keys == [] and {array: form_of(got[array]) for array in got} == {a: form_of(arrays[a]) for a in arrays}
    assert old.coverage()["unreadable_views"] == 6


@pytest.mark.parametrize("shape", [(1,), (64, 3), (65, 2, 3), (130, 4), (0, 5), (7, 0)])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "int64", "float16", "float32"])
def test_arrays_of_several_chunks_and_of_none(shape: tuple[int, ...], dtype: str) -> None:
    values = (np.arange(int(np.prod(shape))) * 7919 % 251).astype(dtype).reshape(shape)
    files = encoded("values", values, chunk=min(64, max(len(values), 1)))
    metadata = files.pop("values/zarr.json")
    got = decode_array(metadata, list(files.values()))
    assert got.dtype == values.dtype and np.array_equal(got, values)


def test_the_module_needs_nothing_of_the_current_format() -> None:
    imported = [node.module for node in ast.walk(ast.parse(Path(v1.__file__).read_text())) if hasattr(node, "module")]
    ours = {name for name in imported if name and name.startswith("tinymim.storage")}
    assert ours == {"tinymim.storage.atomic", "tinymim.storage.store"}


# ---- which caches are of format 1


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_format_1_is_recognised(name: str) -> None:
    assert is_v1(open_store(DATA / name))


@pytest.mark.parametrize(
    "text",
    [
        '{"attributes": {"tinymim": {"format_version": 2}}}',
        '{"attributes": {"tinymim": {"format_version": true}}}',
        '{"attributes": {"tinymim": 1}}',
        '{"attributes": {}}',
        "[]",
        '{"attributes": ',
        "[" * 200_000,
        "1" * 5000,
    ],
)
def test_nothing_else_is_taken_for_format_1(tmp_path: Path, text: str) -> None:
    assert not is_v1(open_store(tmp_path / "nowhere"))
    (tmp_path / "zarr.json").write_text(text)
    assert not is_v1(open_store(tmp_path))
    with pytest.raises(UserError):
        OldCache(tmp_path)


# ---- manifests


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"format_version": 2}, CacheMismatch, "format_version"),
        ({"format_version": None}, CacheMismatch, "format_version"),
        ({"format_version": True}, CacheMismatch, "format_version"),
        ({"extra": {}}, CacheCorrupt, "extra: Extra inputs"),
        ({"codec": {}}, CacheCorrupt, r"codec\.name: Field required"),
        ({"source": [{"name": "a.tar"}]}, CacheCorrupt, "damaged: source"),
        ({"num_views": 0}, CacheCorrupt, "num_views"),
        ({"views": {"size": 224.0}}, CacheCorrupt, r"views\.size"),
        (
            {"source": 2 * [{"name": "a", "size_bytes": 1, "num_samples": 1, "content_hash": "h"}]},
            CacheCorrupt,
            "twice",
        ),
    ],
)
def test_bad_manifests_are_refused(change: dict[str, Any], error: type[UserError], text: str, cache: Path) -> None:
    reissue(cache, lambda manifest: manifest.update(change))
    refusal(cache, text, error)


def test_a_manifest_without_its_digest_is_refused(cache: Path) -> None:
    path = cache / "zarr.json"
    intact = path.read_text()
    for old, new in (('"vit_tiny', '"vit_tina'), ('"node_type": "group"', '"node_type": "array"'), ("digest", "x")):
        path.write_text(intact.replace(old, new))
        refusal(cache, r"zarr\.json is damaged: .*tinymim_digest")
    path.write_text(intact[:-20])
    refusal(cache, r"zarr\.json is damaged")


def test_no_cache_and_other_zarr_groups(tmp_path: Path) -> None:
    refusal(tmp_path / "nowhere", "no cache", UserError)
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    refusal(tmp_path, "not of a tinymim cache", UserError)


# ---- commit records


def test_damaged_or_foreign_commit_records_are_refused(cache: Path) -> None:
    path = cache / COMMIT
    intact = path.read_text()
    for damaged in (
        "",
        "[]",
        intact[:-20],
        intact.replace('"num_images": 3', '"num_images": 2'),
        intact.replace('"kept_mass": 0.5', '"kept_mass": 0.6'),
        intact.replace("\n", "\n "),  # the same JSON in other bytes
    ):
        path.write_text(damaged)
        refusal(cache, r"train-000\.v0-1\.json is damaged")
    path.write_text(intact.replace('"format_version": 1', '"format_version": 2'))
    refusal(cache, "format_version", CacheMismatch)
    shutil.copy(cache / "commits/train-000.v2-2.json", path)
    refusal(cache, r"it is about train-000\.tar v2-2")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_images": 4, "num_records": 8}, "4 images and 8 records for 2 views of 3 images"),
        ({"num_records": 7}, "3 images and 7 records"),
        ({"spec_id": "0" * 16}, "does not belong"),
        ({"shard": {"name": "train-000.tar", "content_hash": "other"}}, "does not belong"),
        ({"shard": {"name": "train-009.tar", "content_hash": "hash0"}}, "does not belong"),
        ({"unit": "units/train-001/v0-1"}, "it is about"),
        ({"first_view": 2**31}, "first_view"),
        ({"key_digest": "x"}, "key_digest"),
        ({"files": {"../../x": {"size_bytes": 1, "blake2b": "0" * 32}}}, "files"),
        ({"files": {"box/c/0": {"size_bytes": -1, "blake2b": "0" * 32}}}, "size_bytes"),
        ({"more": 1}, "more: Extra inputs"),
    ],
)
def test_forged_commit_records_are_refused(cache: Path, change: dict[str, Any], text: str) -> None:
    resign(cache / COMMIT, lambda record: record.update(change))
    refusal(cache, rf"{COMMIT} is damaged: .*{text}")


def test_records_of_another_cache_are_refused(cache: Path) -> None:
    reissue(cache, lambda manifest: manifest["views"].update(seed=9))
    refusal(cache, "does not belong")


@pytest.mark.parametrize("name", ["stray.json", "train-000.json", "train-000.v9-8.json", "deep/train-000.v0-1.json"])
def test_other_json_among_the_commit_records_is_refused(cache: Path, name: str) -> None:
    (cache / "commits/deep").mkdir()
    shutil.copy(cache / COMMIT, cache / "commits" / name)
    refusal(cache, f"{name} is damaged")


def test_units_that_share_views_are_refused(cache: Path) -> None:
    other = cache / "commits/train-000.v1-2.json"
    shutil.copy(cache / COMMIT, other)
    resign(other, lambda record: record.update(first_view=1, unit="units/train-000/v1-2"))
    refusal(cache, r"train-000\.tar v0-1 and train-000\.tar v1-2 .* share views")


# ---- files


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_a_flipped_bit_of_any_file_is_found_and_named(name: str, tmp_path: Path) -> None:
    cache, rng = copied(name, tmp_path), random.Random(1)
    old = OldCache(cache)
    for _ in range(NUM_FLIPS):
        unit = rng.choice(old.units)
        file = rng.choice(sorted(unit.files))
        path = cache / unit.folder / file
        intact = path.read_bytes()
        damaged = bytearray(intact)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CacheCorrupt, match=f"unit {unit} .*{file} does not have its committed digest"):
            old.read_unit(unit)
        path.write_bytes(intact)
    for unit in old.units:
        old.read_unit(unit)


@pytest.mark.parametrize("name", ["cache_v1", "cache_v1_first"])
@pytest.mark.parametrize("array", ["key_bytes", "flip", "qk_index"])
@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("cut", r"has \d+ bytes, expected \d+"),
        ("empty", "has 0 bytes, expected"),
        ("gone", "is missing"),
        ("folder", "cannot be read"),
        ("huge", "has 1099511627776 bytes, expected at most"),
    ],
)
def test_lost_and_added_bytes_are_found_and_named(
    name: str, array: str, damage: str, text: str, tmp_path: Path
) -> None:
    cache = copied(name, tmp_path)
    payload = next(path for path in (cache / UNIT / array / "c").rglob("*") if path.is_file())
    if damage in ("gone", "folder"):
        payload.unlink()
        if damage == "folder":
            payload.mkdir()
    elif damage == "huge":
        with open(payload, "r+b") as file:
            file.truncate(2**40)  # sparse: would not fit into memory
    else:
        payload.write_bytes(payload.read_bytes()[:-1] if damage == "cut" else b"")
    assert array in refusal(cache, rf"unit train-000\.tar v0-1 .*{text}").what


@pytest.mark.parametrize("name", ["zarr.json", COMMIT, "constants.json"])
def test_manifests_and_records_beyond_all_sense_are_not_read(cache: Path, name: str) -> None:
    with open(cache / name, "a+b") as file:
        file.truncate(2**40)  # sparse
    refusal(cache, f"{name} has 1099511627776 bytes, expected at most")


def test_swapped_files_are_found_though_they_share_their_crc32c(cache: Path) -> None:
    one, other = (cache / f"units/train-00{i}/v0-1/qk_index/c/0/0/0/0" for i in (0, 1))
    recorded = [json.loads((cache / f"commits/train-00{i}.v0-1.json").read_bytes())["files"] for i in (0, 1)]
    assert len({files["qk_index/c/0/0/0/0"]["crc32c"] for files in recorded}) == 1
    assert one.stat().st_size == other.stat().st_size and one.read_bytes() != other.read_bytes()
    shutil.copy(other, one)
    refusal(cache, "qk_index/c/0/0/0/0 does not have its committed digest")


# ---- arrays that are recorded as they are, and wrong


def test_a_claim_of_a_million_million_records_fails_before_anything_is_allocated(cache: Path) -> None:
    many = 10**12
    reissue(cache, lambda manifest: manifest["source"][0].update(num_samples=many))
    box = json.loads((cache / UNIT / "box/zarr.json").read_bytes())
    box["shape"][0] = 2 * many
    forge(cache, {"box/zarr.json": json.dumps(box).encode()}, num_images=many, num_records=2 * many)
    tracemalloc.start()
    refusal(cache, r"unit train-000\.tar v0-1 .*box.* cannot come out of")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("array", "values", "text"),
    [
        ("box", np.zeros((6, 4), "<i8"), "array box .*expected <i4"),
        ("box", np.zeros((6, 3), "<i4"), "array box .*expected <i4"),
        ("box", np.zeros((5, 4), "<i4"), "array box .*5 records, expected 6"),
        ("digest", np.zeros(6, "<u4"), "array digest .*expected <u8"),
        ("qk_scale", np.zeros((7, 3), "<f2"), "array qk_scale .*7 records, expected 6"),
        ("key_ends", np.zeros(3, "<f8"), "array key_ends .*expected <i8"),
    ],
)
def test_arrays_of_another_form_are_refused(cache: Path, array: str, values: npt.NDArray[Any], text: str) -> None:
    forge(cache, encoded(array, values))
    refusal(cache, text)


@pytest.mark.parametrize("array", ["box", "flip", "digest", "key_bytes", "key_ends"])
def test_units_without_a_required_array_are_refused(cache: Path, array: str) -> None:
    resign(cache / COMMIT, lambda record: [record["files"].pop(f) for f in [*record["files"]] if array in f])
    refusal(cache, f"array {array} is damaged: there is no {array}/zarr.json")


def test_an_array_with_no_payload_or_two_is_refused(cache: Path) -> None:
    resign(cache / COMMIT, lambda record: record["files"].pop("flip/c/0"))
    refusal(cache, "array flip .*0 payload files")
    metadata, payload = ((cache / UNIT / "flip" / name).read_bytes() for name in ("zarr.json", "c/0"))
    with pytest.raises(ValueError, match="2 payload files"):
        decode_array(metadata, [payload, payload])


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('"zstd"', '"gzip"', "not those of format version 1"),
        ('"zstd"', '"numcodecs.pickle"', "not those of format version 1"),
        ('"end"', '"start"', "not those of format version 1"),
        ('"little"', '"big"', "big-endian"),
        ('"data_type":"uint8"', '"data_type":"object"', "data type"),
        ('"data_type":"uint8"', '"data_type":["uint8"]', "data type"),
        ('"shape":[6,3,4,2]', '"shape":[]', "shape"),
        ('"shape":[6,3,4,2]', '"shape":[6,3,4,-2]', "shape"),
        ('"shape":[6,3,4,2]', '"shape":[6,3,4,true]', "shape"),
        ('"shape":[6,3,4,2]', '"shape":[6,3,8,1]', "not those of format version 1"),
        ('"chunk_shape":[6,3,4,2]', '"chunk_shape":[0,3,4,2]', "chunks of 0"),
        ('"chunk_shape":[6,3,4,2]', '"chunk_shape":[1,3,4,2]', "outside its file|not hold|offset"),
        ('"chunk_shape":[6,3,4,2]', '"chunk_shape":7', r"zarr\.json is damaged"),
        ('"codecs":', '"codec":', r"zarr\.json is damaged"),
        ("{", "[", r"zarr\.json is damaged"),
    ],
)
def test_forged_metadata_is_refused(cache: Path, old: str, new: str, text: str) -> None:
    metadata = (cache / UNIT / "qk_index/zarr.json").read_text()
    metadata = metadata.replace('"name":"bytes"', '"configuration":{"endian":"little"},"name":"bytes"', 1)
    assert old in metadata
    forge(cache, {"qk_index/zarr.json": metadata.replace(old, new).encode()})
    refusal(cache, f"unit train-000.tar v0-1 .*array qk_index .*({text})")


def test_a_chunk_that_is_shorter_or_longer_than_its_place_is_refused(cache: Path) -> None:
    """The decompressor fills a part of its output without an error; the rest would be old memory."""
    for size_bytes in (5, 7, 300, 70_000):
        chunk = Zstd(level=1).encode(bytes(size_bytes)) + b"crc3"
        index = np.array([0, len(chunk)], "<u8").tobytes() + b"crc3"
        forge(cache, {"flip/c/0": chunk + index})
        refusal(cache, "array flip .*a chunk does not hold 6 bytes")
    forge(cache, {"flip/c/0": bytes(30)})
    refusal(cache, "array flip .*outside its file")
    forge(cache, {"flip/c/0": b"\x00" * 9 + np.array([0, 9], "<u8").tobytes() + b"crc3"})
    refusal(cache, "array flip .*does not hold")
    forge(cache, {"flip/c/0": b"short"})
    refusal(cache, "array flip")


@pytest.mark.parametrize("size_bytes", [6, 255, 256, 65_791, 65_792, 3_000_000])
def test_the_size_that_a_frame_states_is_read(size_bytes: int) -> None:
    values = np.random.default_rng(0).integers(0, 4, size_bytes, "u1")
    assert v1._content_bytes(memoryview(Zstd(level=1).encode(values))) == size_bytes


@pytest.mark.parametrize(
    ("data", "ends", "text"),
    [
        (b"aabbaa", [2, 4, 6], r"1 key\(s\) appear twice, such as 'aa'"),
        (b"aabb", [2, 4], "wrong number of keys: 2, expected 3"),
        (b"aabbcc", [2, 4, 5], "does not fit"),
        (b"aabbcc", [4, 2, 6], "does not fit"),
        (b"aabbcc", [-1, 4, 6], "does not fit"),
        (b"aa\xffbcc", [2, 4, 6], "utf-8"),
    ],
)
def test_keys_that_do_not_fit_are_refused(cache: Path, data: bytes, ends: list[int], text: str) -> None:
    files, digest = encoded_keys(data, ends)
    forge(cache, files)
    refusal(cache, "the keys do not have the committed key_digest")
    forge(cache, files, key_digest=digest)
    refusal(cache, f"unit train-000.tar v0-1 .*array key_bytes .*{text}")


# ---- constants


@pytest.mark.parametrize("name", ["qkv_weight/c/0/0", "qkv_weight/zarr.json", "bits/c/0"])
@pytest.mark.parametrize("damage", ["flip", "shorten", "delete"])
def test_damaged_constants_are_refused_and_the_file_named(hidden: Path, name: str, damage: str) -> None:
    path = hidden / "constants" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(CacheCorrupt, match=f"array {name.partition('/')[0]} of .*constants") as caught:
        OldCache(hidden).constants()
    assert path.name in caught.value.what and caught.value.hint == v1.RESTORE


def test_damaged_and_foreign_records_of_constants_are_refused(hidden: Path) -> None:
    path = hidden / "constants.json"
    intact = path.read_bytes()
    path.write_bytes(intact.replace(b'"size_bytes": ', b'"size_bytes": 1', 1))
    refusal(hidden, r"constants\.json is damaged")
    path.write_bytes(intact)
    resign(path, lambda record: record.update(spec_id="0" * 16))
    refusal(hidden, "does not belong")
    resign(path, lambda record: record.update(format_version=2))
    refusal(hidden, "format_version", CacheMismatch)


def test_units_made_with_other_constants_are_refused(hidden: Path) -> None:
    path = hidden / "constants.json"
    resign(path, lambda record: record["files"].pop("bits/c/0"))
    assert "constants" in str(refusal(hidden, r"shard-000000\.tar v0-1 .* other constants").expected)
    path.unlink()
    assert "constants.json" in str(refusal(hidden, "other constants").got)


def test_constants_that_no_unit_was_made_with_are_refused(hidden: Path) -> None:
    for path in (hidden / "commits").iterdir():
        resign(path, lambda record: record.pop("constants"))
    assert refusal(hidden, "other constants").expected == "none"


# ---- anything at all

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**11, 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../../etc/passwd", "/etc/passwd", "units/../../x", "a\x00b", "\ud800", "." * 300])
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
MANIFEST = OldCache(DATA / "cache_v1").manifest


@st.composite
def mutated(draw: st.DrawFn, original: Any) -> Any:
    """`original` with one to three of its values replaced, removed, or given a new neighbour."""
    root = {"": copy.deepcopy(original)}
    for _ in range(draw(st.integers(1, 3))):
        owner: Any = root
        key: Any = ""
        while isinstance(owner[key], dict | list) and owner[key] and draw(st.integers(0, 3)):
            owner = owner[key]
            key = draw(st.sampled_from(sorted(owner) if isinstance(owner, dict) else range(len(owner))))
        how = draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "add" and isinstance(owner[key], dict):
            owner[key][draw(st.text(max_size=5))] = draw(anything)
        elif how == "remove" and key != "":
            del owner[key]
        else:
            owner[key] = draw(anything)
    return root[""]


def ours_or_success(function: Callable[[], Any]) -> Any:
    what = "fine"
    try:
        return function()
    except UserError as error:  # CacheCorrupt and CacheMismatch are
        what = error.what
    assert what and "\n" not in what and len(what) < 5000
    return None


@EXAMPLES
@given(mutated(json.loads((DATA / "cache_v1_first" / "zarr.json").read_bytes())))
def test_mutated_manifests(stored: Any) -> None:
    """The first caches had no digest, so that only the checks of the fields can refuse them."""
    manifest = ours_or_success(lambda: v1.parse_manifest(json.dumps(stored).encode(), "a test"))
    if manifest is not None:
        assert all(isinstance(manifest.teacher[name], int) for name in ("heads", "tokens", "block"))
        assert all(0 <= shard.num_samples < 2**40 for shard in manifest.source)
        assert manifest.shapes and len(manifest.spec_id) == 16


@EXAMPLES
@given(mutated({k: v for k, v in json.loads((DATA / "cache_v1" / COMMIT).read_bytes()).items() if k[:6] != "record"}))
def test_mutated_records_whose_digest_is_right(record: Any) -> None:
    try:
        digest = digest_hex(canonical_json(record))
        data = canonical_json({**record, "record_digest": digest} if isinstance(record, dict) else record)
    except ValueError:  # nan and infinity are not JSON
        return
    unit = ours_or_success(lambda: v1.parse_unit(data, COMMIT, "cache", MANIFEST))
    if unit is not None:
        assert unit.folder == UNIT and not [name for name in unit.files if ".." in name or name.startswith("/")]
        assert unit.num_records == unit.num_images * unit.num_views <= 6


@EXAMPLES
@given(st.binary(max_size=40) | anything.map(repr).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_as_a_manifest_or_a_record(data: bytes) -> None:
    ours_or_success(lambda: v1.parse_manifest(data, "a test"))
    ours_or_success(lambda: v1.parse_unit(data, COMMIT, "cache", MANIFEST))
