"""A packed cache: the files of a finished cache in a few large tars, for places that take few files well.

    cache.json                      the tars, and which files lie in each
    cache-00000-of-00002.tar ...    the files of the cache, sorted, in plain tars that `tar` unpacks

The index gives names and sizes, and the place of each file in its tar follows from them. A packed cache can therefore
be read where it lies. Nothing of a tar is trusted: its records carry the checksums that every reader compares.
"""

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.storage.atomic import digest_hex
from tinymim.storage.entries import Entry, TooLarge
from tinymim.storage.layout import METADATA, is_of_cache
from tinymim.storage.manifest import Size, invalid_fields
from tinymim.storage.read_only import ReadOnlyStore
from tinymim.storage.store import Store, open_store

INDEX = "cache.json"
CARD = "README.md"
FORMAT, VERSION = "tinymim packed cache", 1
LIMIT_BYTES = 2**30  # of the index
TAR_BYTES = 4 * 2**30  # of a tar, unless one file is larger
BLOCK_BYTES = 512
END = bytes(2 * BLOCK_BYTES)
REMEDY = "fetch it again, or pack the cache again"
_EPOCH = datetime.fromtimestamp(0, UTC)


class PackedTar(BaseModel):
    """One tar: its digest, and the files in it in order, as (path, bytes)."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^cache-[0-9]{5}-of-[0-9]{5}\.tar$")]
    size_bytes: Size
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    files: list[tuple[str, Size]]


class PackedIndex(BaseModel):
    """The content of `cache.json`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    format: str
    format_version: int
    spec_id: str  # of the cache
    layers: dict[str, str]  # spec_id of each target layer
    tars: list[PackedTar]

    def encode(self) -> bytes:
        """The stored bytes, with a digest of themselves."""
        content = self.model_dump(mode="json")
        return _compact(content | {"digest": digest_hex(_compact(content))}) + b"\n"


def _compact(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")


def tar_header(path: str, size_bytes: int) -> bytes:
    """What precedes a file in a tar; depends on nothing else."""
    info = tarfile.TarInfo(path)
    info.size, info.mode = size_bytes, 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def header_bytes(path: str, size_bytes: int) -> int:
    """Length of `tar_header`."""
    plain = len(path) <= 100 and path.isascii() and size_bytes < 8 * 2**30
    return BLOCK_BYTES if plain else len(tar_header(path, size_bytes))


def padding(size_bytes: int) -> int:
    """Bytes after a file up to the next block."""
    return -size_bytes % BLOCK_BYTES


def parse_index(data: bytes, owner: str) -> PackedIndex:
    """Parse `cache.json`, stored at `owner`.

    Raises:
        UserError: it is another program's file.
        CacheMismatch: its version is unknown.
        CacheCorrupt: it is damaged, or names files that are not a cache's.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CacheCorrupt(f"{owner} is damaged: {error}", hint=REMEDY) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{owner} is not the index of a packed cache")
    if content.get("format_version") != VERSION:
        raise CacheMismatch(
            f"format_version of {owner} is unknown",
            got=content.get("format_version"),
            expected=VERSION,
            hint="use the version of tinymim that wrote it, or upgrade tinymim",
        )
    digest = content.pop("digest", None)
    try:
        if digest_hex(_compact(content)) != digest:
            raise ValueError("its content does not have its digest")
        for tar in content.get("tars", ()):
            tar["files"] = [tuple(file) for file in tar["files"]]
        index = PackedIndex.model_validate(content)
        _require_sound(index)
    except ValidationError as error:
        raise CacheCorrupt(f"{owner} is damaged: {'; '.join(invalid_fields('', error))}", hint=REMEDY) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CacheCorrupt(f"{owner} is damaged: {error}", hint=REMEDY) from error
    return index


def _require_sound(index: PackedIndex) -> None:
    seen: set[str] = set()
    for tar in index.tars:
        size_bytes = len(END)
        for path, file_bytes in tar.files:
            if not is_of_cache(path) or ".." in path.split("/") or path in seen:
                raise ValueError(f"{path[:200]!r} is not the path of a cache's file, or stands there twice")
            seen.add(path)
            size_bytes += header_bytes(path, file_bytes) + file_bytes + padding(file_bytes)
        if size_bytes != tar.size_bytes:
            raise ValueError(f"{tar.name} has {tar.size_bytes} bytes, its files make {size_bytes}")
    if len({tar.name for tar in index.tars}) != len(index.tars):
        raise ValueError("it names a tar twice")


def open_cache_store(place: Path | str) -> Store:
    """The store of the files of the cache at a place, which may be packed.

    Raises:
        UserError, CacheMismatch, CacheCorrupt: as `parse_index`.
        StoreError: the object store refuses or fails.
    """
    store = open_store(place)
    if store.exists(METADATA) or not store.exists(INDEX):
        return store
    try:
        return PackedStore(store, parse_index(store.read(INDEX, LIMIT_BYTES), f"{store.place}/{INDEX}"))
    except (TooLarge, OSError) as error:
        raise CacheCorrupt(f"{store.place}/{INDEX} cannot be read: {error}", hint=REMEDY) from error


@dataclass
class PackedStore(ReadOnlyStore):
    """The files of a packed cache, to be read only."""

    tars: Store
    index: PackedIndex

    @property
    def distant(self) -> bool:
        """As the store of the tars."""
        return self.tars.distant

    @property
    def place(self) -> Path | str:
        """The place of the tars."""
        return self.tars.place

    @cached_property
    def _members(self) -> dict[str, tuple[str, int, int]]:
        """Tar, offset and size of every file."""
        found = {}
        for tar in self.index.tars:
            at = 0
            for path, size_bytes in tar.files:
                at += header_bytes(path, size_bytes)
                found[path] = (tar.name, at, size_bytes)
                at += size_bytes + padding(size_bytes)
        return found

    def _member(self, path: str) -> tuple[str, int, int]:
        try:
            return self._members[path]
        except KeyError:
            raise FileNotFoundError(f"{self.place}/{path}") from None

    def read(self, path: str, limit: int) -> bytes:
        tar, at, size_bytes = self._member(path)
        if size_bytes > limit:
            raise TooLarge(f"{path} has {size_bytes} bytes, expected at most {limit}")
        header = tar_header(path, size_bytes)
        data = b"".join(self.tars.read_ranges(tar, [(at - len(header), at + size_bytes)]))
        if data[: len(header)] != header:
            raise CacheCorrupt(f"{self.place}/{tar} does not hold {path} where {INDEX} names it", hint=REMEDY)
        return data[len(header) :]

    def read_all(self, limits: Mapping[str, int]) -> dict[str, bytes]:
        return {path: self.read(path, limit) for path, limit in limits.items()}

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        tar, at, size_bytes = self._member(path)
        cut = [(at + min(begin, size_bytes), at + min(end, size_bytes)) for begin, end in ranges]
        yield from self.tars.read_ranges(tar, cut)

    def exists(self, path: str) -> bool:
        return path in self._members

    def list(self, prefix: str = "") -> Iterator[Entry]:
        start = f"{prefix}/" if prefix else ""
        for path, (_, _, size_bytes) in self._members.items():
            if path.startswith(start):
                yield Entry(path, size_bytes, _EPOCH)

    def refuse(self) -> NoReturn:
        raise UserError(
            f"the packed cache {self.place} cannot be changed",
            hint="`tinymim cache copy PACKED DST` unpacks it; change that one",
        )
