"""The arrays of a format-1 cache: each is one zarr shard of zstd frames.

Shapes: I images of a unit, V its views, R = I * V records, K total bytes of its keys.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from numcodecs import Zstd

from tinymim.storage.atomic import digest_hex
from tinymim.storage.v1.manifest import METADATA
from tinymim.storage.v1.records import OldUnit

# The arrays of every unit: dtype and shape after the first axis.
REQUIRED_ARRAYS: Mapping[str, tuple[str, tuple[int, ...]]] = MappingProxyType(
    {
        "key_bytes": ("|u1", ()),  # [K], the keys joined in UTF-8
        "key_ends": ("<i8", ()),  # [I], where each key ends in key_bytes
        "box": ("<i4", (4,)),  # [R, 4], top, left, height, width in pixels of the image
        "flip": ("|u1", ()),  # [R]
        "digest": ("<u8", ()),  # [R], digest of the view's pixels
    }
)
# The outer codec, the codecs of its chunks and of its index, and the place of the index.
CODECS = ("sharding_indexed", [["bytes", "zstd", "crc32c"], ["bytes", "crc32c"]], "end")
CRC_BYTES = 4
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# A block of a zstd frame holds at most 128 KiB and takes at least 4 bytes (RFC 8878, 3.1.1.2).
ZSTD_MOST = 2**17 // 4


def decode_keys(key_bytes: npt.NDArray[Any], key_ends: npt.NDArray[Any], unit: OldUnit) -> list[str]:
    """The I keys of a unit in tar order; raises ValueError where the arrays do not fit each other or the unit."""
    data, ends = key_bytes.tobytes(), key_ends.tolist()
    if digest_hex(key_ends.tobytes() + data) != unit.key_digest:
        raise ValueError("the keys do not have the committed key_digest")
    starts = [0, *ends[:-1]]
    if (ends[-1] if ends else 0) != len(data) or any(a > b for a, b in zip(starts, ends, strict=False)):
        raise ValueError("key_ends does not fit it")
    keys = [data[start:end].decode() for start, end in zip(starts, ends, strict=False)]
    if repeated := [key for key, count in Counter(keys).items() if count > 1]:
        raise ValueError(f"{len(repeated)} key(s) appear twice, such as {repeated[0]!r}")
    if len(keys) != unit.num_images:
        raise ValueError(f"wrong number of keys: {len(keys)}, expected {unit.num_images}")
    return keys


def decode_array(metadata: bytes, payloads: list[bytes]) -> npt.NDArray[Any]:
    """Decode an array from its metadata and its payload files: one zarr shard, none if the array is empty.

    Raises:
        ValueError, RuntimeError: the metadata is not that of format 1, or the payload does not fit it.
    """
    shape, dtype, length = _described(metadata)
    if 0 in shape:
        return np.empty(shape, dtype)
    if len(payloads) != 1:
        raise ValueError(f"it has {len(payloads)} payload files, expected 1")
    payload = memoryview(payloads[0])
    chunks = -(-shape[0] // length)
    chunk_bytes = length * math.prod(shape[1:]) * dtype.itemsize
    # Checked before any allocation: a few bytes of metadata may claim any shape.
    if chunks * chunk_bytes > len(payload) * ZSTD_MOST:
        raise ValueError(f"{chunks} chunks of {[length, *shape[1:]]} cannot come out of {len(payload)} bytes")
    # The index at the end holds offset and size of each chunk as uint64, then its own crc32c.
    places = np.frombuffer(payload, "<u8", 2 * chunks, offset=len(payload) - 16 * chunks - CRC_BYTES).reshape(-1, 2)
    values = np.empty((chunks * length, *shape[1:]), dtype)
    for number, (offset, size_bytes) in enumerate(places.tolist()):
        if offset + size_bytes > len(payload) or size_bytes < CRC_BYTES:
            raise ValueError("a chunk lies outside its file")
        frame = payload[offset : offset + size_bytes - CRC_BYTES]
        if _content_bytes(frame) != chunk_bytes:  # a shorter one would leave the rest of the array unwritten
            raise ValueError(f"a chunk does not hold {chunk_bytes} bytes")
        Zstd().decode(frame, values[number * length : (number + 1) * length])
    return values[: shape[0]]


def _described(metadata: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, dtype and records per inner chunk; ValueError unless the metadata is that of format 1."""
    try:
        stored = json.loads(metadata)
        shape, kind = tuple(stored["shape"]), stored["data_type"]
        [sharding] = stored["codecs"]
        inner = sharding["configuration"]
        length, *rest = inner["chunk_shape"]
        chains = [[codec["name"] for codec in inner[key]] for key in ("codecs", "index_codecs")]
        order = inner["codecs"][0].get("configuration", {}).get("endian", "little")
        codecs = (sharding["name"], chains, inner["index_location"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{METADATA} is damaged: {error!r}") from error
    if any(type(size) is not int or not 0 <= size < 2**62 for size in (*shape, length)) or length < 1 or not shape:
        raise ValueError(f"shape {shape} in chunks of {length}")
    if not re.fullmatch("bool|u?int(8|16|32|64)|float(16|32|64)", str(kind)) or order != "little":
        raise ValueError(f"data type {kind!r} in {order}-endian order")
    if codecs != CODECS or rest != [max(size, 1) for size in shape[1:]]:
        raise ValueError(f"codecs {codecs}, chunks {[length, *rest]} are not those of format version 1")
    return shape, np.dtype(np.dtype(kind).newbyteorder("<").str), length


def _content_bytes(frame: memoryview) -> int | None:
    """The decompressed size that a zstd frame states (RFC 8878, 3.1.1.1); None if it states none."""
    flags = frame[4] if frame[:4] == ZSTD_MAGIC and len(frame) > 4 else 0
    single_segment, width = flags & 32, 1 << (flags >> 6)
    if width == 1 and not single_segment:
        return None
    start = (5 if single_segment else 6) + (0, 1, 2, 4)[flags & 3]
    return int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)
