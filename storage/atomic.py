"""Atomic file writes, and the one canonical form of JSON."""

import errno
import hashlib
import itertools
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tinymim.configs.errors import naming

PARTIAL_SUFFIX = ".partial"
# Errors of file systems without hard links. Two processes that create one file there may both get True.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NOWHERE = secrets.token_hex(8)  # stands for a machine that cannot be identified
_numbers = itertools.count()
_PARTIAL_NAME = re.compile(rf"\.(?P<machine>[0-9a-f]{{8}})-(?P<pid>[0-9]{{1,9}})-[0-9]+{re.escape(PARTIAL_SUFFIX)}$")


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
        return link_partial(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def link_partial(temp: Path, path: Path) -> bool:
    """Give the durable file `temp` the name `path`; False if that exists. `temp` may be gone afterwards."""
    try:
        os.link(temp, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS or path.exists():
            raise
        os.replace(temp, path)
    return True


@contextmanager
def partial_file(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A temporary file in the folder of `path`, open for writing; it is removed when the block is left."""
    temp = partial_path(path)
    try:
        with naming(path), open(temp, "wb") as file:
            yield temp, file
    finally:
        with suppress(OSError):
            temp.unlink(missing_ok=True)


def make_folders(folder: Path) -> set[Path]:
    """Make `folder` and its missing parents. Returns the folders that got new names, for `fsync_folder`."""
    missing = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
    return {path.parent for path in missing}


def remove_partials(folders: Iterable[Path], of_the_living: bool = False) -> None:
    """Remove temporary files that lie directly in `folders`.

    Args:
        folders: folders, which may be missing.
        of_the_living: remove all; otherwise only those of processes that are known to be dead. A process of another
            machine, or of another pid namespace, never is: neither its age nor its host name proves anything.
    """
    here = _machine_digest()
    for path in [path for folder in folders for path in folder.glob(f"*{PARTIAL_SUFFIX}")]:
        writer = _PARTIAL_NAME.search(path.name)
        dead = writer is not None and writer["machine"] == here and process_is_dead(int(writer["pid"]))
        if dead or of_the_living:
            path.unlink(missing_ok=True)


def machine() -> str | None:
    """An identity that processes share if and only if they see each other's process ids; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def process_started(pid: int) -> str | None:
    """The start time of a process of this machine, in kernel ticks; it distinguishes processes that reuse an id.

    None if it cannot be read: there is no such process, or `/proc` hides the processes of other users.
    """
    stat = _process_stat(pid)
    return None if stat is None else stat[1]


def process_is_dead(pid: int, started: object = None) -> bool:
    """Whether it is certain that a process of this machine has ended.

    A process that merely cannot be seen counts as alive: `/proc` may hide those of other users (hidepid).

    Args:
        pid: its id.
        started: its start time (`process_started`), if known.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass  # it belongs to another user, or the id is impossible
    stat = _process_stat(pid)
    return stat is not None and (stat[0] == "Z" or (started is not None and stat[1] != started))


def _process_stat(pid: int) -> tuple[str, str] | None:
    """State and start time of a process, None if they cannot be read."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return state, rest[18]
    except (OSError, ValueError, IndexError):
        return None


def _machine_digest() -> str:
    return digest_hex((machine() or _NOWHERE).encode())[:8]


def _write_partial(path: Path, data: bytes) -> Path:
    """Write `data` to a durable temporary file in the folder of `path`; its name holds the writer's machine and pid."""
    temp = partial_path(path)
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


def partial_path(path: Path) -> Path:
    """A new name for a temporary file of `path`, in its folder; it says which process of which machine writes it."""
    return path.with_name(f"{path.name}.{_machine_digest()}-{os.getpid()}-{next(_numbers)}{PARTIAL_SUFFIX}")
