"""Members of tars in an object store: found by streaming a tar once, then kept in the user's cache folder.

A tar's headers lie between its images, so finding them costs the whole tar. What was found is kept by the identity of
the object (URL, size, version), and loader workers that need the same tar at once wait for the first of them.
"""

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tinymim.pipeline.remote import RemoteObject, reader
from tinymim.pipeline.tar import Members, scan_tar
from tinymim.storage.atomic import write_json_atomic

_READ_BYTES = 2**20
_KEPT_VERSION = 1


class RemoteFile(io.RawIOBase):
    """An object as a seekable binary file for one pass from front to back.

    What a seek forward leaves out is read all the same: it costs nothing where blocks are fetched ahead, and the hash
    of the whole object comes with it.
    """

    def __init__(self, source: RemoteObject) -> None:
        self.source = source
        self._at = self._passed = 0
        self._sha = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.source.size_bytes}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            size = max(0, self.source.size_bytes - self._at)
        self._pass_to(self._at)
        data = reader().read(self.source, self._at, size)
        if self._at + len(data) > self._passed:
            self._sha.update(data[self._passed - self._at :])
            self._passed = self._at + len(data)
        self._at += len(data)
        return data

    def content_hash(self) -> str:
        """sha256 of the whole object, as "sha256:hex"; reads it to its end."""
        self._pass_to(self.source.size_bytes)
        return "sha256:" + self._sha.hexdigest()

    def _pass_to(self, end: int) -> None:
        end = min(end, self.source.size_bytes)
        while self._passed < end:
            data = reader().read(self.source, self._passed, min(_READ_BYTES, end - self._passed))
            self._sha.update(data)
            self._passed += len(data)


def scan_and_hash(source: RemoteObject) -> tuple[Members, str]:
    """Members and content hash of a tar, which is streamed once; both are kept.

    Raises:
        SourceError: not a whole tar.
        StoreError: the store refuses or fails, or the object changes meanwhile.
    """
    with _kept(source) as path:
        found = _load(path)
        if found is not None and found[1]:
            return found
        file = RemoteFile(source)
        members = scan_tar(file, source.name, source.size_bytes)  # type: ignore[arg-type]  # RawIOBase is enough
        _save(path, members, file.content_hash())
        return members, file.content_hash()


def scan(source: RemoteObject) -> Members:
    """Members of a tar, kept or found by streaming it. Raises as `scan_and_hash`."""
    with _kept(source) as path:
        found = _load(path)
        if found is not None:
            return found[0]
        members = scan_tar(RemoteFile(source), source.name, source.size_bytes)  # type: ignore[arg-type]
        _save(path, members, "")
        return members


def kept_folder() -> Path:
    """Where members are kept: `tinymim/members` in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinymim" / "members"


@contextmanager
def _kept(source: RemoteObject) -> Iterator[Path | None]:
    """The file for an object's members, locked for this process; None where no such file can be made."""
    identity = f"{source}\n{source.size_bytes}\n{source.version}"
    path = kept_folder() / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "wb")  # noqa: SIM115  # closed below, which unlocks it
    except OSError:  # a read-only or full home costs time, nothing else
        yield None
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def _load(path: Path | None) -> tuple[Members, str] | None:
    try:
        kept = json.loads(path.read_text()) if path else None
        if not isinstance(kept, dict) or kept["version"] != _KEPT_VERSION:
            return None
        places = np.array(kept["places"], dtype=np.int64).reshape(len(kept["keys"]), 3)
        members = Members(tuple(kept["keys"]), places[:, 0].copy(), places[:, 1].copy(), places[:, 2].copy())
        return members, str(kept["content_hash"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # found anew


def _save(path: Path | None, members: Members, content_hash: str) -> None:
    places = np.stack([members.offsets, members.sizes, members.labels], axis=1).tolist()
    kept = {"version": _KEPT_VERSION, "keys": members.keys, "places": places, "content_hash": content_hash}
    if path is not None:
        try:
            write_json_atomic(path, kept)
        except OSError:
            return
