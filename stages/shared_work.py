"""Which units a job of `cache-teacher` works on: those that nobody has committed, claimed as their turn comes."""

import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

from tinymim.pipeline.order import Items, view_batches
from tinymim.pipeline.shards import ShardSet
from tinymim.stages.interrupt import Interrupted, StopFlag
from tinymim.stages.progress import say
from tinymim.storage.layout import UnitId
from tinymim.storage.writer import CacheWriter

LOOK_AGAIN_S = 2.0


@dataclass(frozen=True)
class Piece:
    """One batch of a unit."""

    unit: UnitId
    items: Items  # int64 [views, 3]
    last: bool  # of its unit


class SharedWork:
    """The units of a cache that are missing, shared with all other jobs that write it.

    Batches are handed out by `rounds` in the order in which a loader asks for them, ahead of the work on them;
    `next_piece` says of each batch that comes back what it was. A round ends where nothing is left to claim.

    Args:
        writer: of the cache.
        source: the shards of the recipe.
        num_views: views of every image that the recipe wants.
        images_per_batch: in one batch; each comes with all views of its unit.
        stop: looked at while others finish their units.
        cut_like: units whose bounds are kept, as `missing_units` says.
    """

    def __init__(
        self,
        writer: CacheWriter,
        source: ShardSet,
        num_views: int,
        images_per_batch: int,
        stop: StopFlag,
        cut_like: Collection[UnitId] = (),
    ) -> None:
        self.writer, self.source, self.num_views, self.stop = writer, source, num_views, stop
        self.images_per_batch, self.cut_like = images_per_batch, cut_like
        self._numbers = {shard.name: number for number, shard in enumerate(source.shards)}
        self._handed_out: deque[Piece] = deque()

    def missing(self) -> list[UnitId]:
        """The units that nobody has committed yet."""
        return missing_units(self.source, self.writer.refresh(), self.num_views, self.cut_like)

    def missing_views(self) -> int:
        """How many views those hold."""
        return sum(unit.num_views * self._samples(unit) for unit in self.missing())

    def rounds(self) -> Iterator[Iterator[Items]]:
        """Batches to make, int64 [views, 3], until every unit is committed, by this job or by others.

        Raises:
            Interrupted: asked to stop while others were at work.
        """
        waiting_for = ""
        while self.missing():
            batches = self._claimed_batches()
            first = next(batches, None)
            if first is not None:
                yield chain([first], batches)
                continue
            holders = ", ".join(map(str, self.writer.holders(self.missing()))) or "another job"
            if holders != waiting_for:
                say(f"cache-teacher: {holders} is at work on all that is left: waiting, to take over if it dies")
                waiting_for = holders
            time.sleep(LOOK_AGAIN_S if not self.stop.requested else 0)
            if self.stop.requested:
                raise Interrupted("committed units are safe; the same command continues")

    def next_piece(self) -> Piece:
        """What the next batch is that comes back from the loader."""
        return self._handed_out.popleft()

    def _claimed_batches(self) -> Iterator[Items]:
        for unit in self.missing():
            if not self.writer.claim(unit):
                continue
            batches = list(
                view_batches(self._numbers[unit.shard], self._samples(unit), unit.views, self.images_per_batch)
            )
            for number, items in enumerate(batches, start=1):
                self._handed_out.append(Piece(unit, items, number == len(batches)))
                yield items

    def _samples(self, unit: UnitId) -> int:
        return self.source.shards[self._numbers[unit.shard]].num_samples


def missing_units(
    source: ShardSet, committed: set[UnitId], num_views: int, cut_like: Collection[UnitId] = ()
) -> list[UnitId]:
    """The units to compute: per shard with images, every maximal run of views that no committed unit holds.

    Args:
        source: the shards.
        committed: the units that are there.
        num_views: views of every image that are wanted.
        cut_like: units that were there once: a run is cut where one of them began or ended.
    """
    held: dict[str, set[int]] = {shard.name: set() for shard in source.shards if shard.num_samples}
    cuts: dict[str, set[int]] = {name: {0, num_views} for name in held}
    for unit in committed:
        if unit.shard in held:
            held[unit.shard].update(unit.views)
    for unit in (*committed, *cut_like):
        if unit.shard in cuts:
            cuts[unit.shard] |= {unit.first_view, unit.first_view + unit.num_views}
    todo = []
    for shard, views in held.items():
        for first, end in pairwise(sorted(cut for cut in cuts[shard] if cut <= num_views)):
            if first not in views:
                todo.append(UnitId(shard, first, end - first))
    return todo
