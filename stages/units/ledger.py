"""The ledger of units: which are left, how often each was tried; and the batches of a unit for the loader."""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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
    """One batch of a part of a unit: some images with all views of the part.

    Attributes:
        unit: the unit.
        layers: the layers that lack it.
        views: the views of the part.
        first, last: whether it is the first and the last batch of the part.
    """

    unit: UnitId
    layers: tuple[str, ...]
    views: range
    first: bool
    last: bool

    @property
    def begins_unit(self) -> bool:
        """Whether it is the unit's first batch."""
        return self.first and self.views.start == self.unit.first_view

    @property
    def ends_unit(self) -> bool:
        """Whether it is the unit's last batch."""
        return self.last and self.views.stop == self.unit.views.stop


class UnitBatches:
    """The batches of units, for a loader that reads ahead of the teacher.

    A unit is made in parts: all images with the first views, then all images with the next ones. So memory does not
    depend on the number of views. Each part decodes the images again.

    Args:
        source: the shards.
        images_per_batch: images in one batch; each comes with all views of a part.
        views_per_part: the largest number of views of a part.
        take: returns the next unit and the layers that lack it, or None where there is none now. Its argument is
            whether it may wait, which is so when no batch is on its way through the loader.
    """

    def __init__(
        self,
        source: ShardSet,
        images_per_batch: int,
        views_per_part: int,
        take: Callable[[bool], tuple[UnitId, tuple[str, ...]] | None],
    ) -> None:
        self._counts = {shard.name: (number, shard.num_samples) for number, shard in enumerate(source.shards)}
        self._images_per_batch, self._views_per_part, self._take = images_per_batch, views_per_part, take
        self._loading: deque[Piece | None] = deque()  # the loader keeps the order of batches

    def plan(self) -> Iterator[Items]:
        """Yield the items of each batch, int64 [views, 3], until no unit can be taken and no batch is in the loader."""
        while True:
            taken = self._take(not any(self._loading))
            if taken is not None:
                unit, layers = taken
                number, count = self._counts[unit.shard]
                for views in parts_of(unit, self._views_per_part):
                    batches = list(view_batches(number, count, views, self._images_per_batch))
                    for place, items in enumerate(batches):
                        self._loading.append(Piece(unit, layers, views, place == 0, place == len(batches) - 1))
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


def parts_of(unit: UnitId, views_per_part: int) -> list[range]:
    """The views of a unit in runs of `views_per_part`; the last one may be shorter."""
    views = unit.views
    return [views[start : start + views_per_part] for start in range(0, len(views), views_per_part)]


def missing_units(
    source: ShardSet,
    committed: Sequence[Collection[UnitId]],
    view_units: Iterable[UnitId],
    num_views: int,
    views_per_unit: int,
    cut_like: Iterable[UnitId] = (),
) -> list[UnitId]:
    """The units that any layer lacks: per shard with images, the runs of views that its committed units leave out.

    Runs are cut at multiples of `views_per_unit`, whoever cuts them. They are also cut at the borders of the view
    layer's units, so that a unit lies inside one of them or outside all, and at those of every layer's units, so that
    each layer holds all of a run or nothing.

    Args:
        source: the shards.
        committed: the committed units of each layer.
        view_units: the committed units of the view layer.
        num_views: number of views per image that the layers are to hold.
        views_per_unit: the largest number of views of a unit.
        cut_like: former units; a run is cut where one of them began or ended.
    """
    regular = {*range(0, num_views, views_per_unit), num_views}
    held: dict[str, list[list[UnitId]]] = {
        shard.name: [[] for _ in committed] for shard in source.shards if shard.num_samples
    }
    cuts: dict[str, set[int]] = {}
    for number, units in enumerate(committed):
        for unit in units:
            if unit.shard in held:
                held[unit.shard][number].append(unit)
    for unit in itertools.chain(*committed, view_units, cut_like):
        cuts.setdefault(unit.shard, set()).update((unit.first_view, unit.first_view + unit.num_views))
    todo = []
    for shard, by_layer in held.items():
        borders = sorted(cut for cut in regular | cuts.get(shard, set()) if cut <= num_views)
        for first, end in pairwise(borders):
            if not all(any(first in unit.views for unit in units) for units in by_layer):
                todo.append(UnitId(shard, first, end - first))
    return todo
