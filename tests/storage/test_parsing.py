"""Any bytes in place of a manifest or record give a TinymimError or success, without large allocations."""

import copy
import dataclasses
import itertools
import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google_crc32c import value as crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinymim.configs.errors import CacheCorrupt, UserError
from tinymim.storage import layout
from tinymim.storage.atomic import canonical_json, digest_hex
from tinymim.storage.blocks import (
    ZSTD_LEVEL,
    Block,
    UnitFileWriter,
    UnitParts,
    _frame_size,
    decode_arrays,
    encode_arrays,
    key_arrays,
    unzipped,
)
from tinymim.storage.commit import UnitInfo, encode_commit, key_digest, parse_commit, signed
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.leases import Leases
from tinymim.storage.local import LocalStore
from tinymim.storage.manifest import Layer, Manifest, SourceShard
from tinymim.storage.reader import CacheReader
from tinymim.storage.writer import CacheWriter
from tinymim.tests.storage import tiny
from tinymim.tests.storage.tiny import CLS, REL

MANIFEST, LAYER = tiny.make_manifest(), tiny.make_layer()
UNIT = UnitId("train-000.tar", 0, 2)
COMMIT_PATH = layout.commit_file(REL, UNIT)
COMMIT = json.loads((tiny.COMMITTED_CACHE / COMMIT_PATH).read_bytes())
FORGERIES = 1500
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
    | st.sampled_from(["../../etc/passwd", "/etc/passwd", "views/../../x", "a\x00b", "\ud800", "." * 300])
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


def parsed(data: bytes, layer: str = REL, unit: UnitId = UNIT) -> UnitInfo:
    return parse_commit("cache", layer, unit, data, MANIFEST.spec_id if layer == VIEWS else LAYER.spec_id, MANIFEST)


@EXAMPLES
@given(mutated(MANIFEST.to_json()))
def test_mutated_manifests(stored: Any) -> None:
    manifest = ours_or_success(lambda: Manifest.from_json(stored, "a test"))
    if manifest is not None:
        assert isinstance(manifest.views["size"], int) and isinstance(manifest.views["seed"], int)
        assert all(0 <= shard.num_samples < 2**40 for shard in manifest.source)


@EXAMPLES
@given(mutated(LAYER.to_json()))
def test_mutated_layers(stored: Any) -> None:
    layer = ours_or_success(lambda: Layer.from_json(stored, "a test"))
    if layer is not None:
        assert layer.shapes.heads > 0 and layer.taps and "/" not in layer.name
        for name, (dtype, shape) in layer.arrays.items():
            assert name.isidentifier() and dtype.kind in "biuf" and all(size > 0 for size in shape)


@EXAMPLES
@given(values)
def test_anything_as_a_manifest_or_layer(stored: Any) -> None:
    ours_or_success(lambda: Manifest.from_json(stored, "a test"))
    ours_or_success(lambda: Layer.from_json(stored, "a test"))


@EXAMPLES
@given(mutated({key: value for key, value in COMMIT.items() if key != "record_digest"}))
def test_mutated_records_whose_digest_is_right(record: Any) -> None:
    """Write a forged record with a valid digest, so that only the checks of the fields can refuse it."""
    try:
        data = signed(record) if isinstance(record, dict) else canonical_json(record)
    except ValueError:  # nan and infinity are not JSON
        return
    info = ours_or_success(lambda: parsed(data))
    if info is not None:
        assert info.path == "layers/rel/train-000/v0-1.zip"
        assert info.num_records == info.num_images * info.unit.num_views <= 6
        assert len(info.parts.views) == 2 and info.parts.places()[-1] < 2**64


@EXAMPLES
@given(
    st.binary(max_size=40)
    | st.text(max_size=60).map(str.encode)
    | values.map(repr).map(lambda t: t.encode("utf-8", "replace"))
)
def test_any_bytes_as_a_record(data: bytes) -> None:
    ours_or_success(lambda: parsed(data))


@pytest.mark.parametrize(
    "data",
    [b"", b"[" * 100_000, b"\xff\xfe", b'{"pid": "x", "lease_s": -1}', b'{"lease_s": 1e999}', b"[1]"]
    + [b'{"pid": %s, "lease_s": %s, "machine": [3]}' % pair for pair in ((b"-1", b"true"), (b"9" * 400, b"9" * 400))],
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


# ---- forged units: every digest and checksum fits, so that only the checks of the content can refuse it


def forged(info: UnitInfo, data: bytes, sizes: list[int]) -> UnitInfo:
    """The record of a unit's file `data` whose parts have these sizes: all checksums fit."""
    ends = list(itertools.accumulate(sizes))
    blocks = [Block(end - start, crc32c(data[start:end])) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    keys = blocks[1] if info.parts.keys is not None else None
    views = tuple(blocks[1 + (keys is not None) : -1])
    return dataclasses.replace(info, parts=UnitParts(blocks[0], keys, views, blocks[-1], digest_hex(data)))


class Memory(LocalStore):
    """A store whose units lie in memory: a file system takes longer than everything that is tested."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.files: dict[str, bytes] = {}

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        for begin, end in ranges:
            yield memoryview(self.files[path])[begin:end]


def read_again(reader: CacheReader, info: UnitInfo, fresh: int) -> dict[str, bytes] | None:
    """Arrays and keys of a unit, None if it is refused; memory that numpy leaves as it was holds the byte `fresh`."""

    def read() -> dict[str, bytes]:
        found = {name: values.tobytes() for name, values in reader.read_views(info).items()}
        return found | ({"keys": repr(reader.read_keys(info)).encode()} if info.parts.keys else {})

    real_empty = np.empty

    def empty(*arguments: Any, **options: Any) -> Any:
        values = real_empty(*arguments, **options)
        if values.size:
            values.view(np.uint8).fill(fresh)
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "empty", empty)
        found = ours_or_success(read)
    assert found is None or isinstance(found, dict)
    return found


def fuzz_forged_units(folder: Path, count: int) -> Counter[str]:
    """Damage units at random and forge their checksums; what is read must come from the bytes and nothing else."""
    tiny.make_tiny_cache(folder)
    reader, store = CacheReader(folder), Memory(folder)
    infos = [info for layer in (VIEWS, REL, CLS) for info in reader.units(layer)]
    intact = {info.path: (folder / info.path).read_bytes() for info in infos}
    reader.store = store
    rng, counts = random.Random(0), Counter[str]()
    for _ in range(count):
        info = rng.choice(infos)
        begin, end = info.parts.head.size_bytes, info.parts.places()[-1]
        data = intact[info.path]
        how = rng.choice(["flip", "flip", "zero", "copy", "frame"])
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(begin, end)
            if how == "frame":  # a member's header or the beginning of its frame, where lengths are stated
                at = min(max(data.find(b"PK\3\4", at), begin) + rng.randrange(60), end - 1)
            length = min(rng.choice([1, 2, 4, 8]), end - at)
            new = {"zero": bytes(length), "copy": data[begin : begin + length]}.get(how, rng.randbytes(length))
            data = data[:at] + new + data[at + length :]
        store.files[info.path] = data
        record = forged(info, data, [part.size_bytes for part in info.parts.all])
        found = read_again(reader, record, 0)
        counts["refused" if found is None else "read"] += 1
        assert found == read_again(reader, record, 255)  # nothing uninitialised
    return counts


def test_forged_units_are_refused_or_read_alike(tmp_path: Path) -> None:
    counts = fuzz_forged_units(tmp_path, FORGERIES)
    assert sum(counts.values()) == FORGERIES and min(counts.values()) > 0.1 * FORGERIES, counts


@pytest.mark.slow
def test_a_hundred_thousand_forged_units(tmp_path: Path) -> None:
    counts = fuzz_forged_units(tmp_path, 100_000)
    assert sum(counts.values()) == 100_000, counts


def frame(stated: int, held: bytes) -> bytes:
    """A zstd frame of one raw block that states another content size."""
    return b"\x28\xb5\x2f\xfd\xe0" + stated.to_bytes(8, "little") + (len(held) << 3 | 1).to_bytes(3, "little") + held


@pytest.mark.parametrize(
    "data",
    [
        frame(72, b"x"),
        frame(72, b"x" * 71),
        frame(72, b"x" * 73),
        frame(2**62, b"x" * 72),
        frame(0, b"") + frame(72, b"x" * 72),
        frame(72, b"x" * 72) + frame(9, b"y" * 9),
        b"\x28\xb5\x2f\xfd\x00\x58\x01\x00\x00",  # states no size
        b"",
    ],
)
def test_frames_that_hold_more_or_less_than_they_should(tmp_path: Path, data: bytes) -> None:
    tiny.make_tiny_cache(tmp_path)
    info = CacheReader(tmp_path).units(REL)[0]

    file = (tmp_path / info.path).read_bytes()
    at = file.index(b"qk_index/c/0/0/0/0/0") + 20
    header = file.rindex(b"PK\3\4", 0, at)
    held = int.from_bytes(file[header + 18 : header + 22], "little")
    file = file[: header + 18] + 2 * len(data).to_bytes(4, "little") + file[header + 26 : at] + data + file[at + held :]
    sizes = [part.size_bytes for part in info.parts.all]
    sizes[1] += len(data) - held
    record = forged(info, file, sizes)
    (tmp_path / info.path).write_bytes(file)
    (tmp_path / COMMIT_PATH).write_bytes(encode_commit(record))
    reader = CacheReader(tmp_path)
    assert reader.units(REL)[0] == record
    with pytest.raises(CacheCorrupt, match=r"train-000\.tar v0-1 of layer rel .*view 0"):
        reader.read_views(record)
    reader.read_views(record, [1])


def test_a_frame_that_holds_what_it_should_is_read() -> None:
    """The frames of the test above are well-formed but for what they test."""
    files = unzipped(encode_arrays({"a": np.zeros(72, "u1")})) | {"a/c/0": frame(72, b"x" * 72)}
    assert _frame_size(memoryview(files["a/c/0"])) == 72
    assert decode_arrays(files)["a"].tobytes() == b"x" * 72


@pytest.mark.parametrize("field", ["views", "keys", "images", "head"])
@pytest.mark.parametrize("size", [2**30, 2**40, 2**61])
def test_records_that_claim_much_fail_before_anything_is_allocated(tmp_path: Path, field: str, size: int) -> None:
    many = 10**11
    tiny.make_tiny_cache(tmp_path)
    if field == "images":  # the manifest and the layer claim it too
        manifest = dataclasses.replace(
            MANIFEST, source=(dataclasses.replace(MANIFEST.source[0], num_samples=many), *MANIFEST.source[1:])
        )
        (tmp_path / "zarr.json").write_bytes(layout.root_group(manifest))
    info = CacheReader(tmp_path).units()[0]
    parts = info.parts
    assert parts.keys is not None
    claims: dict[str, dict[str, Any]] = {
        "views": {"views": (parts.views[0]._replace(size_bytes=size), parts.views[1])},
        "keys": {"keys": parts.keys._replace(size_bytes=size)},
        "head": {"head": parts.head._replace(size_bytes=size)},
        "images": {},
    }
    record = dataclasses.replace(
        info, parts=dataclasses.replace(parts, **claims[field]), num_images=many if field == "images" else 3
    )
    (tmp_path / layout.commit_file(VIEWS, UNIT)).write_bytes(encode_commit(record))
    tracemalloc.start()
    try:
        reader = CacheReader(tmp_path)
        for read in (reader.read_views, reader.read_keys):
            if field == "views" and read == reader.read_keys:
                continue
            with pytest.raises(CacheCorrupt, match=r"unit train-000\.tar v0-1 .*(cut short|cannot come out)"):
                read(reader.units()[0])
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_sizes_that_no_file_has_are_refused(tmp_path: Path) -> None:
    record = {key: value for key, value in COMMIT.items() if key != "record_digest"}
    for size in (2**62, 2**63 - 1):
        with pytest.raises(CacheCorrupt, match=r"its views have \d+ bytes"):
            parsed(signed(record | {"views": record["views"] | {"size_bytes": [size, size]}}))
    with pytest.raises(CacheCorrupt, match="it describes 1 of 2 views"):
        parsed(signed(record | {"views": {"size_bytes": [1], "crc32c": [1]}}))
    with pytest.raises(CacheCorrupt, match="holds the keys, and no other"):
        parsed(signed(record | {"keys": {"size_bytes": 1, "crc32c": 1}}))
    with pytest.raises(CacheCorrupt, match="it has 4 images of 3"):
        parsed(signed(record | {"num_images": 4}))


@pytest.mark.parametrize("ends", [[3, 2, 9], [1, 2, 8], [-1, 2, 9], [1, 2, 2**62], [2**63 - 1, -1, 9]])
def test_forged_keys_are_refused(tmp_path: Path, ends: list[int]) -> None:
    """`key_ends` that go back, or do not fit `key_bytes`."""
    tiny.make_tiny_cache(tmp_path)
    info = CacheReader(tmp_path).units()[0]
    keys = {"key_bytes": np.frombuffer(b"abcdefghi", "u1"), "key_ends": np.array(ends, "<i8")}
    rewrite_with_keys(tmp_path, info, keys)
    reader = CacheReader(tmp_path)
    with pytest.raises(CacheCorrupt, match=r"train-000\.tar v0-1 .*the keys cannot be decoded"):
        reader.read_keys(reader.units()[0])


@pytest.mark.parametrize("keys", [["a", "b", "a"], ["a", "b"], ["a", "b", "c", "d"]])
def test_keys_that_are_not_one_per_image_are_refused(tmp_path: Path, keys: list[str]) -> None:
    tiny.make_tiny_cache(tmp_path)
    rewrite_with_keys(tmp_path, CacheReader(tmp_path).units()[0], key_arrays(keys))
    reader = CacheReader(tmp_path)
    with pytest.raises(CacheCorrupt, match=r"train-000\.tar v0-1 .*key"):
        reader.read_keys(reader.units()[0])


def rewrite_with_keys(folder: Path, info: UnitInfo, keys: dict[str, Any]) -> None:
    """Write a unit of the view layer with other keys."""
    arrays = CacheReader(folder).read_views(info)
    with open(folder / info.path, "wb") as file:
        out = UnitFileWriter(file, 3, info.unit.num_views, CacheReader(folder).arrays(VIEWS), keys)
        for view in range(info.unit.num_views):
            out.add({name: values[view] for name, values in arrays.items()})
        record = dataclasses.replace(info, parts=out.close(), key_digest=key_digest(keys))
    (folder / layout.commit_file(VIEWS, info.unit)).write_bytes(encode_commit(record))


@pytest.mark.parametrize("shard", ["../../escape.tar", "/etc/passwd", "a/b.tar", "..", "con\x00.tar"])
def test_shard_names_cannot_leave_the_cache(tmp_path: Path, shard: str) -> None:
    manifest = Manifest((SourceShard(shard, 1, 3, "h"),), MANIFEST.views, MANIFEST.environment)
    unit = UnitId(shard, 0, 1)
    with CacheWriter.open(tmp_path / "cache", manifest, [tiny.make_layer()]) as writer:
        tiny.write_units(writer, [unit])
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert CacheReader(tmp_path / "cache").keys(shard) == tiny.make_keys(shard)


@pytest.mark.parametrize("codec", ["numcodecs.pickle", "pickle", "vlen-utf8", "gzip"])
def test_no_codec_but_our_own_is_ever_run(codec: str) -> None:
    files = unzipped(encode_arrays({"values": np.arange(9, dtype="u1")}))
    files["values/zarr.json"] = files["values/zarr.json"].replace(b'"zstd"', f'"{codec}"'.encode())
    with pytest.raises(ValueError, match="not what tinymim writes"):
        decode_arrays(files)


@EXAMPLES
@given(st.dictionaries(st.sampled_from(["a/zarr.json", "a/c/0", "b/zarr.json", "zarr.json"]), st.binary(max_size=80)))
def test_any_members_as_constants(files: dict[str, bytes]) -> None:
    with suppress(ValueError, RuntimeError):
        decode_arrays(files)


def test_constants_that_claim_much_fail_before_anything_is_allocated() -> None:
    files = unzipped(encode_arrays({"a": np.zeros(4, "u1")}))
    files["a/zarr.json"] = (
        files["a/zarr.json"]
        .replace(b'"shape":[4]', b'"shape":[4611686018427387903]')
        .replace(b'"chunk_shape":[4]', b'"chunk_shape":[4611686018427387903]')
    )
    with pytest.raises(ValueError, match="cannot come out of"):
        decode_arrays(files)
    assert ZSTD_LEVEL == 1  # part of the format: the metadata of every array states it
