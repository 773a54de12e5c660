"""Stage two's views where the cache may lack records: what it holds is replayed, the rest is left to a teacher.

The order of samples depends on the source alone. So it is the same while the cache grows, and after a resume (I10).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Final

import numpy as np
import numpy.typing as npt

from tinymim.configs.sections.loader import VerifyConfig
from tinymim.pipeline.dataset import Lacking, ViewBatch
from tinymim.pipeline.joined import CachedSource, places_in_tar, refuse_changed, same_images, unreadable_keys
from tinymim.pipeline.loader import places_in
from tinymim.pipeline.mismatch import PartnersSeen
from tinymim.pipeline.order import Items
from tinymim.pipeline.records import Arrays, Slice, SliceId
from tinymim.pipeline.replay import Entry, ReplayedPixels, ReplayedViews, by_slice
from tinymim.pipeline.shards import Shard, ShardSet
from tinymim.pipeline.views import law_of
from tinymim.storage.blocks import DIGEST
from tinymim.storage.commit import UnitInfo, holds_keys
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.manifest import Manifest
from tinymim.storage.reader import CacheReader

Writable = tuple[UnitId, tuple[str, ...]]  # a unit, and the layers that lack it

LOOK_AGAIN_S: Final = 30.0  # between two looks for new units of a shard
_EVERY: Final = VerifyConfig(every=1)


class PartlyCachedSource(CachedSource):
    """The shards of a source with the units that a cache holds of them, perhaps none."""

    @property
    def counts(self) -> list[int]:
        """Images per shard, readable or not."""
        return [shard.num_samples for shard in self.shards]

    def held(self, num_views: int) -> int:
        """Number of pairs of a shard and one of its first views whose records all layers hold."""
        return sum(
            all(_unit_of(self.units[layer].get(shard.name, ()), view) for layer in self.units)
            for shard in self.shards
            for view in range(num_views)
        )


def join_partly(
    source: ShardSet, reader: CacheReader | None, layers: Sequence[str], num_views: int | None
) -> PartlyCachedSource:
    """Match all source shards with committed units by name and content.

    Args:
        source: the images.
        reader: the cache; None: there is none.
        layers: the layers of the records; the cache may lack some.
        num_views: number of views per image that the cache is to hold.

    Raises:
        CacheMismatch: a shard's bytes differ from those the teacher saw, or its units hold different images.
    """
    if reader is not None:
        refuse_changed(source, reader.manifest)
    # The view layer comes last, also in later looks: a target unit that is found has its view unit before it.
    held: dict[str, dict[str, Sequence[UnitInfo]]] = {layer: {} for layer in (*layers, VIEWS)}
    for layer, by_shard in held.items():
        if reader is not None and layer in (VIEWS, *reader.layers):
            by_shard.update(reader.by_shard(layer))
    for shard in source.shards:
        _require_same_images(shard.name, held)
    return PartlyCachedSource(source.shards, num_views or 0, held)


def _require_same_images(shard: str, units: Mapping[str, Mapping[str, Sequence[UnitInfo]]]) -> None:
    if infos := [info for by_shard in units.values() for info in by_shard.get(shard, ())]:
        same_images(shard, infos)


def _unit_of(infos: Sequence[UnitInfo], view: int) -> UnitInfo | None:
    return next((info for info in infos if view in info.unit.views), None)


class PartlyReplayedViews(ReplayedViews):
    """Batches of views, with the records that a cache holds, and `lacking`, which states those that it lacks.

    Item samples number *all* images of a shard. An image that cannot be read, or that the cache lists as unreadable, is
    left out of its batches. The cache may grow: where a shard lacks a view, its units are listed again, at most every
    `LOOK_AGAIN_S`.

    Args:
        reader: the cache; None: there is none.
        manifest: its manifest, or that of the cache to be.
        source: the result of `join_partly`.
        arrays, verify, lanes, per_lane: as `ReplayedViews`.
        write: whether batches state the units to write, and digests of all pixels.
    """

    def __init__(
        self,
        reader: CacheReader | None,
        manifest: Manifest,
        source: PartlyCachedSource,
        arrays: Mapping[str, Sequence[str]],
        verify: VerifyConfig,
        lanes: int = 1,
        per_lane: int = 1,
        write: bool = False,
    ) -> None:
        self._live = {layer: dict(by_shard) for layer, by_shard in source.units.items()}
        source = replace(source, units=self._live)  # so that slices are read from what is listed later, too
        super().__init__(reader or _NoCache(), manifest, source, arrays, verify, lanes, per_lane)
        law = law_of(manifest.views, manifest.environment)
        self.pixels = ReplayedPixels(source.shards, law, _EVERY if write else verify, self._lost, may_lack=True)
        self._cache, self._write = reader, write
        self._looked_s: dict[str, float] = {}
        self._numbers = {shard.name: number for number, shard in enumerate(source.shards)}

    def completed(self, made: list[ViewBatch], pin_memory: bool) -> list[ViewBatch]:
        """As `ReplayedViews`, without images that cannot be read, and with `lacking`."""
        entry = self._in_flight.popleft()
        units = self._to_write(entry) if self._write else {}
        return [
            self._completed(batch, items, entry, units, pin_memory)
            for batch, items in zip(made, entry.items, strict=True)
        ]

    def _completed(
        self,
        batch: ViewBatch,
        items: Items,
        entry: Entry,
        units: Mapping[tuple[int, int], Writable],
        pin_memory: bool,
    ) -> ViewBatch:
        kept = np.arange(len(items))
        if len(batch.keys) != len(items):
            kept = places_in(batch.items, items[:, :3])
        rows = items[kept]
        for shard, found in entry.positions.items():
            of_shard = rows[:, 0] == shard
            if len(row_of := found.result()):
                rows[of_shard, 1] = row_of[rows[of_shard, 1]]
        readable = rows[:, 1] >= 0
        if not readable.all():
            batch, rows, kept = batch.pick(np.flatnonzero(readable)), rows[readable], kept[readable]
        self._check(batch, rows, entry.slices)
        self._check_partners(batch, rows, entry.slices)
        lost = self._left_out(np.delete(items, kept, axis=0), dict(batch.unreadable))
        lacking = self._lacking(batch, rows, entry.slices, units, lost)
        return replace(batch, records=self._gathered(rows, entry.slices, pin_memory), lacking=lacking)

    def _lacking(
        self,
        batch: ViewBatch,
        rows: Items,
        slices: Mapping[SliceId, Slice],
        units: Mapping[tuple[int, int], Writable],
        lost: dict[tuple[int, int], str],
    ) -> Lacking:
        layers: dict[str, npt.NDArray[np.bool_]] = {}
        for shard, view, at in by_slice(rows):
            for layer in self.source.layers:
                if SliceId(layer, self.source.shards[shard].name, view) not in slices:
                    layers.setdefault(layer, np.zeros(len(rows), np.bool_))[at] = True
        digests = batch.records[DIGEST].numpy().astype(np.uint32) if self._write else np.zeros(len(rows), np.uint32)
        return Lacking(batch.items, batch.named, layers, digests, dict(units), lost, batch.partners)

    def _check_partners(self, batch: ViewBatch, rows: Items, slices: Mapping[SliceId, Slice]) -> None:
        """Require that views with a record are mixed with the images that stage one could read, and no others.

        The cache may have grown since the workers began, by units that list an image as unreadable.
        """
        if batch.partners is None:
            return
        for shard, view, at in by_slice(rows):
            name = self.source.shards[shard].name
            if any(SliceId(layer, name, view) in slices for layer in self.source.layers):
                listed = unreadable_keys(self._live[VIEWS][name][0])
                seen = PartnersSeen()
                seen.add(batch.partners.of(at.tolist(), self.source.shards[shard]))
                seen.require(name, dict.fromkeys(listed, "unreadable"))

    def _left_out(self, items: Items, reasons: Mapping[str, str]) -> dict[tuple[int, int], str]:
        found = {}
        for shard, sample in items[:, :2].tolist():
            key = self.source.shards[shard].members().keys[sample]
            found[shard, sample] = reasons.get(key, "the cache holds no record of it")
        return found

    def _to_write(self, entry: Entry) -> dict[tuple[int, int], Writable]:
        """By shard and view, the unit that the entry's records could make: adjacent views that the same layers lack."""
        flat = entry.items.reshape(-1, entry.items.shape[-1])
        found = {}
        for shard in entry.positions:
            name = self.source.shards[shard].name
            views = np.unique(flat[flat[:, 0] == shard][:, 2]).tolist()
            lacking = [
                (tuple(layer for layer in self.source.layers if SliceId(layer, name, view) not in entry.slices), view)
                for view in views
            ]
            # Adjacent views with the same layers have the same difference to their place in the list.
            for (layers, _), run in groupby(enumerate(lacking), lambda each: (each[1][0], each[1][1] - each[0])):
                of_run = [view for _, (_, view) in run]
                unit = UnitId(name, of_run[0], len(of_run))
                found.update({(shard, view): (unit, layers) for view in of_run if layers})
        return found

    # ---- what the cache holds by now

    def _requested(self, items: Items) -> Entry:
        entry = super()._requested(items)
        # Again, because the request may have found the first units of a shard, and with them its keys.
        entry.positions.update({shard: self._positions_of(shard) for shard in entry.positions})
        return entry

    def _held(self, ids: list[SliceId]) -> list[SliceId]:
        for shard in sorted({name.shard for name in ids if not self._holds(name)}):
            self._look(shard)
        return [name for name in ids if self._holds(name)]

    def _holds(self, name: SliceId) -> bool:
        unit = _unit_of(self._live[name.layer].get(name.shard, ()), name.view)
        return unit is not None and self._with_keys(name.shard) is not None

    def _with_keys(self, shard: str) -> UnitInfo | None:
        """The unit of the view layer that has the keys of a shard."""
        return next((info for info in self._live[VIEWS].get(shard, ()) if holds_keys(VIEWS, info.unit)), None)

    def look_again(self, shard: str) -> None:
        """List the units of a shard at the next lack of one, however short ago it was done; safe for threads."""
        self._looked_s.pop(shard, None)

    def _look(self, shard: str) -> None:
        """List the units of a shard again."""
        now_s = time.monotonic()
        if self._cache is None or now_s - self._looked_s.get(shard, -LOOK_AGAIN_S) < LOOK_AGAIN_S:
            return
        self._looked_s[shard] = now_s
        content = self.source.shards[self._numbers[shard]].content_hash
        for layer, by_shard in self._live.items():
            if layer in (VIEWS, *self._cache.layers):
                found = self._cache.of_shard(layer, shard)
                # Other content can only come with a later growth of the manifest; the next start refuses it.
                by_shard[shard] = [info for info in found if info.content_hash == content]
        _require_same_images(shard, self._live)
        self._positions.pop(self._numbers[shard], None)

    def _slice(self, slices: dict[SliceId, Slice], name: SliceId) -> Slice | None:
        return slices.get(name)

    def _in_tar(self, shard: Shard) -> npt.NDArray[np.int64]:
        """int64 [images of the tar], the place among the cached images, -1 for none; empty if no image is known."""
        info = self._with_keys(shard.name)
        if info is None or self._cache is None:
            return np.zeros(0, np.int64)
        keys = self._cache.read_keys(info)
        if self._lost is not None:
            places_in_tar(shard, keys, unreadable_keys(info))
        row_of = {key: row for row, key in enumerate(keys)}
        return np.array([row_of.get(key, -1) for key in shard.members().keys], dtype=np.int64)

    def _handed_out(self, entry: Entry) -> Items:
        self._in_flight.append(entry)
        return entry.items.copy()


class _NoCache:
    """The `UnitReader` of a cache that does not exist; nothing is read from it."""

    def read_views(self, info: UnitInfo, views: Sequence[int], arrays: Sequence[str] | None = None) -> Arrays:
        raise AssertionError(info)

    def keys(self, shard: str) -> list[str]:
        raise AssertionError(shard)
