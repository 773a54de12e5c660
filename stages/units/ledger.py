"""Which units a job of `cache-teacher` works on, how often each was tried, and their batches for a loader."""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np

from tinymim.pipeline.order import Items, view_batches
from tinymim.pipeline.shards import ShardSet
from tinymim.storage.layout import UnitId

LOOK_AGAIN_S = 2.0
NOTHING: Items = np.empty((0, 3), dtype=np.int64)


@dataclass(frozen=True)
class UnitReport:
    """What became of a unit that a job took on.

    Attributes:
        outcome: `committed`; `failed`: may be tried again; `elsewhere`: another job has it or did it;
            `unfinished`: given back through no fault of its own.
        reason: of a failure.
        images: readable ones; in a committed unit.
        views: records, in a committed unit.
        stored_bytes: of its files.
        seconds: by phase, of all the job since its report before this one (`where_time_goes`).
    """

    unit: UnitId
    outcome: Literal["committed", "failed", "elsewhere", "unfinished"]
    reason: str = ""
    images: int = 0
    views: int = 0
    stored_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class Ledger:
    """The units that are left: who may be given which, what failed how often, and what is given up.

    Args:
        missing: finds the units that nobody has committed, by a look at the cache.
        retries: times that a failed unit is tried again, after those that did not fail.
    """

    def __init__(self, missing: Callable[[], list[UnitId]], retries: int) -> None:
        self._missing, self._retries = missing, retries
        self._attempts: Counter[UnitId] = Counter()
        self._waiting: deque[UnitId] = deque()
        self._in_hand: set[UnitId] = set()
        self._elsewhere: set[UnitId] = set()
        self.failures: dict[UnitId, str] = {}  # given up, with the last reason
        self.committed = 0
        self.look()

    def look(self) -> bool:
        """Look at the cache again, also for what others have given up. False: nothing is left to do or to wait for."""
        busy = {unit.shard for unit in self._in_hand}
        missing = self._missing()
        self.failures = {unit: reason for unit, reason in self.failures.items() if unit in missing}
        missing = [unit for unit in missing if unit not in self.failures]
        free = [unit for unit in missing if unit.shard not in busy]
        self._waiting = deque(sorted(free, key=self._attempts.__getitem__))
        self._elsewhere.clear()
        return bool(missing)

    def take(self) -> UnitId | None:
        """A unit to work on; None: all are done, in hand, or other jobs'."""
        if not self._waiting:
            return None
        unit = self._waiting.popleft()
        self._in_hand.add(unit)
        return unit

    def settle(self, report: UnitReport) -> bool:
        """Note what became of a unit that was taken. True: it failed for the last time."""
        unit = report.unit
        self._in_hand.discard(unit)
        if report.outcome == "committed":
            self.committed += 1
        elif report.outcome == "elsewhere":
            self._elsewhere.add(unit)
        elif report.outcome == "unfinished":
            self._waiting.appendleft(unit)
        else:
            self._attempts[unit] += 1
            if self._attempts[unit] > self._retries:
                self.failures[unit] = report.reason
                return True
            self._waiting.append(unit)
        return False

    @property
    def idle(self) -> bool:
        """Whether no unit can be taken and none is in hand."""
        return not self._waiting and not self._in_hand

    def elsewhere(self) -> set[UnitId]:
        """Those that other jobs have, since the last look."""
        return set(self._elsewhere)

    def left(self) -> set[UnitId]:
        """What is not committed and not given up, as far as this job knows."""
        return {*self._waiting, *self._in_hand, *self._elsewhere}


@dataclass(frozen=True)
class Piece:
    """One batch of a unit."""

    unit: UnitId
    first: bool  # of its unit
    last: bool


class UnitBatches:
    """The batches of the units that `take` gives, as a loader asks for them: ahead of the work on them.

    Args:
        source: the shards.
        images_per_batch: in one batch; each comes with all views of its unit.
        take: the next unit, None where there is none now; told whether nothing is in hand, so that it may wait.
    """

    def __init__(self, source: ShardSet, images_per_batch: int, take: Callable[[bool], UnitId | None]) -> None:
        self._counts = {shard.name: (number, shard.num_samples) for number, shard in enumerate(source.shards)}
        self._images_per_batch, self._take = images_per_batch, take
        self._handed_out: deque[Piece | None] = deque()

    def plan(self) -> Iterator[Items]:
        """Batches to make, int64 [views, 3]; it ends where nothing is in hand and nothing can be taken.

        While there is work ahead a unit that is not there yet must not stop it: then batches of nothing are handed out.
        """
        while True:
            unit = self._take(not any(self._handed_out))
            if unit is not None:
                number, count = self._counts[unit.shard]
                batches = list(view_batches(number, count, unit.views, self._images_per_batch))
                for place, items in enumerate(batches):
                    self._handed_out.append(Piece(unit, place == 0, place == len(batches) - 1))
                    yield items
            elif any(self._handed_out):
                self._handed_out.append(None)
                yield NOTHING
            else:
                return

    def next_piece(self) -> Piece | None:
        """What the next batch is that comes back from the loader; None: a batch of nothing."""
        return self._handed_out.popleft()

    def in_hand(self) -> list[UnitId]:
        """The units whose batches have not all come back, the one whose turn it is first."""
        return list(dict.fromkeys(piece.unit for piece in self._handed_out if piece is not None))


def missing_units(
    source: ShardSet, committed: Iterable[UnitId], num_views: int, cut_like: Collection[UnitId] = ()
) -> list[UnitId]:
    """The units to compute: per shard with images, every maximal run of views that no committed unit holds.

    Args:
        source: the shards.
        committed: the units that are there.
        num_views: views of every image that are wanted.
        cut_like: units that were there once: a run is cut where one of them began or ended.
    """
    there = list(committed)
    held: dict[str, set[int]] = {shard.name: set() for shard in source.shards if shard.num_samples}
    cuts: dict[str, set[int]] = {name: {0, num_views} for name in held}
    for unit in there:
        if unit.shard in held:
            held[unit.shard].update(unit.views)
    for unit in (*there, *cut_like):
        if unit.shard in cuts:
            cuts[unit.shard] |= {unit.first_view, unit.first_view + unit.num_views}
    todo = []
    for shard, views in held.items():
        for first, end in pairwise(sorted(cut for cut in cuts[shard] if cut <= num_views)):
            if first not in views:
                todo.append(UnitId(shard, first, end - first))
    return todo
