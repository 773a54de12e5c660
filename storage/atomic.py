"""Files that are either whole or absent, and the one canonical form of JSON."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinymim.configs.errors import UserError

PARTIAL_SUFFIX = ".partial"


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
    temp = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        with open(temp, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except OSError:
        temp.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_json_atomic(path: Path, obj: object) -> None:
    """Write the canonical JSON of `obj` to `path`, atomically; errors of both functions above."""
    write_bytes_atomic(path, canonical_json(obj))


@contextmanager
def explained_write_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write below `path` into a `UserError` with a remedy."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"cannot write the cache {path}: {error.strerror or error}",
            got=error.filename,
            hint="free some space and run the same command again; committed units are intact"
            if full
            else "check that the folder exists, is writable and is on a healthy disk",
        ) from error
