"""Arrays and keys decode to the recorded values; those that are recorded as they are, and wrong, are refused."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from numcodecs import Zstd

from tinymim.storage.v1 import arrays
from tinymim.storage.v1.arrays import decode_array
from tinymim.tests.storage.v1.forged import COMMIT, UNIT, encoded, encoded_keys, forge, refusal, reissue, resign


@pytest.mark.parametrize("shape", [(1,), (64, 3), (65, 2, 3), (130, 4), (0, 5), (7, 0)])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "int64", "float16", "float32"])
def test_arrays_of_several_chunks_and_of_none(shape: tuple[int, ...], dtype: str) -> None:
    values = (np.arange(int(np.prod(shape))) * 7919 % 251).astype(dtype).reshape(shape)
    files = encoded("values", values, chunk=min(64, max(len(values), 1)))
    metadata = files.pop("values/zarr.json")
    got = decode_array(metadata, list(files.values()))
    assert got.dtype == values.dtype and np.array_equal(got, values)


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
    assert arrays._content_bytes(memoryview(Zstd(level=1).encode(values))) == size_bytes


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
