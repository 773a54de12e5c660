"""A thread spools shards before a loader needs them, following the plan that the loader takes its batches from."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import accumulate, islice
from typing import Final

import numpy as np

from tinymim.configs.errors import RecipeError, TinymimError
from tinymim.pipeline.order import Items
from tinymim.pipeline.shards import Shard
from tinymim.pipeline.spool import NoRoom, SpooledTar

LOOK_ITEMS: Final = 2**18  # longest look ahead, in items of 32 bytes
_LOOK_ENTRIES = 16  # entries read ahead per requested entry, so that no step waits for a long look
_POLL_S = 1.0
_SHORT_POLL_S = 0.1  # while a reader downloads a tar that this thread will hold open


@contextmanager
def spooling(
    shards: Sequence[Shard], plan: Iterable[Items], look_ahead: bool
) -> Iterator[tuple[Iterable[Items], Callable[[], None]]]:
    """Spool the shards of a plan while its entries are in use. A plan over local shards is passed on unchanged.

    Args:
        shards: the shards that the first column of the items indexes.
        plan: entries of items [..., columns].
        look_ahead: whether the plan may be read ahead of its consumer.

    Yields:
        The same plan, and a function to call when the batches of the oldest entry are complete.
    """
    tars = [shard.place for shard in shards if isinstance(shard.place, SpooledTar)]
    if len(tars) < len(shards) or not tars:
        yield plan, lambda: None
        return
    ahead = _ReadAhead(tars, look_ahead)
    thread = threading.Thread(target=ahead.run, name="tinymim-spool-ahead", daemon=True)
    thread.start()
    try:
        yield ahead.follow(plan), ahead.done
    finally:
        ahead.stop()
        thread.join(_POLL_S)  # a store that hangs must not delay the end; the thread ends with its request


class _Window:
    """The tars that a range of entries needs, in the order of first use."""

    def __init__(self, tars: Sequence[SpooledTar]) -> None:
        self._tars = tars
        self._entries: deque[tuple[list[int], int]] = deque()  # (indices of tars, number of items)
        self._needs: dict[int, int] = {}  # entries that need a tar, by its index
        self.size_bytes = self.num_items = 0

    def add(self, entry: Items) -> bool:
        """Append an entry. Returns whether it needs a new tar.

        Raises:
            RecipeError: the entry needs more bytes of tars at once than the spool may hold.
        """
        before = len(self._needs)
        needed = np.unique(entry[..., 0]).tolist()
        needed_bytes = sum(self._tars[number].source.size_bytes for number in needed)
        budget_bytes = self._tars[0].spool.budget_bytes
        if needed_bytes > budget_bytes:
            raise RecipeError(
                f"source.spool.gib is less than the {len(needed)} shards of one batch",
                got=f"{budget_bytes / 2**30:.3g} GiB",
                expected=f"at least {needed_bytes / 2**30:.3g} GiB",
                hint="raise source.spool.gib, lower order.shuffle_units, or make smaller shards",
            )
        for number in needed:
            if number not in self._needs:
                self.size_bytes += self._tars[number].source.size_bytes
            self._needs[number] = self._needs.get(number, 0) + 1
        self._entries.append((needed, entry[..., 0].size))
        self.num_items += entry[..., 0].size
        return len(self._needs) > before

    def drop_first(self) -> bool:
        """Remove the oldest entry. Returns whether a tar is no longer needed."""
        before = len(self._needs)
        needed, num_items = self._entries.popleft()
        for number in needed:
            self._needs[number] -= 1
            if not self._needs[number]:
                del self._needs[number]
                self.size_bytes -= self._tars[number].source.size_bytes
        self.num_items -= num_items
        return len(self._needs) < before

    def tars(self) -> list[SpooledTar]:
        return [self._tars[number] for number in self._needs]


class _ReadAhead:
    """Two windows of a plan: the entries in use, and the entries after them.

    Tars of the first window are held open, which prevents their eviction. Tars of the second are downloaded if evicting
    tars unused for some time makes room, and are marked as used while they wait.
    """

    def __init__(self, tars: Sequence[SpooledTar], look_ahead: bool) -> None:
        self._look_ahead = look_ahead
        self._budget_bytes = tars[0].spool.budget_bytes
        self._in_use, self._coming = _Window(tars), _Window(tars)
        self._held: dict[SpooledTar, FileIO] = {}
        self._failed: set[SpooledTar] = set()
        self._lock = threading.Lock()  # guards the windows; the other attributes belong to one thread
        self._changed, self._stopped = threading.Event(), threading.Event()

    def follow(self, plan: Iterable[Items]) -> Iterator[Items]:
        """Yield the entries of `plan`, reading it ahead as far as the spool holds their tars."""
        rest, entries = iter(plan), deque[Items]()
        while True:
            changed = False
            for entry in islice(rest, _LOOK_ENTRIES if self._looks_further() else int(not entries)):
                entries.append(entry)
                with self._lock:
                    changed |= self._coming.add(entry)
            if not entries:
                return
            entry = entries.popleft()
            with self._lock:
                self._coming.drop_first()
                changed |= self._in_use.add(entry)
            if changed:
                self._changed.set()
            yield entry

    def done(self) -> None:
        """Mark the oldest entry in use as complete."""
        with self._lock:
            changed = self._in_use.drop_first()
        if changed:
            self._changed.set()

    def stop(self) -> None:
        self._stopped.set()
        self._changed.set()

    def run(self) -> None:
        """Hold, download and mark tars until `stop`."""
        try:
            while not self._stopped.is_set():
                # Other processes add and evict tars without an event, hence the timeout.
                everything_held = len(self._held) == len(self._windows()[0])
                self._changed.wait(_POLL_S if everything_held else _SHORT_POLL_S)
                self._changed.clear()
                while self._update_holds() and self._fetch_one():
                    pass
        finally:
            for file in self._held.values():
                file.close()

    def _looks_further(self) -> bool:
        coming = self._coming
        return self._look_ahead and coming.size_bytes < self._budget_bytes and coming.num_items < LOOK_ITEMS

    def _windows(self) -> tuple[list[SpooledTar], list[SpooledTar]]:
        """The tars in use, and the coming tars that fit into the budget next to them."""
        with self._lock:
            in_use, coming = self._in_use.tars(), self._coming.tars()
            room_bytes = self._budget_bytes - self._in_use.size_bytes
        known = set(in_use)
        coming = [tar for tar in coming if tar not in known]
        ends = accumulate(tar.source.size_bytes for tar in coming)
        return in_use, [tar for tar, end in zip(coming, ends, strict=True) if end <= room_bytes]

    def _update_holds(self) -> bool:
        """Hold the tars in use, mark the coming ones and release the rest; False once stopped."""
        in_use, coming = self._windows()
        for tar in self._held.keys() - set(in_use):
            self._held.pop(tar).close()
            tar.touch(used=tar in coming)  # a tar that this plan needs no more is the first to be evicted
        for tar in in_use:
            if tar not in self._held:
                with suppress(TinymimError):
                    file = tar.open_spooled()
                    if file is not None:
                        self._held[tar] = file
        for tar in coming:
            tar.touch()
        return not self._stopped.is_set()

    def _fetch_one(self) -> bool:
        """Download the first needed tar that is absent; False if there is none, or no room.

        A tar that fails is left to the reader that needs it, which raises the error.
        """
        in_use, coming = self._windows()
        for tar in [*in_use, *coming]:
            if tar in self._failed or tar in self._held or tar.path.exists():
                continue
            try:
                # A download takes long, so the holds are updated between its parts.
                file = tar.fetch(ahead=self._update_holds)
            except NoRoom:
                return False
            except TinymimError:
                self._failed.add(tar)
                continue
            if file is not None:
                file.close()
                return True
        return False
