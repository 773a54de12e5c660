"""The ledger of units: which are left, how often each was tried; and the batches of a unit for the loader."""

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
NO_ITEMS: Items = np.empty((0, 3), dtype=np.int64)


@dataclass(frozen=True)
class UnitReport:
    """The outcome of a unit that a job took.

    Attributes:
        unit: the unit.
        outcome: `committed`; `failed`, to be tried again; `elsewhere`, held or committed by another job; `unfinished`,
            given back for a cause outside the unit.
        reason: why it failed.
        images: readable images of a committed unit.
        views: records of a committed unit.
        stored_bytes: the size of its files.
        seconds: the job's time by phase since its previous report (`Stopwatch.seconds`).
    """

    unit: UnitId
    outcome: Literal["committed", "failed", "elsewhere", "unfinished"]
    reason: str = ""
    images: int = 0
    views: int = 0
    stored_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class Ledger:
    """The units that are left: waiting, in progress, held by other jobs, failed, given up.

    Args:
        missing: lists the cache and returns the units that nobody has committed.
        retries: number of further tries of a failed unit, after the units that did not fail.
    """

    def __init__(self, missing: Callable[[], list[UnitId]], retries: int) -> None:
        self._missing, self._retries = missing, retries
        self._attempts: Counter[UnitId] = Counter()
        self._waiting: deque[UnitId] = deque()
        self._in_progress: set[UnitId] = set()
        self._elsewhere: set[UnitId] = set()
        self.failures: dict[UnitId, str] = {}  # the last reason of each unit that was given up
        self.committed = 0
        self.look()

    def look(self) -> bool:
        """List the cache again. False: nothing is left to do or to wait for."""
        # What is in progress is missing too, perhaps as part of a longer run, so its whole shard is skipped.
        busy = {unit.shard for unit in self._in_progress}
        missing = self._missing()
        # Another job may have committed a unit that this one gave up.
        self.failures = {unit: reason for unit, reason in self.failures.items() if unit in missing}
        missing = [unit for unit in missing if unit not in self.failures]
        free = [unit for unit in missing if unit.shard not in busy]
        self._waiting = deque(sorted(free, key=self._attempts.__getitem__))
        self._elsewhere.clear()
        return bool(missing)

    def take(self) -> UnitId | None:
        """A unit to work on; None: all are done, in progress, or held by other jobs."""
        if not self._waiting:
            return None
        unit = self._waiting.popleft()
        self._in_progress.add(unit)
        return unit

    def settle(self, report: UnitReport) -> bool:
        """Record the outcome of a unit that was taken. True: it failed for the last time and is given up."""
        unit = report.unit
        self._in_progress.discard(unit)
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
        """Whether no unit can be taken and none is in progress."""
        return not self._waiting and not self._in_progress

    def elsewhere(self) -> set[UnitId]:
        """Units found to be other jobs' since the last look."""
        return set(self._elsewhere)

    def left(self) -> set[UnitId]:
        """Units neither committed nor given up, as of the last look."""
        return {*self._waiting, *self._in_progress, *self._elsewhere}


@dataclass(frozen=True)
class Piece:
    """One batch of a unit."""

    unit: UnitId
    first: bool  # batch of its unit
    last: bool


class UnitBatches:
    """The batches of units, for a loader that reads ahead of the teacher.

    Args:
        source: the shards.
        images_per_batch: images in one batch; each comes with all views of its unit.
        take: returns the next unit, or None where there is none now. Its argument is whether it may wait, which is so
            when no batch is on its way through the loader.
    """

    def __init__(self, source: ShardSet, images_per_batch: int, take: Callable[[bool], UnitId | None]) -> None:
        self._counts = {shard.name: (number, shard.num_samples) for number, shard in enumerate(source.shards)}
        self._images_per_batch, self._take = images_per_batch, take
        self._loading: deque[Piece | None] = deque()  # the loader keeps the order of batches

    def plan(self) -> Iterator[Items]:
        """Yield the items of each batch, int64 [views, 3], until no unit can be taken and no batch is in the loader."""
        while True:
            unit = self._take(not any(self._loading))
            if unit is not None:
                number, count = self._counts[unit.shard]
                batches = list(view_batches(number, count, unit.views, self._images_per_batch))
                for place, items in enumerate(batches):
                    self._loading.append(Piece(unit, place == 0, place == len(batches) - 1))
                    yield items
            elif any(self._loading):
                # The loader reads a further entry of the plan before it returns a batch. An empty batch lets it
                # return those that are ready while the next unit is still to come.
                self._loading.append(None)
                yield NO_ITEMS
            else:
                return

    def next_piece(self) -> Piece | None:
        """The piece of the batch that the loader returned; None: an empty batch."""
        return self._loading.popleft()

    def in_progress(self) -> list[UnitId]:
        """Units with batches in the loader, in order; the first is the one whose batch comes next."""
        return list(dict.fromkeys(piece.unit for piece in self._loading if piece is not None))


def missing_units(
    source: ShardSet, committed: Iterable[UnitId], num_views: int, cut_like: Collection[UnitId] = ()
) -> list[UnitId]:
    """The units to compute: per shard with images, every maximal run of views that no committed unit holds.

    Args:
        source: the shards.
        committed: the committed units.
        num_views: number of views per image that the cache is to hold.
        cut_like: former units; a run is cut where one of them began or ended.
    """
    present = list(committed)
    held: dict[str, set[int]] = {shard.name: set() for shard in source.shards if shard.num_samples}
    cuts: dict[str, set[int]] = {name: {0, num_views} for name in held}
    for unit in present:
        if unit.shard in held:
            held[unit.shard].update(unit.views)
    for unit in (*present, *cut_like):
        if unit.shard in cuts:
            cuts[unit.shard] |= {unit.first_view, unit.first_view + unit.num_views}
    todo = []
    for shard, views in held.items():
        for first, end in pairwise(sorted(cut for cut in cuts[shard] if cut <= num_views)):
            if first not in views:
                todo.append(UnitId(shard, first, end - first))
    return todo
