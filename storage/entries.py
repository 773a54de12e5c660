"""What the stores share: an entry of a listing, the limit of a read, ranges that are one request."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from mmap import mmap

REQUESTS = 16  # concurrent requests to an object store


class TooLarge(ValueError):
    """A file has more bytes than its reader accepts."""


@dataclass(frozen=True)
class Entry:
    """One file of a listing."""

    path: str  # relative to the store
    size_bytes: int
    modified: datetime
    owner: str | None = None  # user name, on a file system


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges with each one joined to the one before it where that ends at its begin."""
    runs: list[tuple[int, int]] = []
    for begin, end in ranges:
        if runs and runs[-1][1] == begin:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((begin, end))
    return runs


def refuse_large(path: str, size_bytes: int, limit: int) -> None:
    """Raises TooLarge for a file of more bytes than its reader accepts."""
    if size_bytes > limit:
        raise TooLarge(f"{path} has {size_bytes} bytes, expected at most {limit}")


def holds(read: Callable[[str, int], bytes], path: str, data: bytes | mmap) -> bool:
    """Whether a file exists with this content. Its writer may remove it at any time, for example a released lease."""
    try:
        return memoryview(read(path, len(data))) == memoryview(data)
    except (FileNotFoundError, TooLarge):
        return False
