"""A cache's files in a folder."""

import errno
import filecmp
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import BinaryIO, ClassVar

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
from tinymim.storage.entries import Entry, holds, refuse_large


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
            if not create_bytes_atomic(full, data) and not holds(self.read, path, data):
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


def _pread(fd: int, size: int, offset: int) -> bytes:
    """`os.pread` without its limit of 2 GiB."""
    data = os.pread(fd, size, offset)
    while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data


@cache
def _user(uid: int) -> str:
    try:
        import pwd

        return pwd.getpwuid(uid).pw_name
    except (ImportError, KeyError):
        return str(uid)
