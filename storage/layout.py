"""Names, shapes and encodings on disk, format version 1. `docs/cache-format.md` describes the format.

Shapes: I images of a unit, V its views, R = I * V records, K total bytes of its keys.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from numcodecs import Zstd

from tinymim.configs.errors import CacheCorrupt, SourceError, UserError
from tinymim.storage.atomic import canonical_json, digest_hex
from tinymim.storage.manifest import REPAIR, Manifest
from tinymim.storage.store import Store

CHUNK_RECORDS = 64
ZSTD_LEVEL = 1
CRC_BYTES = 4
_ZSTD = Zstd()  # decoding needs no level
# A block of a zstd frame holds at most 128 KiB and takes at least 4 bytes (RFC 8878, 3.1.1.2).
ZSTD_MOST = 2**17 // 4
# The outer codec, the codecs of its chunks and of its index, and the place of the index.
CODECS = ("sharding_indexed", [["bytes", "zstd", "crc32c"], ["bytes", "crc32c"]], "end")
DTYPES: Mapping[str, str] = MappingProxyType(
    {"bool": "?"}
    | {f"{sign}int{8 * size}": f"<{sign or 'i'}{size}" for sign in ("", "u") for size in (1, 2, 4, 8)}
    | {f"float{8 * size}": f"<f{size}" for size in (2, 4, 8)}
)

ATTRIBUTE, DIGEST_ATTRIBUTE = "tinymim", "tinymim_digest"
_GROUP_FIELDS = {"node_type": "group", "zarr_format": 3}
METADATA = "zarr.json"
UNITS, COMMITS = "units", "commits"
CONSTANTS, CONSTANTS_RECORD = "constants", "constants.json"
LEASES = "leases"  # for active writers; readers ignore them
MANIFEST_LIMIT_BYTES = 2**28
COMMIT_LIMIT_BYTES = 2**26
_COMMIT_NAME = re.compile(rf"{COMMITS}/(?P<stem>[A-Za-z0-9_-]+)\.v(?P<first>[0-9]{{1,9}})-(?P<last>[0-9]{{1,9}})\.json")

KEY_ARRAYS = ("key_bytes", "key_ends")
# The arrays that every unit has besides the keys: dtype and shape after the record axis.
BASE_ARRAYS: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]] = MappingProxyType(
    {
        "box": (np.dtype("<i4"), (4,)),  # top, left, height, width in pixels of the image
        "flip": (np.dtype("u1"), ()),
        "digest": (np.dtype("<u8"), ()),  # digest of the view's pixels
    }
)


@dataclass(frozen=True, order=True)
class UnitId:
    """One source shard's records for the views `first_view .. first_view + num_views - 1`."""

    shard: str
    first_view: int
    num_views: int

    def __str__(self) -> str:
        return f"{self.shard} {self.view_range}"

    @property
    def view_range(self) -> str:
        """`v<first>-<last>`, both inclusive."""
        return f"v{self.first_view}-{self.first_view + self.num_views - 1}"

    @property
    def views(self) -> range:
        """The view indices, ascending."""
        return range(self.first_view, self.first_view + self.num_views)

    def row(self, image: int, view: int) -> int:
        """The index of the record of `view` (counted as in the recipe) of image number `image` in tar order."""
        return image * self.num_views + (view - self.first_view)


def shard_stem(shard: str) -> str:
    """A shard's name as one safe path part: `.tar` is removed, characters other than [A-Za-z0-9-] become `_`."""
    stem = re.sub(r"[^A-Za-z0-9-]", "_", shard.removesuffix(".tar"))
    return f"s{stem}" if not stem or stem.startswith("__") else stem  # zarr reserves names that start with `__`


def check_stems(shards: Iterable[str]) -> None:
    """Raises SourceError if two shards would share a folder; case is ignored, as on some file systems."""
    seen: dict[str, str] = {}
    for shard in shards:
        other = seen.setdefault(shard_stem(shard).lower(), shard)
        if other != shard:
            raise SourceError(
                "two source shards have the same name after conversion to a file name",
                got=f"{other!r} and {shard!r}",
                hint="rename one of them",
            )


def unit_folder(unit: UnitId) -> str:
    """The zarr group that holds the arrays of `unit`."""
    return f"{shard_folder(unit.shard)}/{unit.view_range}"


def shard_folder(shard: str) -> str:
    """The zarr group that holds the units of one source shard."""
    return f"{UNITS}/{shard_stem(shard)}"


def commit_file(unit: UnitId) -> str:
    """The commit record that makes `unit` visible."""
    return f"{COMMITS}/{shard_stem(unit.shard)}.{unit.view_range}.json"


def parse_commit_file(path: str, shards: Mapping[str, str]) -> UnitId | None:
    """The unit whose commit record has this path; None if there is no such unit.

    Args:
        path: a path relative to the cache.
        shards: names of the source shards by `shard_stem`.
    """
    match = _COMMIT_NAME.fullmatch(path)
    if match is None or match["stem"] not in shards:
        return None
    first, last = int(match["first"]), int(match["last"])
    return UnitId(shards[match["stem"]], first, last - first + 1) if last >= first else None


def read_manifest(store: Store) -> Manifest:
    """Read the manifest of the cache in `store`.

    Raises:
        UserError: there is no cache.
        CacheMismatch: its format version is unknown.
        CacheCorrupt: it is damaged.
    """
    hint = "name the cache that `tinymim cache-teacher` wrote"
    try:
        stored = json.loads(store.read(METADATA, MANIFEST_LIMIT_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no cache at {store.place}", hint=hint) from None
    except (ValueError, RecursionError) as error:
        raise CacheCorrupt(f"{store.place}/{METADATA} is damaged: {error}", hint=REPAIR) from error
    attributes = stored.get("attributes") if isinstance(stored, dict) else None
    if not isinstance(attributes, dict) or ATTRIBUTE not in attributes:
        raise UserError(f"{store.place}/{METADATA} is the metadata of a zarr group, not of a tinymim cache", hint=hint)
    manifest = Manifest.from_json(attributes.pop(ATTRIBUTE), f"{store.place}/{METADATA}")
    # The first caches stored no digest of their manifest.
    rest = {key: value for key, value in stored.items() if key != "attributes"}
    if attributes not in ({DIGEST_ATTRIBUTE: _manifest_digest(manifest)}, {}) or rest != _GROUP_FIELDS:
        raise CacheCorrupt(
            f"{store.place}/{METADATA} is damaged: the manifest does not have its {DIGEST_ATTRIBUTE}",
            hint=REPAIR,
        )
    return manifest


def root_group(manifest: Manifest) -> bytes:
    """The metadata of the root group, which holds the manifest and its digest."""
    return _group({ATTRIBUTE: manifest.to_json(), DIGEST_ATTRIBUTE: _manifest_digest(manifest)})


def _manifest_digest(manifest: Manifest) -> str:
    return digest_hex(canonical_json(manifest.to_json()))


def plain_group() -> bytes:
    """The metadata of every other group."""
    return _group({})


def encode_array(name: str, values: npt.NDArray[Any], whole: bool = False) -> dict[str, bytes]:
    """Encode an array as one zarr shard with inner chunks, zstd and crc32c.

    Args:
        name: the array's name.
        values: the array, with at least one axis.
        whole: write one inner chunk, as for keys and base arrays, which are small and always read whole.

    Returns:
        The files by path relative to the array's group.
    """
    # Imported here because reading needs no zarr: it would be half of what a loader worker imports beyond torch.
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec
    from zarr.storage import MemoryStore

    length = max(len(values), 1)
    whole = whole or name in KEY_ARRAYS or name in BASE_ARRAYS
    chunk = length if whole else min(CHUNK_RECORDS, length)
    inner = tuple(max(size, 1) for size in values.shape[1:])
    files: dict[str, Any] = {}  # zarr's buffers
    array = zarr.create_array(
        store=MemoryStore(files),
        name=name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(chunk, *inner),
        shards=(-(-length // chunk) * chunk, *inner),
        compressors=(ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()),
        fill_value=0,
        zarr_format=3,
        # Otherwise an array of zeros has no file and looks like one whose file was lost.
        config={"write_empty_chunks": True},
    )
    array[...] = values
    found = {path: data.to_bytes() for path, data in files.items() if path.startswith(f"{name}/")}
    # zarr's indented metadata has twice the size and differs between versions.
    metadata = json.loads(found[f"{name}/{METADATA}"])
    found[f"{name}/{METADATA}"] = json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode("ascii")
    return found


def decode_array(name: str, files: Mapping[str, bytes], num_records: int | None) -> npt.NDArray[Any]:
    """Decode an array from the bytes of its files, after their checksums were compared.

    This function unpacks chunks without zarr-python, whose event loop takes 2 to 3 ms an array, ten times the
    unpacking, and which reads a lost or empty file as zeros (3.1).

    Args:
        name: the array's name.
        files: its metadata and, unless it is empty, its payload, by path relative to its group.
        num_records: required length of its first axis; None: any.

    Raises:
        ValueError, RuntimeError: the metadata differs from what `encode_array` writes, or the payload does not fit it.
    """
    shape, dtype, length = _described(name, files[f"{name}/{METADATA}"])
    if num_records is not None and shape[0] != num_records:
        raise ValueError(f"it has {shape[0]} records, expected {num_records}")
    if 0 in shape:
        return np.empty(shape, dtype)
    payloads = [memoryview(data) for path, data in files.items() if not path.endswith(f"/{METADATA}")]
    if len(payloads) != 1:
        raise ValueError(f"it has {len(payloads)} payload files, expected 1")
    [payload] = payloads
    chunks = -(-shape[0] // length)
    # Checked before any allocation: a few bytes of metadata may claim any shape.
    if chunks * length * math.prod(shape[1:]) * dtype.itemsize > len(payload) * ZSTD_MOST:
        raise ValueError(f"{chunks} chunks of {[length, *shape[1:]]} cannot come out of {len(payload)} bytes")
    # The index at the end holds offset and size of each chunk as uint64, then its own crc32c.
    places = np.frombuffer(payload, "<u8", 2 * chunks, offset=len(payload) - 16 * chunks - CRC_BYTES).reshape(-1, 2)
    values = np.empty((chunks * length, *shape[1:]), dtype)
    for number, (offset, size_bytes) in enumerate(places.tolist()):
        if offset + size_bytes > len(payload) or size_bytes < CRC_BYTES:
            raise ValueError("a chunk lies outside its file")
        _ZSTD.decode(payload[offset : offset + size_bytes - CRC_BYTES], values[number * length : (number + 1) * length])
    return values[: shape[0]]


@lru_cache(maxsize=1024)
def _described(name: str, metadata: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, dtype and records per inner chunk; ValueError unless the metadata is what `encode_array` writes."""
    try:
        stored = json.loads(metadata)
        shape, kind = tuple(stored["shape"]), stored["data_type"]
        [sharding] = stored["codecs"]
        inner = sharding["configuration"]
        length, *rest = inner["chunk_shape"]
        chains = [[codec["name"] for codec in inner[key]] for key in ("codecs", "index_codecs")]
        order = inner["codecs"][0].get("configuration", {}).get("endian", "little")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name}/{METADATA} is damaged: {error!r}") from error
    if any(type(size) is not int or not 0 <= size < 2**62 for size in (*shape, length)) or length < 1 or not shape:
        raise ValueError(f"shape {shape} in chunks of {length}")
    if kind not in DTYPES or order != "little":
        raise ValueError(f"data type {kind!r} in {order}-endian order")
    codecs = (sharding["name"], chains, inner["index_location"])
    if codecs != CODECS or rest != [max(size, 1) for size in shape[1:]]:
        raise ValueError(f"codecs {codecs}, chunks {[length, *rest]} are not those of format version 1")
    return shape, np.dtype(DTYPES[kind]), length


def component(relative_path: str) -> str:
    """The array that a unit's file belongs to; "overhead" for metadata."""
    name, _, rest = relative_path.partition("/")
    return "overhead" if rest in ("", METADATA) else name


def encode_keys(keys: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """`key_bytes` uint8 [K], the keys joined in UTF-8, and `key_ends` int64 [I], where each key ends in it."""
    encoded = [key.encode() for key in keys]
    ends = np.cumsum([len(key) for key in encoded], dtype="<i8")
    return {"key_bytes": np.frombuffer(b"".join(encoded), dtype="u1"), "key_ends": ends}


def decode_keys(arrays: Mapping[str, npt.NDArray[Any]]) -> list[str]:
    """The I keys in tar order. Raises ValueError if the two arrays do not fit each other."""
    data, ends = arrays["key_bytes"].tobytes(), arrays["key_ends"].tolist()
    starts = [0, *ends[:-1]]
    if (ends[-1] if ends else 0) != len(data) or any(a > b for a, b in zip(starts, ends, strict=False)):
        raise ValueError("key_ends does not fit key_bytes")
    return [data[start:end].decode() for start, end in zip(starts, ends, strict=False)]


def _group(attributes: dict[str, Any]) -> bytes:
    return canonical_json({"attributes": attributes, **_GROUP_FIELDS})


def stored_bytes(values: npt.NDArray[Any]) -> int:
    """Size in bytes of an array's stored payload (compressed chunks and checksums), without its metadata."""
    files = encode_array("values", values)
    return sum(len(data) for path, data in files.items() if not path.endswith(METADATA))
