"""The file of a unit: an uncompressed zip of zarr arrays, written in one pass and read view by view.

    zarr.json, <array>/zarr.json ...            the head: metadata
    key_bytes/..., key_ends/...                 the keys, in the view layer's units that begin at view 0
    <array>/c/<view>/<n>/0 ...                  a block per view: the chunks of all arrays
    the zip's directory                         the tail

Every array is [V, I, ...]. A chunk holds one view of consecutive images. The commit record has size and crc32c of every
block, so a block that is read alone is checked as strictly as the whole file.

Shapes: V views of the unit, I images, K total bytes of its keys.
"""

import io
import itertools
import json
import math
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from google_crc32c import value as crc32c
from numcodecs import Zstd

Array = npt.NDArray[Any]
ArrayType = tuple[np.dtype[Any], tuple[int, ...]]  # dtype and shape of one record

ZSTD_LEVEL = 1
CHUNK_BYTES = 2**26  # largest chunk before compression, unless one record is larger
KEY_ARRAYS = ("key_bytes", "key_ends")
DIGEST = "digest"
# The arrays of the view layer: the low 32 bits of the digest of a view's pixels (I2).
VIEW_ARRAYS: Mapping[str, ArrayType] = {DIGEST: (np.dtype("<u4"), ())}
_GROUP = b'{"attributes":{},"node_type":"group","zarr_format":3}'
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date that a zip can state: nothing written depends on time
# A block of a zstd frame holds at most 128 KiB and takes at least 4 bytes (RFC 8878, 3.1.1.2).
ZSTD_MOST = 2**17 // 4
_ENCODE, _DECODE = Zstd(ZSTD_LEVEL), Zstd()


@dataclass(frozen=True, slots=True)
class Block:
    """Size in bytes and crc32c of one part of a unit's file."""

    size_bytes: int
    crc32c: int


@dataclass(frozen=True)
class UnitParts:
    """The parts of a unit's file in order, and the digest of the whole."""

    head: Block
    keys: Block | None
    views: tuple[Block, ...]
    tail: Block
    blake2b: str

    @property
    def all(self) -> tuple[Block, ...]:
        """Every part in order."""
        return (self.head, *([] if self.keys is None else [self.keys]), *self.views, self.tail)

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return sum(block.size_bytes for block in self.all)

    def places(self) -> list[int]:
        """V + 1 offsets: where each view's block begins, and where the last one ends."""
        first = self.head.size_bytes + (0 if self.keys is None else self.keys.size_bytes)
        return list(itertools.accumulate((block.size_bytes for block in self.views), initial=first))


def images_per_chunk(kind: ArrayType, images: int) -> int:
    """Images of one chunk of an array."""
    dtype, shape = kind
    return max(1, min(images, CHUNK_BYTES // max(math.prod(shape) * dtype.itemsize, 1)))


class UnitFileWriter:
    """Writes a unit's file from front to back, with one block in memory.

    Args:
        out: an empty file open for writing.
        images: I.
        num_views: V.
        arrays: the arrays by name.
        keys: the sample keys, where the unit holds them.
    """

    def __init__(
        self,
        out: BinaryIO,
        images: int,
        num_views: int,
        arrays: Mapping[str, ArrayType],
        keys: Mapping[str, Array] | None,
    ) -> None:
        self._window = _Window(out)
        self._zip = zipfile.ZipFile(self._window, "w", zipfile.ZIP_STORED)
        self._images, self._num_views, self._arrays = images, num_views, dict(sorted(arrays.items()))
        self._views: list[Block] = []
        self._member("zarr.json", _GROUP)
        for name, values in (keys or {}).items():
            self._member(f"{name}/zarr.json", _metadata(values.shape, values.shape, values.dtype))
        for name, (dtype, shape) in self._arrays.items():
            chunk = (1, images_per_chunk((dtype, shape), images), *shape)
            self._member(f"{name}/zarr.json", _metadata((num_views, images, *shape), chunk, dtype))
        self._head = self._window.take()
        self._keys: Block | None = None
        if keys is not None:
            for name, values in keys.items():
                if values.size:
                    self._member(f"{name}/c/0", _encoded(values))
            self._keys = self._window.take()

    @property
    def views_written(self) -> int:
        """Blocks written so far."""
        return len(self._views)

    def add(self, arrays: Mapping[str, Array]) -> None:
        """Write the block of the next view; arrays [I, ...] by name."""
        view = len(self._views)
        for name, kind in self._arrays.items():
            values = arrays[name]
            assert values.shape == (self._images, *kind[1]) and values.dtype == kind[0], (name, values.shape)
            step = images_per_chunk(kind, self._images)
            for number, start in enumerate(range(0, self._images, step)):
                chunk = _padded(values[start : start + step], step)
                self._member(_chunk_name(name, view, number, kind), _encoded(chunk))
        self._views.append(self._window.take())

    def close(self) -> UnitParts:
        """Write the tail, after all views."""
        assert len(self._views) == self._num_views, f"{len(self._views)} of {self._num_views} views"
        self._zip.close()
        tail = self._window.take()
        return UnitParts(self._head, self._keys, tuple(self._views), tail, self._window.digest.hexdigest())

    def _member(self, name: str, data: bytes) -> None:
        info = zipfile.ZipInfo(name, _EPOCH)
        info.create_system = 3  # Unix, on every machine
        self._zip.writestr(info, data)


class _Window:
    """A file for `zipfile` that holds back what was written since the last `take`.

    zipfile goes back to the header of a member when it has written it. Everything before the last `take` has its digest
    and cannot change. The directory that zipfile writes when a unit is abandoned goes nowhere.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out, self._begin, self._at = out, 0, 0
        self._held = bytearray()
        self.digest = blake2b(digest_size=16)

    def seekable(self) -> bool:
        return True

    def flush(self) -> None:
        """`take` writes."""

    def close(self) -> None:
        """The owner of the file closes it."""

    def tell(self) -> int:
        return self._begin + self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        base = {0: -self._begin, 1: self._at, 2: len(self._held)}[whence]
        assert base + offset >= 0, "zipfile goes back before the last `take`"
        self._at = base + offset
        return self.tell()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._held[self._at : self._at + len(view)] = view
        self._at += len(view)
        return len(view)

    def take(self) -> Block:
        """Write what is held back to the file."""
        data = bytes(self._held)
        self._out.write(data)
        self.digest.update(data)
        self._begin += len(data)
        self._held.clear()
        self._at = 0
        return Block(len(data), crc32c(data))


# ---- reading


def decode_view(
    block: memoryview, view: int, images: int, arrays: Mapping[str, Array], kinds: Mapping[str, ArrayType]
) -> None:
    """Decode the block of a view, whose checksum was compared, into arrays.

    Args:
        block: the bytes of the block.
        view: the view's place in its unit.
        images: I.
        arrays: by name, the arrays [I, ...] to fill; other arrays of the block are skipped.
        kinds: all arrays of the layer, by name.

    Raises:
        ValueError, RuntimeError: the block is not what `UnitFileWriter` writes.
    """
    members = _members(block)
    for name, kind in sorted(kinds.items()):
        step = images_per_chunk(kind, images)
        for number, start in enumerate(range(0, images, step)):
            wanted = _chunk_name(name, view, number, kind)
            found, data = next(members, ("nothing", memoryview(b"")))
            if found != wanted:
                raise ValueError(f"{found[:80]!r} stands where {wanted} belongs")
            if name in arrays:
                _decode_into(data, arrays[name][start : start + step], step)
    if (left := next(members, None)) is not None:
        raise ValueError(f"{left[0][:80]!r} stands where the block ends")


def decode_keys(block: memoryview, images: int) -> tuple[dict[str, Array], list[str]]:
    """The key arrays and the I keys from the block of the keys, whose checksum was compared.

    Raises:
        ValueError, RuntimeError: the block is not what `UnitFileWriter` writes.
    """
    frames = {name: data for name, data in _members(block)}
    ends = np.empty(images, "<i8")
    if images:
        _decode_into(frames.pop("key_ends/c/0", memoryview(b"")), ends, images)
    total = int(ends[-1]) if images else 0
    joined = memoryview(frames.pop("key_bytes/c/0", b""))
    if frames or not 0 <= total <= len(joined) * ZSTD_MOST or bool(total) != bool(joined):
        raise ValueError(f"{len(frames)} other members, and {total} bytes of keys from {len(joined)}")
    values = np.empty(total, "u1")
    if total:
        _decode_into(joined, values, total)
    arrays: dict[str, Array] = {"key_bytes": values, "key_ends": ends}
    return arrays, keys_of(arrays)


def decode_arrays(files: Mapping[str, bytes]) -> dict[str, Array]:
    """Arrays from the members of `encode_arrays`. Raises ValueError, RuntimeError for any other content."""
    arrays = {}
    names = [path.removesuffix("/zarr.json") for path in files if path.endswith("/zarr.json")]
    for name in sorted(names):
        shape, dtype = _described(name, files[f"{name}/zarr.json"])
        path = "/".join([name, "c", *("0" for _ in shape)])
        data = memoryview(files.get(path, b""))
        if math.prod(shape) * dtype.itemsize > len(data) * ZSTD_MOST:
            raise ValueError(f"{name}: {shape} cannot come out of {len(data)} bytes")
        values = np.empty(shape, dtype)
        if values.size:
            _decode_into(data, values, len(values))
        arrays[name] = values
    return arrays


def encode_arrays(arrays: Mapping[str, Array]) -> bytes:
    """A zip of whole zarr arrays, one chunk each, as for a layer's constants."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in itertools.chain([("zarr.json", _GROUP)], _whole(arrays)):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system = 3
            archive.writestr(info, data)
    return out.getvalue()


def unzipped(data: bytes) -> dict[str, bytes]:
    """The members of a small zip by name. Raises ValueError for anything but an intact uncompressed zip."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ValueError("a member is compressed")
            return {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(str(error)) from error


def _whole(arrays: Mapping[str, Array]) -> Iterator[tuple[str, bytes]]:
    for name, values in sorted(arrays.items()):
        yield f"{name}/zarr.json", _metadata(values.shape, values.shape, values.dtype)
        if values.size:
            yield "/".join([name, "c", *("0" for _ in values.shape)]), _encoded(values)


def _members(block: memoryview) -> Iterator[tuple[str, memoryview]]:
    """Name and content of the zip members in a block. Raises ValueError where the bytes are something else."""
    at = 0
    while at < len(block):
        if len(block) - at < _LOCAL_HEADER.size:
            raise ValueError("a member lies outside its block")
        signature, _, flags, method, _, _, _, packed, size, name, extra = _LOCAL_HEADER.unpack_from(block, at)
        begin = at + _LOCAL_HEADER.size + name + extra
        if signature != b"PK\x03\x04" or method or flags & 8 or packed != size or begin + size > len(block):
            raise ValueError("a member's header is not what tinymim writes")
        yield bytes(block[begin - name - extra : begin - extra]).decode(), block[begin : begin + size]
        at = begin + size


def _decode_into(data: memoryview, values: Array, rows: int) -> None:
    """Decode a chunk of `rows` rows, of which the first are `values`."""
    whole = values if len(values) == rows else np.empty((rows, *values.shape[1:]), values.dtype)
    # A frame that holds fewer bytes than it should would leave uninitialised memory in the array.
    if _frame_size(data) != whole.nbytes:
        raise ValueError(f"a chunk of {_frame_size(data)} bytes, expected {whole.nbytes}")
    out = _DECODE.decode(data, whole)
    assert out is whole
    if whole is not values:
        values[...] = whole[: len(values)]


def _frame_size(data: memoryview) -> int:
    """The content size that the header of a zstd frame states (RFC 8878, 3.1.1.1). Raises ValueError without one."""
    if len(data) < 6 or bytes(data[:4]) != b"\x28\xb5\x2f\xfd":
        raise ValueError("a chunk is no zstd frame")
    flags = data[4]
    single, code = flags >> 5 & 1, flags >> 6
    size = (1 if single else 0, 2, 4, 8)[code]
    begin = 5 + (0 if single else 1) + (0, 1, 2, 4)[flags & 3]
    if not size or len(data) < begin + size:
        raise ValueError("a zstd frame does not state its size")
    return int.from_bytes(data[begin : begin + size], "little") + (256 if size == 2 else 0)


def _padded(values: Array, rows: int) -> Array:
    if len(values) == rows:
        return values
    return np.concatenate([values, np.zeros((rows - len(values), *values.shape[1:]), values.dtype)])


def _encoded(values: Array) -> bytes:
    return bytes(_ENCODE.encode(np.ascontiguousarray(values)))


def _chunk_name(name: str, view: int, number: int, kind: ArrayType) -> str:
    return "/".join([name, "c", str(view), str(number), *("0" for _ in kind[1])])


def _metadata(shape: Sequence[int], chunk: Sequence[int], dtype: np.dtype[Any]) -> bytes:
    """The zarr v3 metadata of an array."""
    fill: object = {"b": False, "f": 0.0}.get(dtype.kind, 0)
    content = {
        "attributes": {},
        "chunk_grid": {"configuration": {"chunk_shape": [max(size, 1) for size in chunk]}, "name": "regular"},
        "chunk_key_encoding": {"configuration": {"separator": "/"}, "name": "default"},
        "codecs": [
            {"configuration": {"endian": "little"}, "name": "bytes"},
            {"configuration": {"checksum": False, "level": ZSTD_LEVEL}, "name": "zstd"},
        ],
        "data_type": dtype.name,
        "fill_value": fill,
        "node_type": "array",
        "shape": list(shape),
        "storage_transformers": [],
        "zarr_format": 3,
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")


def _described(name: str, metadata: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of a whole array; ValueError unless the metadata is what `_metadata` writes."""
    try:
        stored = json.loads(metadata)
        shape, dtype = tuple(stored["shape"]), np.dtype(stored["data_type"]).newbyteorder("<")
        same = _metadata(shape, shape, dtype) == metadata
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name}/zarr.json is damaged: {error!r}") from error
    if not same or any(type(size) is not int or not 0 <= size < 2**62 for size in shape):
        raise ValueError(f"{name}/zarr.json is not what tinymim writes")
    return shape, dtype


# ---- keys


def key_arrays(keys: Iterable[str]) -> dict[str, Array]:
    """`key_bytes` uint8 [K], the keys joined in UTF-8, and `key_ends` int64 [I], where each key ends in it."""
    encoded = [key.encode() for key in keys]
    ends = np.cumsum([len(key) for key in encoded], dtype="<i8")
    return {"key_bytes": np.frombuffer(b"".join(encoded), dtype="u1"), "key_ends": ends}


def keys_of(arrays: Mapping[str, Array]) -> list[str]:
    """The I keys in tar order. Raises ValueError if the two arrays do not fit each other."""
    data, ends = arrays["key_bytes"].tobytes(), arrays["key_ends"].tolist()
    starts = [0, *ends[:-1]]
    if (ends[-1] if ends else 0) != len(data) or any(a > b for a, b in zip(starts, ends, strict=False)):
        raise ValueError("key_ends does not fit key_bytes")
    return [data[start:end].decode() for start, end in zip(starts, ends, strict=False)]
