"""The files of a cache, in a folder or below a prefix of an object store. The rest of storage uses only this interface.

A store needs two properties: a file is written whole or not at all, and one of several writers that create the same
file wins. The same code therefore serves a disk, a network file system and S3.
"""

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from tinymim.configs.errors import UserError
from tinymim.storage.entries import Entry
from tinymim.storage.local import LocalStore
from tinymim.storage.remote import RemoteStore


class Store(Protocol):
    """Named files below one place. Paths are relative, with slashes. A folder exists only through its files.

    A missing file raises FileNotFoundError. Other failures raise OSError for a folder, StoreError for an object store.
    """

    @property
    def distant(self) -> bool:
        """Whether answers take long, so that several requests should be made in parallel."""

    @property
    def place(self) -> Path | str:
        """The folder, or the URL without a trailing slash."""

    def read(self, path: str, limit: int) -> bytes:
        """Read a whole file. Raises TooLarge, before any allocation, if it has more than `limit` bytes."""

    def read_all(self, limits: Mapping[str, int]) -> dict[str, bytes]:
        """Read several files, in parallel where that is faster; errors of `read`."""

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        """Read parts of a file, each from its begin to its end, exclusive. A part is short where the file ends.

        A folder's parts are read one by one, as the iterator advances; adjacent parts of an object are one request.
        """

    def draft(self, path: str) -> AbstractContextManager["Draft"]:
        """A new file that is written piece by piece. Leaving the block drops it unless `Draft.create` was called."""

    def create_all(self, files: Mapping[str, bytes]) -> list[str]:
        """Write files that do not exist yet. They are durable on return.

        Returns:
            The paths left unchanged: another writer created them first with other content, or has just removed them.
        """

    def write(self, path: str, data: bytes) -> None:
        """Write or replace a file. It is durable on return."""

    def exists(self, path: str) -> bool:
        """Whether the file exists."""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """List all files below the folder `prefix`, in no order, without unfinished writes."""

    def folders(self, prefix: str = "") -> set[str]:
        """The names of the folders directly in the folder `prefix`."""

    def remove(self, paths: Iterable[str]) -> None:
        """Remove files, in this order; missing files are skipped."""

    def remove_tree(self, prefix: str) -> None:
        """Remove the folder `prefix` with everything in it, unfinished writes included."""

    def remove_dead_writes(self, folders: Iterable[str], of_the_living: bool = False) -> None:
        """Remove unfinished writes that lie directly in `folders`: those of processes known to be dead, or all."""


def open_store(place: str | Path) -> Store:
    """The store at a folder or URL, without any access to it. Raises StoreError for a URL that names no store."""
    if isinstance(place, str) and "://" in place:
        if place.startswith("file://"):
            return LocalStore(Path(unquote(urlsplit(place).path)))
        if place.startswith("hf://"):
            from tinymim.storage.hub import HubStore  # the client of the hub takes a while to load

            return HubStore(place.rstrip("/"))
        return RemoteStore(place.rstrip("/"))
    return LocalStore(Path(place).absolute())


class Draft(Protocol):
    """A file that nobody sees before `create`."""

    file: BinaryIO

    def create(self) -> bool:
        """Make the file appear whole and durable under its path.

        Returns:
            False: another writer created the path first, with other content.
        """


@contextmanager
def explained_write_errors(store: Store) -> Iterator[None]:
    """Turn an OSError from writing below `store` into a UserError with a remedy."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"cannot write the cache {store.place}: {error.strerror or error}",
            got=error.filename,
            hint="free some space and run the same command again; committed units are intact"
            if full
            else "check that the folder exists, is writable and is on a healthy disk; committed units are intact",
        ) from error
