"""Leases: how the writers of one cache share its work, and how the work of a dead one is taken over.

A lease is a small file that its owner rewrites ("beats") every few seconds. Whoever wants the same thing watches it:
once its bytes have not changed for as long as it says, by the watcher's own clock, its owner counts as dead, and so
does at once a process of this machine that is no more. It is taken over by creating the next generation, which only
one can: nothing but `Store.create_all` is needed, no lock, no common clock.

A lease spares work; it does not keep the data whole. An owner that was only asleep may still write, so every file
of a unit is created, never replaced, and the commit record decides (`storage/writer.py`).
"""

import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinymim.configs.errors import StoreError
from tinymim.storage.atomic import DAY_S, canonical_json
from tinymim.storage.layout import LEASES, UNITS, shard_stem
from tinymim.storage.store import Entry, Store

DEFAULT_LEASE_S = 60.0
BEATS_PER_LEASE = 5
LIMIT_BYTES = 4096
_NAME = re.compile(rf"{LEASES}/(?P<name>.+)\.g(?P<generation>[0-9]{{1,9}})\.json")


def shard_lease(shard: str) -> str:
    """The lease on the units of a source shard. Not one per unit: jobs that want different views must not overlap."""
    return f"{UNITS}/{shard_stem(shard)}"


@dataclass
class _Seen:
    """A lease of somebody else, watched."""

    content: bytes
    since_s: float  # of this process's monotonic clock, when it was first seen with this content


@dataclass
class _Held:
    path: str
    beats: int = 0


@dataclass(frozen=True)
class Holder:
    """Whose lease it is, for messages."""

    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass
class Leases:
    """The leases of this process on one cache. A thread beats for as long as there are any.

    Args:
        store: of the cache.
        lease_s: seconds without a beat after which others may take over what this process holds.
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
        """Take the lease `name`, if nobody has it or its owner is dead. Harmless twice.

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
        if latest and not self._dead(generations[latest]):
            return False
        held = _Held(f"{LEASES}/{name}.g{latest + 1}.json")
        if self.store.create_all({held.path: self._content(held)}):
            return False
        with self._lock:
            self._held[name] = held
        self._beat_from_now_on()
        self.store.remove(generations.values())
        return True

    def holds(self, name: str) -> bool:
        """Whether the lease is still this process's, by what the store says now."""
        held = self._held.get(name)
        if held is None:
            return False
        generations = self._generations(name)
        if generations and generations[max(generations)] == held.path:
            with suppress(FileNotFoundError):
                return self._token.encode() in self.store.read(held.path, LIMIT_BYTES)
        return False

    def release(self, name: str) -> None:
        """Give the lease back; harmless where there is none."""
        with self._lock:
            held = self._held.pop(name, None)
        if held is not None:
            self.store.remove([held.path])

    def holder(self, name: str) -> Holder | None:
        """Who has the lease, as far as it can be read; None: nobody."""
        generations = self._generations(name)
        if not generations:
            return None
        try:
            return _holder(self.store.read(generations[max(generations)], LIMIT_BYTES))
        except (FileNotFoundError, ValueError):
            return None

    def names(self) -> set[str]:
        """The leases that exist, of whomever, dead or alive."""
        matches = (_NAME.fullmatch(entry.path) for entry in self.store.list(LEASES))
        return {match["name"] for match in matches if match}

    def living(self) -> dict[str, Holder | None]:
        """The leases whose owners are not known to be dead, and whose they are as far as it can be read.

        It looks once and writes nothing, so the dead of other machines are only told by a day without a beat.
        """
        latest: dict[str, tuple[int, Entry]] = {}
        for entry in self.store.list(LEASES):
            if match := _NAME.fullmatch(entry.path):
                name, generation = match["name"], int(match["generation"])
                latest[name] = max(latest.get(name, (0, entry)), (generation, entry), key=lambda found: found[0])
        old = time.time() - DAY_S
        paths = {name: entry.path for name, (_, entry) in latest.items() if entry.modified.timestamp() > old}
        return {name: self.holder(name) for name, path in paths.items() if not self._dead(path)}

    @contextmanager
    def exclusively(self, name: str) -> Iterator[None]:
        """Hold a lease for the block, waiting for as long as somebody alive has it."""
        pause_s = 0.02
        while not self.claim(name):
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)
        try:
            yield
        finally:
            self.release(name)

    def close(self) -> None:
        """Give everything back and stop beating."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for name in list(self._held):
            with suppress(OSError, StoreError):  # it goes stale then
                self.release(name)

    def _generations(self, name: str) -> dict[int, str]:
        """The paths of a lease by generation; normally one or none."""
        matches = (_NAME.fullmatch(entry.path) for entry in self.store.list(LEASES))
        return {int(match["generation"]): match.string for match in matches if match and match["name"] == name}

    def _dead(self, path: str) -> bool:
        try:
            content = self.store.read(path, LIMIT_BYTES)
        except FileNotFoundError:
            return False  # given back a moment ago; the next look tells
        except ValueError:
            content = b""
        owner = _parsed(content)
        machine, pid = owner.get("machine"), owner.get("pid")
        if (
            machine is not None
            and machine == _machine()
            and isinstance(pid, int)
            and _started(pid) != owner.get("started")
        ):
            return True
        seen = self._seen.get(path)
        if seen is None or seen.content != content:
            self._seen[path] = _Seen(content, time.monotonic())
            return False
        lease_s = owner.get("lease_s")
        limit_s = float(lease_s) if isinstance(lease_s, int | float) and 0 < lease_s < 86_400 else DEFAULT_LEASE_S
        return time.monotonic() - seen.since_s > limit_s

    def _content(self, held: _Held) -> bytes:
        return canonical_json(
            {
                "token": self._token,
                "host": socket.gethostname(),
                "machine": _machine(),
                "pid": os.getpid(),
                "started": _started(os.getpid()),
                "beat": held.beats,
                "lease_s": self.lease_s,
            }
        )

    def _beat_from_now_on(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="tinymim-leases", daemon=True)
            self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(self.lease_s / BEATS_PER_LEASE):
            for name in list(self._held):
                # A store that fails now may answer at the next beat; until then nothing is worse than a missed one.
                with suppress(OSError, StoreError):
                    if self.holds(name):
                        self._beat_once(name)

    def _beat_once(self, name: str) -> None:
        with self._lock:  # a lease that is given back meanwhile must not be written again
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


def _machine() -> str | None:
    """What two processes share if and only if they see one another's process numbers; None where that is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a living process of this machine began, in the kernel's ticks: tells it from a later one of its number.

    None where there is none, or it has ended and waits for its parent to notice.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else rest[18]
    except (OSError, IndexError):
        return None
