"""Leases: the writers of one cache share its work, and take over the work of a dead writer.

A lease is a small file that its owner rewrites ("beats") every few seconds. Its owner counts as dead once the bytes
have not changed for the time written in them, by the watcher's own clock. A process of this machine counts as dead at
once when it is certain that it has ended; a process that cannot be seen may live. A watcher takes over by creating the
next generation of the file, which only one watcher can. This needs `Store.create_all`, but no lock and no common clock.

A lease avoids double work; it does not protect the data. An owner that was only suspended may still write. So every
file of a unit is created, never replaced, and the commit record decides (`storage/writer.py`).
"""

import json
import math
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tinymim.configs.errors import StoreError
from tinymim.storage.atomic import canonical_json, machine, process_is_dead, process_started
from tinymim.storage.entries import Entry
from tinymim.storage.layout import LEASES, shard_stem
from tinymim.storage.store import Store

DEFAULT_LEASE_S = 60.0
BEATS_PER_LEASE = 5
LIMIT_BYTES = 4096
_NAME = re.compile(rf"{LEASES}/(?P<name>.+)\.g(?P<generation>[0-9]{{1,9}})\.json")


SHARDS = "shards"  # folder of the leases on shards


def shard_lease(shard: str) -> str:
    """The lease on a source shard's units in all layers. One per unit would let jobs with different views overlap."""
    return f"{SHARDS}/{shard_stem(shard)}"


@dataclass
class _Seen:
    """A lease of another process under watch."""

    content: bytes
    since_s: float  # monotonic time of this process when it first read this content


@dataclass
class _Held:
    path: str
    beats: int = 0


@dataclass(frozen=True)
class Holder:
    """The owner of a lease, for messages."""

    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass
class Leases:
    """The leases of this process on one cache. A thread beats for them until `close`.

    Args:
        store: the cache's store.
        lease_s: seconds without a beat after which other processes may take over a lease of this one.
    """

    store: Store
    lease_s: float = DEFAULT_LEASE_S
    _token: str = field(default_factory=lambda: secrets.token_hex(8))
    _held: dict[str, _Held] = field(default_factory=dict)
    _seen: dict[str, _Seen] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def claim(self, name: str) -> bool:
        """Take the lease `name` if nobody holds it or its owner is dead. May be called repeatedly.

        Raises:
            StoreError, OSError: the store refuses or fails.
        """
        if name in self._held:
            if self.holds(name):
                return True
            with self._lock:
                del self._held[name]
        generations = self._generations(name)
        latest = max(generations, default=0)
        if latest and self._wrote(generations[latest]):
            held = _Held(generations.pop(latest))  # our own creation or removal failed half-way
        elif latest and self._lives(generations[latest]) is not False:
            return False
        else:
            # Several watchers may see the same dead owner. Creation decides between them: one file, one winner.
            held = _Held(f"{LEASES}/{name}.g{latest + 1}.json")
            if self.store.create_all({held.path: self._content(held)}):
                return False
        with self._lock:
            self._held[name] = held
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="tinymim-leases", daemon=True)
            self._thread.start()
        # Old generations go last: without any, a third process could create generation 1 next to ours.
        self.store.remove(generations.values())
        return True

    def holds(self, name: str) -> bool:
        """Whether this process still holds the lease, according to the store now."""
        held = self._held.get(name)
        if held is None:
            return False
        generations = self._generations(name)
        return bool(generations) and generations[max(generations)] == held.path and self._wrote(held.path)

    def release(self, name: str) -> None:
        """Release the lease if this process holds it."""
        with self._lock:
            held = self._held.pop(name, None)
        if held is not None:
            self.store.remove([held.path])

    def holder(self, name: str) -> Holder | None:
        """The owner of the lease; None if there is no lease, or it cannot be read."""
        generations = self._generations(name)
        if not generations:
            return None
        try:
            return _holder(self.store.read(generations[max(generations)], LIMIT_BYTES))
        except (FileNotFoundError, ValueError):
            return None

    def names(self) -> set[str]:
        """All existing leases, of any process, dead or alive."""
        return set(self._found())

    def living(self, watch_s: float = 0.0) -> dict[str, Holder | None]:
        """The leases whose owners are not known to be dead, and these owners where they can be read.

        Writes nothing and compares no clocks. An owner on another machine is known to be dead only after it was
        watched: its lease did not change for the time written in it.

        Args:
            watch_s: seconds to watch at most. The method returns as soon as every owner was seen alive or dead.
        """
        until_s, pause_s = time.monotonic() + watch_s, 0.05
        found: dict[str, Holder | None] = {}
        doubtful = {name: generations[max(generations)].path for name, generations in self._found().items()}
        while True:
            for name, path in list(doubtful.items()):
                lives = self._lives(path)
                if lives or (lives is None and self._runs_here(path)):
                    found[name] = self.holder(name)
                if lives is not None or name in found:
                    del doubtful[name]
            if not doubtful or time.monotonic() >= until_s:
                return found | {name: self.holder(name) for name in doubtful if name in self.names()}
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)

    @contextmanager
    def exclusively(self, name: str) -> Iterator[None]:
        """Hold a lease during the block; waits while a living process holds it."""
        pause_s = 0.02
        while not self.claim(name):
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)
        try:
            yield
        finally:
            self.release(name)

    def close(self) -> None:
        """Release all leases and stop the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for name in list(self._held):
            with suppress(OSError, StoreError):  # others take it over once it is stale
                self.release(name)

    def _found(self) -> dict[str, dict[int, Entry]]:
        """All leases by name, then by generation; normally one generation each."""
        found: defaultdict[str, dict[int, Entry]] = defaultdict(dict)
        for entry in self.store.list(LEASES):
            if match := _NAME.fullmatch(entry.path):
                found[match["name"]][int(match["generation"])] = entry
        return found

    def _generations(self, name: str) -> dict[int, str]:
        """The paths of a lease by generation; normally one or none."""
        return {generation: entry.path for generation, entry in self._found().get(name, {}).items()}

    def _wrote(self, path: str) -> bool:
        """Whether a lease was written by this object."""
        try:
            return self._token.encode() in self.store.read(path, LIMIT_BYTES)
        except (FileNotFoundError, ValueError):
            return False

    def _lives(self, path: str) -> bool | None:
        """Whether the owner of a lease lives: True after a beat or a release, False if it is known to be dead."""
        try:
            content = self.store.read(path, LIMIT_BYTES)
        except FileNotFoundError:
            return None  # released a moment ago; the next claim finds it free
        except ValueError:
            content = b""
        owner = _parsed(content)
        if _is_of_here(owner) and process_is_dead(owner["pid"], owner.get("started")):
            return False  # no need to wait
        seen = self._seen.get(path)
        if seen is None or seen.content != content:
            self._seen[path] = _Seen(content, time.monotonic())
            return None if seen is None else True
        return False if time.monotonic() - seen.since_s > _lease_s(owner) else None

    def _runs_here(self, path: str) -> bool:
        """Whether the owner of a lease is a process that this one can see."""
        try:
            owner = _parsed(self.store.read(path, LIMIT_BYTES))
        except (FileNotFoundError, ValueError):
            return False
        started = owner.get("started")
        return _is_of_here(owner) and started is not None and process_started(owner["pid"]) == started

    def _content(self, held: _Held) -> bytes:
        return canonical_json(
            {
                "token": self._token,
                "host": socket.gethostname(),
                "machine": machine(),
                "pid": os.getpid(),
                "started": process_started(os.getpid()),
                "beat": held.beats,
                "lease_s": self.lease_s,
            }
        )

    def _beat(self) -> None:
        """Rewrite all held leases, a few times per `lease_s`, until `close`."""
        while not self._stop.wait(self.lease_s / BEATS_PER_LEASE):
            for name in list(self._held):
                # A store that fails now may answer at the next beat. A lease outlives a few missed beats.
                with suppress(OSError, StoreError):
                    # Without this check a process that was suspended would beat for a lease that others took over.
                    if not self.holds(name):
                        continue
                    with self._lock:  # a lease that is released at this moment must not be written again
                        held = self._held.get(name)
                        if held is not None:
                            held.beats += 1
                            self.store.write(held.path, self._content(held))


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _holder(content: bytes) -> Holder | None:
    owner = _parsed(content)
    host, pid = owner.get("host"), owner.get("pid")
    return Holder(host, pid) if isinstance(host, str) and isinstance(pid, int) else None


def _is_of_here(owner: dict[str, Any]) -> bool:
    """Whether the process id of a lease's owner means something on this machine."""
    here, pid = machine(), owner.get("pid")
    return here is not None and owner.get("machine") == here and type(pid) is int and 0 < pid < 2**31


def _lease_s(owner: dict[str, Any]) -> float:
    """Seconds without a beat after which an owner counts as dead: any positive finite number of its own."""
    value = owner.get("lease_s")
    try:
        seconds = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
    except OverflowError:  # an integer larger than any clock
        return sys.float_info.max
    return seconds if 0 < seconds < math.inf else DEFAULT_LEASE_S
