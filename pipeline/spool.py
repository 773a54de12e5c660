"""Whole tars of an object store in a local folder of bounded size, shared by all processes of a machine.

The name of a tar's file is a digest of the tar's identity (URL, size, version). No name in a store can therefore lead
out of the folder, and a replaced tar gets another file. A download grows as `NAME.tar.partial` and is renamed when it
is complete.

Every claim is a flock, which the kernel drops when its process dies:

| file | exclusive lock | shared lock |
|---|---|---|
| `NAME.tar.partial` | one process downloads it; without the lock any process may continue the download | |
| `NAME.tar` | it is being evicted | it is being read, or batches in progress need it: never evicted |
| `lock` | one process makes room | |

The modification time of a tar is its last use. docs/decisions/012-spool.md gives the reasons.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final

import numpy as np

from tinymim.configs.errors import RecipeError, StoreError, UserError, first_line
from tinymim.pipeline.members import Keys, Members
from tinymim.pipeline.remote import RemoteObject, fetch_range
from tinymim.pipeline.tar import scan_tar
from tinymim.storage.atomic import digest_hex, fsync_folder, write_json_atomic

PART_BYTES: Final = 4 * 2**20  # size of one request
REQUESTS: Final = 8  # concurrent requests of a download, which then holds at most 32 MiB
ROOM_S = 60.0  # longest wait of a reader for room
STALE_S = 60.0  # a download ahead of need evicts only tars unused for this long
_POLL_S = 0.05
_TOUCH_S = 1.0
_NAME = re.compile(r"[0-9a-f]{32}-([0-9]+)\.tar(\.partial)?")
_MEMBERS_VERSION = 3  # raise it where another image or label would be found in a tar


@dataclass(frozen=True)
class Spool:
    """The folder of the tars and its largest size."""

    folder: Path | None  # None: the default below, on each machine its own
    budget_bytes: int

    @property
    def path(self) -> Path:
        """The folder, by default `tinymim/spool` in $XDG_CACHE_HOME or ~/.cache."""
        if self.folder is not None:
            return self.folder
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinymim" / "spool"


@dataclass(frozen=True)
class SpooledTar:
    """A tar of an object store, read through the spool."""

    source: RemoteObject
    spool: Spool
    content_hash: str  # "sha256:..." that every download must match; "": unknown

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def stem(self) -> str:
        identity = f"{self.source}\n{self.source.size_bytes}\n{self.source.version}"
        return f"{digest_hex(identity.encode())}-{self.source.size_bytes}"

    @property
    def path(self) -> Path:
        """The file of the complete tar."""
        return self.spool.path / f"{self.stem}.tar"

    @property
    def _partial(self) -> Path:
        return self.spool.path / f"{self.stem}.tar.partial"

    @property
    def _members(self) -> Path:
        return self.spool.path / "members" / f"{self.stem}.json"

    def refuse_small_budget(self) -> None:
        """Raises RecipeError if this tar alone exceeds the budget."""
        if self.source.size_bytes > self.spool.budget_bytes:
            raise RecipeError(
                f"source.spool.gib is less than shard {self.name}",
                got=f"{self.spool.budget_bytes / 2**30:.3g} GiB ({self.spool.budget_bytes:,} bytes)",
                expected=f"at least {self.source.size_bytes / 2**30:.3g} GiB ({self.source.size_bytes:,} bytes)",
                hint="raise source.spool.gib, or make smaller shards (`tinymim make-shards --images-per-shard`)",
            )

    def open(self) -> FileIO:
        """Open the tar, downloading it if it is absent. It is locked against eviction until it is closed.

        Raises:
            StoreError: the store refuses or fails, or the object was replaced since it was listed.
            UserError: the folder cannot be written, its disk is full, or other readers use the whole budget.
        """
        give_up = time.monotonic() + ROOM_S
        while True:
            try:
                file = self.open_spooled() or self.fetch()
            except NoRoom:
                if time.monotonic() > give_up:
                    raise
            else:
                if file is not None:
                    return file
                give_up = time.monotonic() + ROOM_S  # another process downloads it; that wait has no limit
            time.sleep(_POLL_S)

    def open_spooled(self) -> FileIO | None:
        """As `open`, but returns None if the tar is not in the spool."""
        with self._explained_refusals(), ExitStack() as closing:
            try:
                file = closing.enter_context(open(self.path, "rb", buffering=0))
            except FileNotFoundError:
                return None
            fcntl.flock(file, fcntl.LOCK_SH)
            stat = os.fstat(file.fileno())
            if stat.st_nlink == 0:  # evicted since it was opened
                return None
            if stat.st_size != self.source.size_bytes:  # changed by another program
                self.path.unlink(missing_ok=True)
                return None
            if time.time() - stat.st_mtime > _TOUCH_S:
                os.utime(file.fileno())
            closing.pop_all()
            return file

    def touch(self, used: bool = True) -> bool:
        """Mark a spooled tar as used now, or as the first to be evicted. False if it is not in the spool."""
        try:
            os.utime(self.path, None if used else (0, 0))
        except OSError:
            return False
        return True

    def fetch(self, ahead: Callable[[], bool] | None = None) -> FileIO | None:
        """Download the tar, continuing an earlier partial download.

        Args:
            ahead: passed for a download ahead of need, which evicts no recently used tar. It is called before every
                part is written, and ends the download when it returns False.

        Returns:
            The tar as from `open`; None if another process downloads it or has just done so, or `ahead` ended it.

        Raises:
            StoreError, UserError: as `open`.
            NoRoom: other readers use the whole budget now.
        """
        self.refuse_small_budget()
        with self._explained_refusals(), ExitStack() as closing:
            # Room is counted and claimed under one lock: two processes must not both count the same free bytes.
            with self._making_room():
                file = closing.enter_context(open(self._partial, "a+b", buffering=0))
                # Another process may have locked the file, or renamed or removed it between the open and the lock.
                if not (_locked(file) and _is_at(file, self._partial)):
                    return None
                if self.path.exists():
                    self._partial.unlink()
                    return None
                try:
                    self._make_room(ahead is not None)
                except NoRoom:
                    if os.fstat(file.fileno()).st_size == 0:
                        self._partial.unlink()
                    raise
            try:
                whole = self._download(file, ahead)
            except OSError:
                self._partial.unlink(missing_ok=True)  # a full disk needs the room
                raise
            if not whole:
                return None
            os.replace(self._partial, self.path)
            fsync_folder(self.spool.path)
            fcntl.flock(file, fcntl.LOCK_SH)
            file.seek(0)
            closing.pop_all()
            return file

    def members(self) -> tuple[Members, str]:
        """Members and content hash of the tar. They are stored next to the tars and outlive the tar's eviction.

        Raises:
            SourceError: the object is not a complete tar.
            StoreError, UserError: as `open`.
        """
        kept = _load_members(self._members)
        if kept is not None:
            return kept
        with self.open() as file:
            content_hash = self.content_hash or _sha256(file)
            file.seek(0)
            members = scan_tar(file, self.name, self.source.size_bytes)
        with self._explained_refusals():
            _save_members(self._members, members, content_hash)
        return members, content_hash

    @contextmanager
    def _making_room(self) -> Iterator[None]:
        """Hold the spool's lock during the block, one process at a time."""
        self.spool.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self.spool.path / "lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, ahead: bool) -> None:
        """Evict least recently used tars and abandoned partials until this tar fits into the budget.

        Raises:
            NoRoom: the rest is in use; nothing is evicted.
        """
        found: dict[str, tuple[float, int, Path]] = {}
        for entry in os.scandir(self.spool.path):
            name = _NAME.fullmatch(entry.name)  # files of other programs are neither counted nor touched
            if name and not entry.name.startswith(self.stem):
                # A download ends without the lock: a partial of the list may have its new name, which the list lacks.
                for path in (Path(entry.path), Path(entry.path.removesuffix(".partial"))):
                    with suppress(FileNotFoundError):
                        found[path.name.partition(".")[0]] = (path.stat().st_mtime, int(name[1]), path)
                        break
        excess = sum(size for _, size, _ in found.values()) + self.source.size_bytes - self.spool.budget_bytes
        in_use_bytes = 0
        with ExitStack() as closing:
            evicted = []
            for used_at, size, path in sorted(found.values()):
                if excess <= 0:
                    break
                try:
                    file = closing.enter_context(open(path, "rb", buffering=0))
                except FileNotFoundError:
                    in_use_bytes += size
                    continue
                if (ahead and time.time() - used_at < STALE_S) or not _locked(file):
                    in_use_bytes += size
                    continue
                evicted.append(path)  # its lock is held until all are removed, so no reader takes it before
                excess -= size
            if excess > 0:
                raise NoRoom(
                    f"there is no room for shard {self.name} in the spool {self.spool.path}",
                    got=f"{in_use_bytes / 2**30:.3g} GiB of other shards in use at once",
                    expected=f"at most {(self.spool.budget_bytes - self.source.size_bytes) / 2**30:.3g} GiB, which "
                    f"source.spool.gib: {self.spool.budget_bytes / 2**30:.3g} leaves for them",
                    hint="raise source.spool.gib, lower order.shuffle_units, or give the run a source.spool.folder of "
                    "its own",
                )
            for path in evicted:
                path.unlink(missing_ok=True)

    def _download(self, file: FileIO, ahead: Callable[[], bool] | None) -> bool:
        """Append the missing bytes to the partial and check it; False if `ahead` ended the download."""
        resumed_bytes = os.fstat(file.fileno()).st_size
        while True:
            if not self._append(file, ahead):
                return False
            os.fsync(file.fileno())
            file.seek(0)
            content_hash = _sha256(file) if self.content_hash else ""
            if content_hash == self.content_hash:
                return True
            file.truncate(0)
            if not resumed_bytes:
                break
            resumed_bytes = 0  # retry from scratch: a power failure may have damaged the earlier part
        self._partial.unlink()
        raise StoreError(
            f"{self.source} is not the shard that index.json describes",
            got=content_hash,
            expected=self.content_hash,
            hint="upload the shard again, or the index.json that belongs to it",
        )

    def _append(self, file: FileIO, ahead: Callable[[], bool] | None) -> bool:
        """Download in parallel but write in order: a partial is then a prefix, and its length is enough to resume."""
        size = self.source.size_bytes
        starts = iter(range(os.fstat(file.fileno()).st_size, size, PART_BYTES))
        coming: deque[Future[memoryview]] = deque()
        pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="tinymim-spool")
        try:
            while True:
                while len(coming) < REQUESTS and (start := next(starts, None)) is not None:
                    coming.append(pool.submit(fetch_range, self.source, start, min(start + PART_BYTES, size)))
                if not coming:
                    return True
                if ahead is not None and not ahead():
                    return False
                part = coming.popleft().result()
                while part:
                    part = part[file.write(part) :]
        finally:
            pool.shutdown(cancel_futures=True)

    @contextmanager
    def _explained_refusals(self) -> Iterator[None]:
        """Turn the operating system's refusals about the spool into a UserError with a remedy."""
        folder = self.spool.path
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"the disk of the spool folder {folder} is full",
                    got=first_line(error),
                    expected=f"{self.source.size_bytes:,} bytes for shard {self.name}",
                    hint="free some space, lower source.spool.gib, or set source.spool.folder to a larger local disk",
                ) from error
            raise UserError(
                f"the spool folder {folder} cannot be used",
                got=first_line(error),
                hint="set source.spool.folder to a folder on a local disk that you may write to",
            ) from error


class NoRoom(UserError):
    """Other shards fill the spool and are in use; there may be room later."""


def _locked(file: FileIO) -> bool:
    """Lock a file exclusively; False if another open file holds a lock on it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: FileIO, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sha256(file: FileIO) -> str:
    return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _load_members(path: Path) -> tuple[Members, str] | None:
    try:
        kept = json.loads(path.read_text())
        if kept["version"] != _MEMBERS_VERSION:
            return None
        places = np.array(kept["places"], dtype=np.int64).reshape(len(kept["keys"]), 3)
        members = Members(Keys.of(kept["keys"]), places[:, 0].copy(), places[:, 1].copy(), places[:, 2].copy())
        return members, str(kept["content_hash"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None  # the tar is scanned again


def _save_members(path: Path, members: Members, content_hash: str) -> None:
    places = np.stack([members.offsets, members.sizes, members.labels], axis=1).tolist()
    path.parent.mkdir(exist_ok=True)
    write_json_atomic(
        path,
        {"version": _MEMBERS_VERSION, "keys": list(members.keys), "places": places, "content_hash": content_hash},
    )
