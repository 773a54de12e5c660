"""Files that are either whole or absent, and the one canonical form of JSON."""

import errno
import hashlib
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PARTIAL_SUFFIX = ".partial"
HOST = hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()
DAY_S = 86_400
# What file systems without hard links say; on those two processes may both believe that they were first.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_numbers = itertools.count()
_PARTIAL_NAME = re.compile(rf"\.(?P<host>[0-9a-f]{{8}})-(?P<pid>[0-9]+)-[0-9]+{re.escape(PARTIAL_SUFFIX)}$")


def canonical_json(obj: object) -> bytes:
    """The canonical JSON of `obj`: ASCII, sorted keys, indent 1, a final newline.

    Equal values give equal bytes on every machine, so digests are taken over this form.

    Raises:
        TypeError: `obj` holds something JSON has no form for (numpy scalars included).
        ValueError: `obj` holds nan or inf.
    """
    return (json.dumps(obj, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def digest_hex(data: bytes) -> str:
    """blake2b of `data` with a 16-byte digest, as 32 lower-case hex characters."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` (creations, renames, removals) durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a crash at any moment leaves the old file, or none, or the new one.

    The temporary file lies in the same folder and ends in `.partial`. On return the file and its name are
    durable.

    Raises:
        OSError: the file cannot be written; the temporary file is removed and `path` is as before.
    """
    temp = _write_partial(path, data)
    try:
        os.replace(temp, path)
    except OSError:
        temp.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_json_atomic(path: Path, obj: object) -> None:
    """Write the canonical JSON of `obj` to `path`, atomically; errors of both functions above."""
    write_bytes_atomic(path, canonical_json(obj))


def create_bytes_atomic(path: Path, data: bytes) -> bool:
    """As `write_bytes_atomic`, but where `path` exists it is left alone, and the answer is False.

    Of several processes that create one file, one gets True. The name itself is made durable by the caller
    (`fsync_folder`), once for many files.

    Raises:
        OSError: the file cannot be written; the temporary file is removed.
    """
    temp = _write_partial(path, data)
    try:
        os.link(temp, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS or path.exists():
            raise
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    return True


def make_folders(folder: Path) -> set[Path]:
    """Make `folder` and those above it; the folders in which names were added, for `fsync_folder`."""
    missing = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
    return {path.parent for path in missing}


def remove_dead_partials(folders: Iterable[Path]) -> None:
    """Remove from `folders` what writes left that will never end: of dead processes of this machine, or a day old."""
    for path in [path for folder in folders for path in folder.glob(f"*{PARTIAL_SUFFIX}")]:
        with suppress(FileNotFoundError):  # the write ended meanwhile
            of = _PARTIAL_NAME.search(path.name)
            dead = of is not None and of["host"] == HOST and not process_exists(int(of["pid"]))
            if dead or time.time() - path.stat().st_mtime > DAY_S:
                path.unlink()


def process_exists(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _write_partial(path: Path, data: bytes) -> Path:
    """A durable temporary file with `data` beside `path`; its name says whose it is."""
    temp = path.with_name(f"{path.name}.{HOST}-{os.getpid()}-{next(_numbers)}{PARTIAL_SUFFIX}")
    try:
        with open(temp, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            temp.unlink(missing_ok=True)
        raise
    return temp
