"""One owner at a time for a run folder: a lock of the file system, and a beat for folders that two machines share.

The kernel frees the lock when its owner ends, however it ends, also in another container of the same machine. Some
network file systems lock within one machine only. There the beat decides: the owner rewrites the lock's content every
few seconds, and a claimant from another machine watches whether it still changes.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from tinymim.configs.errors import UserError
from tinymim.stages.run.progress import logger

LOCK_NAME = "owner.lock"
_BEAT_S = 5.0
_WATCH_S = 4 * _BEAT_S
_TRIES = 100
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def owned(folders: Collection[Path]) -> Iterator[None]:
    """Own run folders within the context; they are made if they do not exist, and removed if they stay empty.

    Raises:
        UserError: another process owns one of them; names it.
        OSError: a folder cannot be made or written.
    """
    with contextlib.ExitStack() as stack:
        for folder in sorted(folders):  # in one order, so that of two runs with the same folders one gets all
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            stack.callback(_remove_empty, made)
            file, locked = stack.enter_context(_opened(folder))
            _wait_for_the_dead(folder, file, locked)
            stack.enter_context(_beating(folder / LOCK_NAME, file))
        yield


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[tuple[Any, bool]]:
    """The open lock file of a folder, and whether it is locked: some file systems have no locks."""
    path = folder / LOCK_NAME
    for tries_left in reversed(range(_TRIES)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        except (FileNotFoundError, FileExistsError):  # its last owner has just removed the folder
            if not tries_left or folder.is_file():
                raise
            continue
        locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            locked = False
            if error.errno not in _NO_LOCKS:
                with file:
                    raise _taken(folder, _content(file)) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its last owner has removed it since it was opened
    else:
        raise _taken(folder, None)
    with file:
        yield file, locked


def _wait_for_the_dead(folder: Path, file: Any, locked: bool) -> None:
    """Watch an owner that did not leave properly, and may be alive on another machine or, without locks, on this one.

    Raises:
        UserError: its content changes, so it is alive.
    """
    found = _content(file)
    here = found is not None and found.get("host") == socket.gethostname()
    if found is None or (here and locked):  # a living process of this machine would have the lock
        return
    logger.info(f"{folder} was owned by {_named(found)}: watching for {_WATCH_S:.0f} s whether it is alive")
    began_s = time.monotonic()
    while time.monotonic() - began_s < _WATCH_S:
        time.sleep(0.2)
        if (now := _content(file)) != found:
            raise _taken(folder, now or found)


@contextlib.contextmanager
def _beating(path: Path, file: Any) -> Iterator[None]:
    """Rewrite the content until the end of the context; then remove the file."""
    about = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
    over = threading.Event()

    def beat() -> None:
        number = 0
        while not over.wait(_BEAT_S):
            number += 1
            with contextlib.suppress(OSError):  # a full disk, say: the lock itself needs no space
                _write(file, about | {"beat": number})

    _write(file, about)
    thread = threading.Thread(target=beat, daemon=True, name="owner of the run folder")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        path.unlink(missing_ok=True)


def _write(file: Any, content: dict[str, Any]) -> None:
    data = json.dumps(content).encode().ljust(200)  # one length, written over the last content in one call
    os.ftruncate(file.fileno(), len(data))
    os.pwrite(file.fileno(), data, 0)


def _content(file: Any) -> dict[str, Any] | None:
    """What an owner wrote; None from one that has just come."""
    data = os.pread(file.fileno(), 4096, 0)
    try:
        found = json.loads(data) if data.strip(b"\0 ") else None
    except (ValueError, RecursionError):
        return {"unreadable": data.hex()[:100]}
    return found if isinstance(found, dict) else None


def _named(content: dict[str, Any] | None) -> str:
    content = content or {}
    return f"process {content.get('pid', '?')} on {content.get('host', 'this machine')}"


def _taken(folder: Path, content: dict[str, Any] | None) -> UserError:
    return UserError(
        "another run works in this run.folder",
        got=f"{folder}, owned by {_named(content)}",
        expected="one run at a time",
        hint="wait for it, stop it, or set another run.folder",
    )
