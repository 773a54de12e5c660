"""The files of a cache, in a folder or below a prefix of an object store. The rest of storage uses only this interface.

A store needs two properties: a file is written whole or not at all, and one of several writers that create the same
file wins. The same code therefore serves a disk, a network file system and S3.
"""

import errno
import filecmp
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, ClassVar, Literal, Protocol
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError

from tinymim.configs.errors import StoreError, UserError
from tinymim.storage.atomic import (
    PARTIAL_SUFFIX,
    create_bytes_atomic,
    fsync_folder,
    link_partial,
    make_folders,
    partial_file,
    remove_partials,
    write_bytes_atomic,
)
from tinymim.storage.entries import REQUESTS, Entry, TooLarge, merged, refuse_large
from tinymim.storage.objects import ABSENT, connect, store_error

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PUT_BYTES = 5 * 2**30  # most that S3 takes in one request
WRITE_TIMEOUT_S = 300.0  # one request with the largest file
TIMEOUT_PAUSES_S = (1.0, 5.0)  # before an unanswered PUT is sent again


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


class LocalStore:
    """A folder. A write goes to a temporary file, which becomes durable before it is renamed."""

    distant: ClassVar[bool] = False

    def __init__(self, folder: Path) -> None:
        self.place: Path = folder
        self._was_there = False

    def read(self, path: str, limit: int) -> bytes:
        with open(f"{self.place}/{path}", "rb") as file:  # joining paths would take as long as reading a record
            refuse_large(path, os.fstat(file.fileno()).st_size, limit)
            return file.read()

    def read_all(self, limits: Mapping[str, int]) -> dict[str, bytes]:
        return {path: self.read(path, limit) for path, limit in limits.items()}

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        fd = os.open(f"{self.place}/{path}", os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size  # a range may come from a forged record: no memory for what is not there
            for begin, end in ranges:
                yield memoryview(_pread(fd, min(end, size) - begin, begin) if begin < size else b"")
        finally:
            os.close(fd)

    @contextmanager
    def draft(self, path: str) -> Iterator["_LocalDraft"]:
        full = self.place / path
        for folder in sorted(self._folder_of(path), reverse=True):
            fsync_folder(folder)
        with partial_file(full) as (temp, file):
            yield _LocalDraft(full, temp, file)

    def create_all(self, files: Mapping[str, bytes]) -> list[str]:
        changed: set[Path] = set()
        others = []
        for path, data in files.items():
            full = self.place / path
            changed |= self._folder_of(path)
            if not create_bytes_atomic(full, data) and not _holds(self, path, data):
                others.append(path)
            changed.add(full.parent)
        for folder in sorted(changed, reverse=True):  # deepest first: no folder is durable before its content
            fsync_folder(folder)
        return others

    def write(self, path: str, data: bytes) -> None:
        full = self.place / path
        for folder in sorted(self._folder_of(path), reverse=True):
            fsync_folder(folder)
        write_bytes_atomic(full, data)

    def exists(self, path: str) -> bool:
        return (self.place / path).is_file()

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folders = [prefix]
        while folders:
            folder = folders.pop()
            start = f"{folder}/" if folder else ""
            try:
                found = list(os.scandir(self.place / folder))
            except (FileNotFoundError, NotADirectoryError):
                continue  # removed since it was listed, or never there
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{start}{entry.name}")
                if entry.name.endswith(PARTIAL_SUFFIX) or entry.is_dir():
                    continue
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue  # removed since it was listed
                modified = datetime.fromtimestamp(stat.st_mtime, UTC)
                yield Entry(f"{start}{entry.name}", stat.st_size, modified, _user(stat.st_uid))

    def folders(self, prefix: str = "") -> set[str]:
        try:
            return {entry.name for entry in os.scandir(self.place / prefix) if entry.is_dir()}
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            full = self.place / path
            try:
                full.unlink()
                fsync_folder(full.parent)
            except FileNotFoundError:
                continue

    def remove_tree(self, prefix: str) -> None:
        folder = self.place / prefix
        if folder.exists():
            shutil.rmtree(folder)
            fsync_folder(folder.parent)
            self._was_there = self.place.is_dir()

    def remove_dead_writes(self, folders: Iterable[str], of_the_living: bool = False) -> None:
        remove_partials((self.place / folder for folder in folders), of_the_living)

    def _folder_of(self, path: str) -> set[Path]:
        """Make the folder of a file. Returns the folders that got new names, for `fsync_folder`."""
        # A folder that was removed or renamed during a run must not come back with a part of its content.
        if self._was_there and not self.place.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder was removed or renamed", str(self.place))
        made = make_folders((self.place / path).parent)
        self._was_there = True
        return made


@dataclass
class _LocalDraft:
    path: Path
    temp: Path
    file: BinaryIO

    def create(self) -> bool:
        self.file.flush()
        os.fsync(self.file.fileno())
        created = link_partial(self.temp, self.path) or filecmp.cmp(self.temp, self.path, shallow=False)
        fsync_folder(self.path.parent)
        return created


class RemoteStore:
    """A prefix of an object store. A PUT is atomic and durable; creation needs conditional PUTs (If-None-Match)."""

    distant: ClassVar[bool] = True

    def __init__(self, url: str) -> None:
        self.place: str = url
        _ = self._objects  # refuses a URL that names no store

    @property
    def _objects(self) -> "ObjectStore":
        return connect(self.place, WRITE_TIMEOUT_S)

    def read(self, path: str, limit: int) -> bytes:
        with self._explained(path):
            answer = obstore.get(self._objects, path)
            refuse_large(path, answer.meta["size"], limit)
            return bytes(answer.bytes())

    def read_all(self, limits: Mapping[str, int]) -> dict[str, bytes]:
        with ThreadPoolExecutor(REQUESTS) as pool:
            return dict(zip(limits, pool.map(self.read, limits.keys(), limits.values()), strict=True))

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        runs = merged(ranges)
        with self._explained(path):
            try:
                parts = self._ranges(path, runs)
            except BaseError:
                size = obstore.head(self._objects, path)["size"]
                if all(end <= size for _, end in runs):
                    raise
                # Stores refuse a range that begins after the end of the object, and obstore one that it cannot fill.
                parts = self._ranges(path, [(min(begin, size), min(end, size)) for begin, end in runs])
        number, last = -1, None
        for begin, end in ranges:
            number += begin != last
            start, last = runs[number][0], end
            yield parts[number][begin - start : end - start]

    def _ranges(self, path: str, runs: Sequence[tuple[int, int]]) -> list[memoryview]:
        starts, ends = [begin for begin, end in runs if begin < end], [end for begin, end in runs if begin < end]
        if len(starts) == 1:
            found = iter([obstore.get_range(self._objects, path, start=starts[0], end=ends[0])])
        else:
            # Without `coalesce=0` obstore reads what lies between two ranges, up to 1 MiB, and drops it.
            found = iter(
                obstore.get_ranges(self._objects, path, starts=starts, ends=ends, coalesce=0) if starts else []
            )
        return [memoryview(next(found)) if begin < end else memoryview(b"") for begin, end in runs]

    @contextmanager
    def draft(self, path: str) -> Iterator["_RemoteDraft"]:
        # A conditional PUT takes one request with the whole object; a file keeps it out of memory until then.
        with tempfile.TemporaryFile() as file:
            yield _RemoteDraft(self, path, file)

    def create_all(self, files: Mapping[str, bytes]) -> list[str]:
        with ThreadPoolExecutor(REQUESTS) as pool:
            created = list(pool.map(self.create, files.keys(), files.values()))
        return [path for path, done in zip(files, created, strict=True) if not done]

    def create(self, path: str, data: bytes | mmap.mmap) -> bool:
        """Write a file that does not exist yet; False if another writer created it first with other content.

        Raises:
            StoreError: the data is more than a store takes in one request, the only kind that can be conditional.
        """
        if len(data) > PUT_BYTES:
            raise StoreError(
                f"{self.place}/{path} is too large for one request",
                got=f"{len(data):,} bytes",
                expected=f"at most {PUT_BYTES:,}",
                hint="smaller units: lower views_per_unit in the recipe, or make shards of fewer images",
            )
        with self._explained(path):
            try:
                self._put(path, data, "create")
            except (AlreadyExistsError, PreconditionError):
                # A repeated PUT of our own, whose first answer was lost, ends here too: compare the content.
                return _holds(self, path, data)
        return True

    def write(self, path: str, data: bytes) -> None:
        with self._explained(path):
            self._put(path, data, "overwrite")

    def _put(self, path: str, data: bytes | mmap.mmap, mode: Literal["create", "overwrite"]) -> None:
        _repeat_unanswered(lambda: obstore.put(self._objects, path, data, mode=mode))

    def _delete(self, paths: str | Sequence[str]) -> None:
        _repeat_unanswered(lambda: obstore.delete(self._objects, paths))

    def exists(self, path: str) -> bool:
        try:
            with self._explained(path):
                obstore.head(self._objects, path)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[Entry]:
        with self._explained(prefix):
            for page in obstore.list(self._objects, prefix or None):
                for meta in page:
                    yield Entry(meta["path"], meta["size"], meta["last_modified"])

    def folders(self, prefix: str = "") -> set[str]:
        with self._explained(prefix):
            below = obstore.list_with_delimiter(self._objects, prefix or None)["common_prefixes"]
        return {path.rstrip("/").rpartition("/")[2] for path in below}

    def remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            try:
                with self._explained(path):
                    self._delete(path)
            except FileNotFoundError:
                continue

    def remove_tree(self, prefix: str) -> None:
        paths = [entry.path for entry in self.list(prefix)]
        if paths:
            with self._explained(prefix):
                self._delete(paths)

    def remove_dead_writes(self, folders: Iterable[str], of_the_living: bool = False) -> None:
        """Nothing to do: an object exists whole or not at all."""

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        try:
            yield
        except ABSENT as error:
            raise FileNotFoundError(f"{self.place}/{path}") from error
        except (BaseError, OSError, NotImplementedError) as error:
            raise store_error(f"{self.place}/{path}".rstrip("/"), error) from error


@dataclass
class _RemoteDraft:
    store: RemoteStore
    path: str
    file: BinaryIO

    def create(self) -> bool:
        self.file.flush()
        return self.store.create(self.path, mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ))


def _repeat_unanswered(request: Callable[[], object]) -> None:
    """Send a PUT or DELETE, and send it again after a timeout.

    obstore repeats temporary refusals, but no PUT or DELETE that timed out, since not all are idempotent. Ours are.
    """
    for pause_s in TIMEOUT_PAUSES_S:
        try:
            request()
            return
        except GenericError as error:
            if "Timeout" not in str(error):
                raise
            time.sleep(pause_s)
    request()


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


def _pread(fd: int, size: int, offset: int) -> bytes:
    """`os.pread` without its limit of 2 GiB."""
    data = os.pread(fd, size, offset)
    while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data


def _holds(store: Store, path: str, data: bytes | mmap.mmap) -> bool:
    """Whether a file exists with this content. Its writer may remove it at any time, for example a released lease."""
    try:
        return memoryview(store.read(path, len(data))) == memoryview(data)
    except (FileNotFoundError, TooLarge):
        return False


@cache
def _user(uid: int) -> str:
    try:
        import pwd

        return pwd.getpwuid(uid).pw_name
    except (ImportError, KeyError):
        return str(uid)
