"""Whole caches are read exactly or refused: units, files, constants."""

import ast
import json
import pickle
import random
import shutil
from pathlib import Path

import pytest

from tinymim.configs.errors import CacheCorrupt, CacheMismatch
from tinymim.storage.v1 import cache as v1_cache
from tinymim.storage.v1.cache import OldCache
from tinymim.storage.v1.checks import RESTORE
from tinymim.tests.storage.v1.forged import (
    COMMIT,
    DATA,
    RECORDS,
    UNIT,
    copied,
    encoded,
    encoded_keys,
    forge,
    form_of,
    refusal,
    resign,
)

NUM_FLIPS = 40


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


def test_the_package_needs_nothing_of_the_current_format() -> None:
    trees = [ast.parse(path.read_text()) for path in Path(v1_cache.__file__).parent.glob("*.py")]
    imported = {str(node.module) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    others = {name for name in imported if name.startswith("tinymim.storage") and ".v1." not in name}
    assert others == {"tinymim.storage.atomic", "tinymim.storage.store"}


def test_units_that_share_views_are_refused(cache: Path) -> None:
    other = cache / "commits/train-000.v1-2.json"
    shutil.copy(cache / COMMIT, other)
    resign(other, lambda record: record.update(first_view=1, unit="units/train-000/v1-2"))
    refusal(cache, r"train-000\.tar v0-1 and train-000\.tar v1-2 .* share views")


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
    assert path.name in caught.value.what and caught.value.hint == RESTORE


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
