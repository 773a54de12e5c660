"""Atomic file writes, and the one canonical form of JSON."""

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

from tinymim.configs.errors import naming

PARTIAL_SUFFIX = ".partial"
HOST = hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()
DAY_S = 86_400
# Errors of file systems without hard links. Two processes that create one file there may both get True.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_numbers = itertools.count()
_PARTIAL_NAME = re.compile(rf"\.(?P<host>[0-9a-f]{{8}})-(?P<pid>[0-9]+)-[0-9]+{re.escape(PARTIAL_SUFFIX)}$")


def canonical_json(obj: object) -> bytes:
    """The canonical JSON of `obj`: ASCII, sorted keys, indent 1, a final newline.

    Equal values give equal bytes on every machine, so digests are taken over this form.

    Raises:
        TypeError: `obj` holds a value that JSON cannot express (numpy scalars included).
        ValueError: `obj` holds nan or inf.
    """
    return (json.dumps(obj, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def digest_hex(data: bytes) -> str:
    """blake2b of `data` with a 16-byte digest, as 32 lower-case hex characters."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make creations, renames and removals in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a crash at any moment leaves the old file, no file or the new one.

    The temporary file lies in the same folder and ends in `.partial`. The file and its name are durable on return.

    Raises:
        OSError: the file cannot be written; the temporary file is removed and `path` is unchanged.
    """
    temp = _write_partial(path, data)
    try:
        os.replace(temp, path)
    except OSError:
        temp.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_json_atomic(path: Path, obj: object) -> None:
    """Write the canonical JSON of `obj` to `path`; errors of `canonical_json` and `write_bytes_atomic`."""
    write_bytes_atomic(path, canonical_json(obj))


def create_bytes_atomic(path: Path, data: bytes) -> bool:
    """Create `path` atomically; False if it exists, which leaves it unchanged.

    If several processes create one file, one gets True. The caller makes the name durable (`fsync_folder`), once for
    many files.

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
    """Make `folder` and its missing parents. Returns the folders that got new names, for `fsync_folder`."""
    missing = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
    return {path.parent for path in missing}


def remove_dead_partials(folders: Iterable[Path]) -> None:
    """Remove temporary files from `folders` whose process on this machine is dead, or that are a day old."""
    for path in [path for folder in folders for path in folder.glob(f"*{PARTIAL_SUFFIX}")]:
        with suppress(FileNotFoundError):  # the write has just ended
            writer = _PARTIAL_NAME.search(path.name)
            dead = writer is not None and writer["host"] == HOST and not process_exists(int(writer["pid"]))
            if dead or time.time() - path.stat().st_mtime > DAY_S:
                path.unlink()


def process_exists(pid: int) -> bool:
    """Whether this machine has a process with that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _write_partial(path: Path, data: bytes) -> Path:
    """Write `data` to a durable temporary file in the folder of `path`; its name holds the writer's host and pid."""
    temp = path.with_name(f"{path.name}.{HOST}-{os.getpid()}-{next(_numbers)}{PARTIAL_SUFFIX}")
    try:
        with naming(path), open(temp, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            temp.unlink(missing_ok=True)
        raise
    return temp
