"""The members of shards: keys, places and labels of their images, and the file beside the shards that holds them.

`index.members` spares every process the headers of the tars. It holds a block for each shard, then a table:

    block   int64 offsets [n], sizes [n], labels [n], key_ends [n], then the keys in UTF-8; starts at a multiple of 4096
    table   JSON: name, size, content hash and modification time of each shard; start, lengths and crc32 of its block
    tail    24 bytes: start and length of the table, its crc32, the format

Blocks are memory-mapped, so processes share them, and compared with their crc32 at first use. A block is used only
for a shard of the same size, content hash and modification time, because an index with the hash can be stale itself. A
lost, damaged or stale file costs time, nothing else.
"""

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Final, Self, overload

import numpy as np
import numpy.typing as npt

from tinymim.configs.errors import naming
from tinymim.storage.atomic import fsync_folder, partial_path, remove_partials

MEMBERS_NAME: Final = "index.members"
MAPPED_SHARDS: Final = 128  # shards whose members a process keeps mapped; each takes a file descriptor
_ALIGN: Final = 4096  # a block is mapped from a page on
_ARRAYS: Final = 4
_TAIL: Final = struct.Struct("<qqII")
_FORMAT: Final = 0x316D6D74  # "tmm1"; another one where another image or label would be found in a tar


class Keys(Sequence[str]):
    """The keys of a shard in tar order. They lie in one buffer; a key becomes a string when it is used."""

    __slots__ = ("_ends", "_text")

    def __init__(self, ends: npt.NDArray[np.int64], text: npt.NDArray[np.uint8]) -> None:
        self._ends, self._text = ends, text

    @classmethod
    def of(cls, keys: Sequence[str]) -> "Keys":
        raw = [key.encode() for key in keys]
        ends = np.cumsum([len(key) for key in raw], dtype=np.int64)
        return cls(ends, np.frombuffer(b"".join(raw), dtype=np.uint8))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        start = int(self._ends[place - 1]) if place else 0
        return self._text[start : int(self._ends[place])].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        text, start = self._text.tobytes(), 0
        for end in self._ends.tolist():
            yield text[start:end].decode()
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]  # equal to a tuple, whose hash it has not

    def __repr__(self) -> str:
        return f"Keys({list(self[:3])}{', ...' if len(self) > 3 else ''})"

    def packed(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """The ends of the keys in bytes, int64 [n], and the bytes of all keys."""
        return self._ends, self._text


@dataclass(frozen=True)
class Members:
    """The images of one tar in tar order: keys, byte offsets and sizes, and class numbers (-1: none)."""

    keys: Keys
    offsets: npt.NDArray[np.int64]  # [images]
    sizes: npt.NDArray[np.int64]  # [images], bytes
    labels: npt.NDArray[np.int64]  # [images]


@dataclass(frozen=True, slots=True)
class Block:
    """The place of one shard's members in the members file of its folder."""

    start: int
    num_samples: int
    key_bytes: int
    crc32: int

    @property
    def size_bytes(self) -> int:
        return 8 * _ARRAYS * self.num_samples + self.key_bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One shard of a members file, as it was when its members were read."""

    name: str
    size_bytes: int
    content_hash: str
    mtime_ns: int
    block: Block

    def describes(self, size_bytes: int, content_hash: str, mtime_ns: int) -> bool:
        return (self.size_bytes, self.content_hash, self.mtime_ns) == (size_bytes, content_hash, mtime_ns)


class MembersWriter:
    """Writes the members file of a folder. The file appears complete, by rename, when the block ends without an error.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / MEMBERS_NAME
        self._partial = partial_path(self._path)
        self._entries: list[Entry] = []

    def __enter__(self) -> Self:
        with suppress(OSError):
            remove_partials([self._path.parent])  # of killed processes
        self._file = open(self._partial, "wb")  # closed in __exit__
        return self

    def add(self, name: str, size_bytes: int, content_hash: str, mtime_ns: int, members: Members) -> None:
        """Append one shard, identified as in `Entry`."""
        ends, text = members.keys.packed()
        arrays = (members.offsets, members.sizes, members.labels, ends)
        data = b"".join([*(array.astype("<i8").tobytes() for array in arrays), text.tobytes()])
        with naming(self._path):
            start = self._pad()
            self._file.write(data)
        block = Block(start, len(ends), text.size, zlib.crc32(data))
        self._entries.append(Entry(name, size_bytes, content_hash, mtime_ns, block))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with naming(self._path), self._file:
                if error is not None:
                    return
                table = json.dumps([asdict(entry) for entry in self._entries]).encode()
                start = self._pad()
                self._file.write(table + _TAIL.pack(start, len(table), zlib.crc32(table), _FORMAT))
                self._file.flush()
                os.fsync(self._file.fileno())
            os.replace(self._partial, self._path)
            fsync_folder(self._path.parent)
        finally:
            with suppress(OSError):
                self._partial.unlink(missing_ok=True)

    def _pad(self) -> int:
        """Fill up to the next multiple of a page. Returns the place."""
        place = self._file.tell()
        self._file.write(bytes(-place % _ALIGN))
        return place + -place % _ALIGN


def read_table(folder: Path) -> dict[str, Entry]:
    """The shards of a folder's members file by name; empty where there is none or its table is damaged."""
    _mapped.cache_clear()  # the file may have been replaced
    try:
        with open(folder / MEMBERS_NAME, "rb") as file:
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(max(0, size_bytes - _TAIL.size))
            start, length, crc32, form = _TAIL.unpack(file.read(_TAIL.size))
            if form != _FORMAT or not 0 <= start <= start + length <= size_bytes:
                return {}
            file.seek(start)
            table = file.read(length)
            if zlib.crc32(table) != crc32:
                return {}
            rows = json.loads(table)
        return {row["name"]: Entry(**row | {"block": Block(**row["block"])}) for row in rows}
    except (OSError, struct.error, ValueError, TypeError, KeyError, RecursionError):
        return {}


def load_members(folder: Path, block: Block) -> Members | None:
    """The members in a block, or None where the file was replaced or damaged since its table was read."""
    mapped = _mapped(folder, block)
    if mapped is None:
        return None
    n = block.num_samples
    arrays = np.frombuffer(mapped, dtype="<i8", count=_ARRAYS * n).reshape(_ARRAYS, n)
    offsets, sizes, labels, ends = arrays
    text = np.frombuffer(mapped, dtype=np.uint8, count=block.key_bytes, offset=8 * _ARRAYS * n)
    return Members(Keys(ends, text), offsets, sizes, labels)


@lru_cache(maxsize=MAPPED_SHARDS)
def _mapped(folder: Path, block: Block) -> mmap.mmap | None:
    try:
        with open(folder / MEMBERS_NAME, "rb") as file:
            mapped = mmap.mmap(file.fileno(), block.size_bytes, access=mmap.ACCESS_READ, offset=block.start)
    except (OSError, ValueError):  # ValueError: the file is shorter
        return None
    return mapped if zlib.crc32(mapped) == block.crc32 else None
