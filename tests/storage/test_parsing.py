"""Any bytes in place of a manifest or record give a TinymimError or success, without large allocations."""

import copy
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinymim.configs.errors import CacheCorrupt, UserError
from tinymim.storage import layout
from tinymim.storage.atomic import canonical_json, digest_hex
from tinymim.storage.commit import described, parse_commit, record_digest
from tinymim.storage.layout import UnitId
from tinymim.storage.leases import Leases
from tinymim.storage.manifest import Manifest, SourceShard
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import LocalStore
from tinymim.storage.writer import CacheWriter
from tinymim.tests.storage import tiny

MANIFEST = tiny.make_manifest()
COMMIT_PATH = "commits/train-000.v0-1.json"
COMMIT = json.loads((tiny.COMMITTED_CACHE / COMMIT_PATH).read_bytes())
EXAMPLES = settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**11, 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../../etc/passwd", "/etc/passwd", "units/../../x", "a\x00b", "\ud800", "." * 300])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@st.composite
def mutated(draw: st.DrawFn, original: Any) -> Any:
    """`original` with one to three of its values replaced, removed, or given a new neighbour."""
    root = {"": copy.deepcopy(original)}
    for _ in range(draw(st.integers(1, 3))):
        path = ["", *draw(st.sampled_from(places(root[""])))]
        last = path.pop()
        owner: Any = root
        for key in path:
            owner = owner[key]
        how = draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "add" and isinstance(owner[last], dict):
            owner[last][draw(st.text(max_size=5))] = draw(values)
        elif how == "remove" and path:
            del owner[last]
        else:
            owner[last] = draw(values)
    return root[""]


def ours_or_success(function: Any) -> Any:
    what = "fine"
    try:
        return function()
    except UserError as error:  # CacheCorrupt and CacheMismatch are
        what = error.what
    assert what and "\n" not in what and len(what) < 5000
    return None


@EXAMPLES
@given(mutated(MANIFEST.to_json()))
def test_mutated_manifests(stored: Any) -> None:
    manifest = ours_or_success(lambda: Manifest.from_json(stored, "a test"))
    if manifest is not None:
        assert all(isinstance(manifest.teacher[name], int) for name in ("heads", "tokens", "block"))
        assert all(0 <= shard.num_samples < 2**40 for shard in manifest.source)


@EXAMPLES
@given(values)
def test_anything_as_a_manifest(stored: Any) -> None:
    ours_or_success(lambda: Manifest.from_json(stored, "a test"))


@EXAMPLES
@given(mutated({key: value for key, value in COMMIT.items() if key != "record_digest"}))
def test_mutated_records_whose_digest_is_right(record: Any) -> None:
    """Write a forged record with a valid digest, so that only the checks of the fields can refuse it."""
    try:
        signed = canonical_json(
            {**record, "record_digest": record_digest(record)} if isinstance(record, dict) else record
        )
    except ValueError:  # nan and infinity are not JSON
        return
    info = ours_or_success(lambda: parse_commit("cache", COMMIT_PATH, signed, MANIFEST))
    if info is not None:
        assert layout.unit_folder(info.unit) == "units/train-000/v0-1"
        for name in info.files:
            assert ".." not in name and not name.startswith("/")
        assert info.num_records == info.num_images * info.unit.num_views <= 6


@EXAMPLES
@given(
    st.binary(max_size=40)
    | st.text(max_size=60).map(str.encode)
    | values.map(repr).map(lambda t: t.encode("utf-8", "replace"))
)
def test_any_bytes_as_a_record_or_a_lease(data: bytes) -> None:
    ours_or_success(lambda: parse_commit("cache", COMMIT_PATH, data, MANIFEST))


@pytest.mark.parametrize(
    "data", [b"", b"[" * 100_000, b"\xff\xfe", b'{"pid": "x", "lease_s": -1}', b'{"lease_s": 1e999}', b"[1]"]
)
def test_a_lease_with_anything_in_it_is_a_lease(tmp_path: Path, data: bytes) -> None:
    store = LocalStore(tmp_path)
    store.create_all({"leases/a.g1.json": data})
    leases = Leases(store)
    assert not leases.claim("a")  # its owner may live, so it is watched
    leases.holder("a")
    leases.close()


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 100_000, "1" * 5000, '{"attributes": {"tinymim": 1e999}}'])
def test_deep_and_long_json_in_place_of_a_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "zarr.json").write_text(text)
    with pytest.raises(UserError):
        CacheReader(tmp_path)


def test_a_manifest_and_record_that_claim_a_million_million_records_fail_before_anything_is_allocated(
    tmp_path: Path,
) -> None:
    many = 10**12
    tiny.make_tiny_cache(tmp_path)
    manifest = json.loads((tmp_path / "zarr.json").read_bytes())
    claimed = MANIFEST.to_json()
    claimed["source"][0]["num_samples"] = many
    manifest["attributes"] = {"tinymim": claimed, "tinymim_digest": digest_hex(canonical_json(claimed))}
    (tmp_path / "zarr.json").write_bytes(canonical_json(manifest))
    unit = tmp_path / "units" / "train-000" / "v0-1"
    box = json.loads((unit / "box/zarr.json").read_bytes())
    box["shape"][0] = many * 2
    (unit / "box/zarr.json").write_bytes(json.dumps(box).encode())
    record = json.loads((tmp_path / COMMIT_PATH).read_bytes())
    del record["record_digest"]
    record |= {"num_images": many, "num_records": many * 2}
    for name, file in described({"box/zarr.json": (unit / "box/zarr.json").read_bytes()}).items():
        record["files"][name] = file.__dict__
    (tmp_path / COMMIT_PATH).write_bytes(canonical_json({**record, "record_digest": record_digest(record)}))
    tracemalloc.start()
    reader = CacheReader(tmp_path)
    with pytest.raises(CacheCorrupt, match=r"unit train-000\.tar v0-1 .*box.* cannot come out of"):
        reader.read_unit(reader.units()[0], ["box"])
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_file_larger_than_recorded_is_not_read(tmp_path: Path) -> None:
    tiny.make_tiny_cache(tmp_path)
    path = tmp_path / "units/train-000/v0-1/box/c/0/0"
    with open(path, "r+b") as file:
        file.truncate(2**40)  # sparse
    reader = CacheReader(tmp_path)
    with pytest.raises(CacheCorrupt, match="has 1099511627776 bytes, expected at most"):
        reader.read_unit(reader.units()[0])


@pytest.mark.parametrize("shard", ["../../escape.tar", "/etc/passwd", "a/b.tar", "..", "con\x00.tar"])
def test_shard_names_cannot_leave_the_cache(tmp_path: Path, shard: str) -> None:
    sections = {name: getattr(MANIFEST, name) for name in ("teacher", "views", "codec", "environment")}
    manifest = Manifest(source=(SourceShard(shard, 1, 3, "h"),), num_views=1, **sections)
    unit = UnitId(shard, 0, 1)
    _, arrays = tiny.make_unit(unit)
    with CacheWriter.open(tmp_path / "cache", manifest) as writer:
        writer.write_unit(unit, ["a", "b", "c"], arrays, {})
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert CacheReader(tmp_path / "cache").read_unit(CacheReader(tmp_path / "cache").units()[0]).keys == ["a", "b", "c"]


@pytest.mark.parametrize("codec", ["numcodecs.pickle", "pickle", "vlen-utf8", "gzip"])
def test_no_codec_but_our_own_is_ever_run(codec: str) -> None:
    files = layout.encode_array("values", np.arange(9, dtype="u1"))
    files["values/zarr.json"] = files["values/zarr.json"].replace(b'"zstd"', f'"{codec}"'.encode())
    with pytest.raises(ValueError, match="not those of format version 1"):
        layout.decode_array("values", files, 9)
