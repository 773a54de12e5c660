"""Names, shapes and encodings on disk, format version 1. `docs/cache-format.md` is this file in prose.

Legend: I images of a unit, V its views, R = I * V records, K total bytes of its keys.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from numcodecs import Zstd
from zarr.buffer.cpu import Buffer
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from tinymim.configs.errors import CacheCorrupt, SourceError, UserError
from tinymim.storage.atomic import PARTIAL_SUFFIX, write_json_atomic
from tinymim.storage.manifest import Manifest

CHUNK_RECORDS = 64
ZSTD_LEVEL = 1
CRC_BYTES = 4
_ZSTD = Zstd()  # decoding needs no level
ATTRIBUTE = "tinymim"
METADATA = "zarr.json"

KEY_ARRAYS = ("key_bytes", "key_ends")
# Arrays every unit has besides the keys: dtype and shape after the record axis.
BASE_ARRAYS: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]] = MappingProxyType(
    {
        "box": (np.dtype("<i4"), (4,)),
        "flip": (np.dtype("u1"), ()),
        "digest": (np.dtype("<u8"), ()),
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
        """The record of `view` (counted as in the recipe) of the unit's `image`-th image, in tar order."""
        return image * self.num_views + (view - self.first_view)


def shard_stem(shard: str) -> str:
    """A shard's name as one safe path part: without `.tar`, other than [A-Za-z0-9-] becomes `_`."""
    stem = re.sub(r"[^A-Za-z0-9-]", "_", shard.removesuffix(".tar"))
    return f"s{stem}" if not stem or stem.startswith("__") else stem  # zarr reserves names in `__`


def check_stems(shards: Iterable[str]) -> None:
    """Refuse with SourceError two shards that would share a folder (on any file system, so case apart)."""
    seen: dict[str, str] = {}
    for shard in shards:
        other = seen.setdefault(shard_stem(shard).lower(), shard)
        if other != shard:
            raise SourceError(
                "two source shards have the same name once made safe for a file system",
                got=f"{other!r} and {shard!r}",
                hint="rename one of them",
            )


def unit_folder(root: Path, unit: UnitId) -> Path:
    """The zarr group that holds the arrays of `unit`."""
    return root / "units" / shard_stem(unit.shard) / unit.view_range


def commits_folder(root: Path) -> Path:
    """The folder of the commit records."""
    return root / "commits"


def commit_file(root: Path, unit: UnitId) -> Path:
    """The commit record that makes `unit` visible."""
    return commits_folder(root) / f"{shard_stem(unit.shard)}.{unit.view_range}.json"


def constants_folder(root: Path) -> Path:
    """The zarr group that holds what the codec needs once per cache."""
    return root / "constants"


def constants_file(root: Path) -> Path:
    """The record that makes the constants visible."""
    return root / "constants.json"


def lock_file(root: Path) -> Path:
    """The file on which the one writer holds its lock."""
    return root / ".lock"


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write or replace the root group with `manifest` among its attributes, atomically."""
    write_json_atomic(root / METADATA, _group({ATTRIBUTE: manifest.to_json()}))


def read_manifest(root: Path) -> Manifest:
    """The manifest of the cache at `root`.

    Raises:
        UserError: there is no cache.
        CacheMismatch: its format version is unknown.
        CacheCorrupt: it is there but damaged.
    """
    hint = "name the folder that `tinymim cache-teacher` wrote"
    try:
        stored = json.loads((root / METADATA).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no cache at {root}", hint=hint) from None
    except ValueError as error:
        raise CacheCorrupt(f"{root / METADATA} is damaged: {error}") from error
    attributes = stored.get("attributes") if isinstance(stored, dict) else None
    if not isinstance(attributes, dict) or ATTRIBUTE not in attributes:
        raise UserError(f"{root} is a zarr folder but not a tinymim cache", hint=hint)
    return Manifest.from_json(attributes[ATTRIBUTE])


def is_foreign(root: Path) -> bool:
    """Whether `root` holds anything but what a writer that died before its manifest may have left."""
    if (root / METADATA).exists() or not root.exists():
        return False
    own = lock_file(root).name
    return any(item.name != own and item.suffix != PARTIAL_SUFFIX for item in root.iterdir())


def ensure_folders(root: Path, unit: UnitId | None = None) -> None:
    """Make the fixed folders of a cache and, of `unit`, the folder above its own; keep what is there."""
    commits_folder(root).mkdir(exist_ok=True)
    groups = [root / "units"]
    if unit is not None:
        groups.append(unit_folder(root, unit).parent)
    for group in groups:
        if not (group / METADATA).exists():
            write_group(group)


def write_group(folder: Path) -> None:
    """Make `folder` an empty zarr group."""
    folder.mkdir(exist_ok=True)
    write_json_atomic(folder / METADATA, _group({}))


def leftovers(root: Path, committed: Iterable[UnitId]) -> Iterator[Path]:
    """Folders and files that a dead writer left: units without a commit record, `*.partial`."""
    kept = {unit_folder(root, unit) for unit in committed}
    parents = {folder.parent for folder in kept}
    for folder in (root, commits_folder(root), root / "units", *sorted(parents)):
        yield from sorted(folder.glob(f"*{PARTIAL_SUFFIX}"))
    for shard in sorted(item for item in (root / "units").iterdir() if item.is_dir()):
        if shard not in parents:
            yield shard
        else:
            yield from sorted(item for item in shard.iterdir() if item.is_dir() and item not in kept)


def write_array(group: Path, name: str, values: npt.NDArray[Any], whole: bool = False) -> None:
    """Write `values` as the array `name`: one zarr shard, inner chunks of 64 records, zstd, crc32c.

    Keys and base arrays are small and always read whole: they get one inner chunk, as do others on demand.
    """
    length = max(len(values), 1)
    whole = whole or name in KEY_ARRAYS or name in BASE_ARRAYS
    chunk = length if whole else min(CHUNK_RECORDS, length)
    inner = tuple(max(size, 1) for size in values.shape[1:])
    array = zarr.create_array(
        store=str(group),
        name=name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(chunk, *inner),
        shards=(-(-length // chunk) * chunk, *inner),
        compressors=(ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()),
        fill_value=0,
        zarr_format=3,
        # Without it an array of zeros has no file, which nobody could tell from a lost one.
        config={"write_empty_chunks": True},
    )
    array[...] = values


def decode_array(name: str, files: Mapping[str, bytes]) -> npt.NDArray[Any]:
    """The array `name` from the bytes of its files (paths relative to its group); zarr's errors pass."""
    store = MemoryStore({path: Buffer.from_bytes(data) for path, data in files.items()}, read_only=True)
    array = zarr.open_array(store, path=name, mode="r")
    if array.size and len(files) < 2:
        raise ValueError("no payload file")
    return np.asarray(array[...])


def decode_checked_array(name: str, files: Mapping[str, bytes]) -> npt.NDArray[Any]:
    """As `decode_array`, for files whose digests were compared: chunks are unpacked here, without zarr's event loop.

    zarr-python takes 2 to 3 ms an array, ten times what unpacking takes (docs/log.md); a unit has ten arrays and more.

    Raises:
        ValueError: the metadata is not what `write_array` writes, or chunks do not fit it.
    """
    metadata = json.loads(files[f"{name}/{METADATA}"])
    [sharding] = metadata["codecs"]
    inner = sharding["configuration"]
    chain = [codec["name"] for codec in inner["codecs"]]
    if (
        sharding["name"] != "sharding_indexed"
        or chain != ["bytes", "zstd", "crc32c"]
        or inner["index_location"] != "end"
    ):
        raise ValueError(f"codecs {chain} are not those of format version 1")
    shape, length = tuple(metadata["shape"]), inner["chunk_shape"][0]
    dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
    if 0 in shape:
        return np.empty(shape, dtype)
    [payload] = [memoryview(data) for path, data in files.items() if not path.endswith(METADATA)]
    chunks = -(-shape[0] // length)
    # The index, at the end: offset and size of each chunk as uint64, then the index's own crc32c.
    places = np.frombuffer(payload, "<u8", 2 * chunks, offset=len(payload) - 16 * chunks - CRC_BYTES).reshape(-1, 2)
    values = np.empty((chunks * length, *shape[1:]), dtype)
    for number, (offset, size_bytes) in enumerate(places.tolist()):
        _ZSTD.decode(payload[offset : offset + size_bytes - CRC_BYTES], values[number * length : (number + 1) * length])
    return values[: shape[0]]


def component(relative_path: str) -> str:
    """The array a unit's file belongs to, "overhead" for metadata."""
    name, _, rest = relative_path.partition("/")
    return "overhead" if rest in ("", METADATA) else name


def encode_keys(keys: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """`key_bytes` uint8 [K], the keys' UTF-8 end to end, and `key_ends` int64 [I], their ends in it."""
    encoded = [key.encode() for key in keys]
    ends = np.cumsum([len(key) for key in encoded], dtype="<i8")
    return {"key_bytes": np.frombuffer(b"".join(encoded), dtype="u1"), "key_ends": ends}


def decode_keys(arrays: Mapping[str, npt.NDArray[Any]]) -> list[str]:
    """The I keys in tar order; ValueError if the arrays do not describe any."""
    data, ends = arrays["key_bytes"].tobytes(), arrays["key_ends"].tolist()
    starts = [0, *ends[:-1]]
    if (ends[-1] if ends else 0) != len(data) or any(a > b for a, b in zip(starts, ends, strict=False)):
        raise ValueError("key_ends does not fit key_bytes")
    return [data[start:end].decode() for start, end in zip(starts, ends, strict=False)]


def _group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"attributes": attributes, "node_type": "group", "zarr_format": 3}
