"""Shards are spooled before a loader needs them: a thread follows the plan that the loader takes its batches from."""

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

LOOK_ITEMS: Final = 2**18  # of a plan, at 32 bytes each
_LOOK_ENTRIES = 16  # further at every entry that is asked for, so that no step waits for a long look
_PULSE_S = 1.0
_SHORT_PULSE_S = 0.1  # while a reader downloads what is to be held


@contextmanager
def spooling(
    shards: Sequence[Shard], plan: Iterable[Items], look_ahead: bool
) -> Iterator[tuple[Iterable[Items], Callable[[], None]]]:
    """Spool the shards of a plan while its entries are worked on; the plan of local shards is handed through.

    Args:
        shards: what the first column of the items counts.
        plan: entries of items [..., columns].
        look_ahead: whether the plan may be read further than its entries are asked for.

    Yields:
        the same plan, and what to call when the batches of its next entry have come back.
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
        thread.join(_PULSE_S)  # a store that hangs must not hold up the end; the thread ends with its request


class _Window:
    """The tars that some entries need, in the order of their first need."""

    def __init__(self, tars: Sequence[SpooledTar]) -> None:
        self._tars = tars
        self._entries: deque[tuple[list[int], int]] = deque()  # tars, items
        self._needs: dict[int, int] = {}  # by tar, how many of the entries need it
        self.size_bytes = self.num_items = 0

    def add(self, entry: Items) -> bool:
        """Whether a tar is new. Raises RecipeError where the entry needs more tars at once than the spool holds."""
        before = len(self._needs)
        needed = np.unique(entry[..., 0]).tolist()
        self._refuse_more_than_fits([self._tars[number] for number in needed])
        for number in needed:
            if number not in self._needs:
                self.size_bytes += self._tars[number].source.size_bytes
            self._needs[number] = self._needs.get(number, 0) + 1
        self._entries.append((needed, entry[..., 0].size))
        self.num_items += entry[..., 0].size
        return len(self._needs) > before

    def _refuse_more_than_fits(self, tars: list[SpooledTar]) -> None:
        needed = sum(tar.source.size_bytes for tar in tars)
        budget = tars[0].spool.budget_bytes if tars else 0
        if needed > budget:
            raise RecipeError(
                f"source.spool.gib is less than the {len(tars)} shards of one batch",
                got=f"{budget / 2**30:.3g} GiB",
                expected=f"at least {needed / 2**30:.3g} GiB",
                hint="raise source.spool.gib, lower order.shuffle_units, or make smaller shards",
            )

    def drop_first(self) -> bool:
        """Whether a tar is not needed any more."""
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
    """Two windows of a plan: what was handed out and has not come back, and what comes after it.

    A tar of the first window is held open, so that nobody evicts it. Tars of the second are downloaded where room can
    be had from tars that nobody used lately, and marked as used while they wait.
    """

    def __init__(self, tars: Sequence[SpooledTar], look_ahead: bool) -> None:
        self._look_ahead = look_ahead
        self._budget_bytes = tars[0].spool.budget_bytes
        self._begun, self._coming = _Window(tars), _Window(tars)
        self._held: dict[SpooledTar, FileIO] = {}
        self._failed: set[SpooledTar] = set()
        self._lock = threading.Lock()
        self._changed, self._stopped = threading.Event(), threading.Event()

    def follow(self, plan: Iterable[Items]) -> Iterator[Items]:
        """The entries of `plan`, each read as far ahead as shards can be."""
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
                changed |= self._begun.add(entry)
            if changed:
                self._changed.set()
            yield entry

    def done(self) -> None:
        """The batches of the oldest entry that was handed out have come back."""
        with self._lock:
            changed = self._begun.drop_first()
        if changed:
            self._changed.set()

    def stop(self) -> None:
        self._stopped.set()
        self._changed.set()

    def run(self) -> None:
        """Hold, fetch and mark, until `stop`."""
        try:
            while not self._stopped.is_set():
                everything_held = len(self._held) == len(self._windows()[0])
                self._changed.wait(_PULSE_S if everything_held else _SHORT_PULSE_S)
                self._changed.clear()
                while self._marked() and self._fetched_one():
                    pass
        finally:
            for file in self._held.values():
                file.close()

    def _looks_further(self) -> bool:
        coming = self._coming
        return self._look_ahead and coming.size_bytes < self._budget_bytes and coming.num_items < LOOK_ITEMS

    def _windows(self) -> tuple[list[SpooledTar], list[SpooledTar]]:
        """What is begun, and what comes after it as far as the budget holds both."""
        with self._lock:
            begun, coming, room = self._begun.tars(), self._coming.tars(), self._budget_bytes - self._begun.size_bytes
        held = set(begun)
        coming = [tar for tar in coming if tar not in held]
        ends = accumulate(tar.source.size_bytes for tar in coming)
        return begun, [tar for tar, end in zip(coming, ends, strict=True) if end <= room]

    def _marked(self) -> bool:
        """Hold what is begun, mark what comes, and let go of the rest; False once stopped."""
        begun, coming = self._windows()
        for tar in self._held.keys() - set(begun):
            self._held.pop(tar).close()
            tar.touch(used=tar in coming)
        for tar in begun:
            if tar not in self._held:
                with suppress(TinymimError):
                    file = tar.open_spooled()
                    if file is not None:
                        self._held[tar] = file
        for tar in coming:
            tar.touch()
        return not self._stopped.is_set()

    def _fetched_one(self) -> bool:
        """Download the first tar that is needed and absent; False where there is none, or no room.

        A tar that fails is left to the reader that needs it, which raises.
        """
        begun, coming = self._windows()
        for tar in dict.fromkeys([*begun, *coming]):
            if tar in self._failed or tar in self._held or tar.path.exists():
                continue
            try:
                file = tar.fetch(ahead=self._marked)
            except NoRoom:
                return False
            except TinymimError:
                self._failed.add(tar)
                continue
            if file is not None:
                file.close()
                return True
        return False
