"""Stage two's views: rendered again by the cache's view law, checked by digest, with their records (I2, I8).

Loader workers render pixels. The rank's own process reads records and stored digests ahead, one slice once per pass
(`pipeline.records`), and adds them to the batches that come back.
"""

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinymim.configs.errors import SourceError, TinymimError
from tinymim.configs.sections.loader import LoaderConfig, VerifyConfig
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.decode import pixel_digest
from tinymim.pipeline.joined import CachedSource, lost_partners, places_in_tar
from tinymim.pipeline.loader import batches, places_in
from tinymim.pipeline.mismatch import view_mismatch
from tinymim.pipeline.order import Items
from tinymim.pipeline.records import Slice, SliceId, Slices, UnitReader, named
from tinymim.pipeline.shards import Shard
from tinymim.pipeline.views import RandomViews, law_of
from tinymim.storage import layout
from tinymim.storage.blocks import DIGEST
from tinymim.storage.layout import VIEWS
from tinymim.storage.manifest import Manifest

_Index = npt.NDArray[np.int64]
_AHEAD: Final = 4  # entries that are requested before they go to a worker


class ReplayedPixels(ImageViews):
    """The part of replayed views for loader workers: pixels by the law, and the digests of those that are due.

    An image that cannot be read is an error, or with `may_lack` its views are left out.
    """

    def __init__(
        self,
        shards: tuple[Shard, ...],
        law: RandomViews,
        verify: VerifyConfig,
        lost: Mapping[str, Collection[str]] | None = None,
        may_lack: bool = False,
    ) -> None:
        super().__init__(shards, law, law.config.seed, lost)
        self.verify, self.may_lack = verify, may_lack

    def batch(self, items: Items) -> ViewBatch:
        """The views of `items`, int64 [B, 4]: shard, sample in the tar, view, running number since the start.

        Its only record is the digest, int64 [B], 0 where none is due.

        Raises:
            SourceError: an image that the cache holds is gone or unreadable.
        """
        batch = super().batch(items)
        gone = [*batch.unreadable, *(batch.partners.lost.items() if batch.partners else ())]
        if gone and not self.may_lack:
            key, reason = gone[0]
            raise SourceError(
                f"image '{key}' is in the cache but can no longer be read", got=reason, hint="restore its shard"
            )
        if gone:
            items = items[places_in(batch.items, items[:, :3])]
        digests = torch.zeros(len(items), dtype=torch.int64)
        for place in np.flatnonzero(_due(self.verify, items[:, 3])).tolist():
            digests[place] = pixel_digest(batch.pixels[place])
        return replace(batch, records={DIGEST: digests})


def _due(verify: VerifyConfig, numbers: _Index) -> npt.NDArray[np.bool_]:
    """Whether the pixels of the views with these running numbers are compared."""
    return (numbers < verify.first) | (numbers % verify.every == 0 if verify.every else False)


class Entry(NamedTuple):
    """An entry that is requested, or in flight."""

    items: Items  # [n, B, 4]: shard, cached image, view, running number
    slices: dict[SliceId, Slice]
    positions: dict[int, Future[_Index]]  # by shard, the index in its tar of every cached image


class ReplayedViews:
    """Batches of cached views: pixels rendered again, and the codecs' arrays.

    Item samples number the *cached* images of a shard; unreadable ones have no record. Digests are checked for the
    first `verify.first` items after a start or resume, and then for one in `verify.every`.

    Memory of the rank's process is that of `records.Slices`: lanes x `per_lane` slices, and those of the entries in
    flight. Loader workers keep nothing.

    Args:
        reader: the cache.
        manifest: its manifest.
        source: the result of `join`.
        arrays: by layer, names of the codec's arrays to put into batches.
        verify: the number of pixel digests to check.
        lanes: number of equal parts of every batch that take their samples from shards of their own.
        per_lane: slices to keep per lane; `SampleOrder.slices_per_lane` is enough to read each once per pass.

    Attributes:
        pixels: the part for loader workers; this object is the part that stays in the rank's process.
    """

    def __init__(
        self,
        reader: UnitReader,
        manifest: Manifest,
        source: CachedSource,
        arrays: Mapping[str, Sequence[str]],
        verify: VerifyConfig,
        lanes: int = 1,
        per_lane: int = 1,
    ) -> None:
        self.reader, self.manifest, self.source, self.verify, self.lanes = reader, manifest, source, verify, lanes
        law = law_of(manifest.views, manifest.environment, layout.size_of(source.digests, manifest))
        self._lost = None if law.pairs is None else lost_partners(source.units[VIEWS])
        self.pixels = ReplayedPixels(source.shards, law, verify, self._lost)
        self._slices = Slices(reader, source.units, {source.digests: [DIGEST], **arrays}, per_lane)
        self._positions: OrderedDict[int, Future[_Index]] = OrderedDict()
        self._most_positions = 2 * lanes * per_lane
        self._in_flight: deque[Entry] = deque()
        # A spool holds the tars of every entry that left the plan, and may have no room for more than one entry's.
        self._ahead = _AHEAD if all(isinstance(shard.place, Path) for shard in source.shards) else 0

    def batch(self, numbered: Items) -> ViewBatch:
        """The batch of `numbered` items, int64 [B, 4]: shard, cached image, view, running number since the start.

        Raises:
            ViewMismatch: pixels differ from those the teacher saw.
            SourceError: an image that the cache holds is gone or unreadable.
            CacheCorrupt: bytes of a slice are damaged, or the cache holds a key that its shard lacks.
            CacheMismatch: views are pairs, and a shard holds other images than in stage one.
        """
        [batch] = batches(self.pixels, [numbered], LoaderConfig(workers=0), rank_part=self)
        return batch

    def prepared(self, plan: Iterable[Items]) -> Iterator[Items | TinymimError]:
        """The entries of `plan` with positions in tars for cached images; their slices are being read."""
        self._in_flight.clear()
        waiting: deque[Entry] = deque()
        for items in plan:
            waiting.append(self._requested(items))
            if len(waiting) > self._ahead:
                yield self._handed_out(waiting.popleft())
        while waiting:
            yield self._handed_out(waiting.popleft())

    def completed(self, made: list[ViewBatch], pin_memory: bool) -> list[ViewBatch]:
        """The batches of the oldest entry in flight with their records, checked.

        Raises:
            ViewMismatch, CacheCorrupt: as `batch`.
        """
        entry = self._in_flight.popleft()
        found = []
        for batch, items in zip(made, entry.items, strict=True):
            self._check(batch, items, entry.slices)
            found.append(replace(batch, records=self._gathered(items, entry.slices, pin_memory)))
        return found

    def _requested(self, items: Items) -> Entry:
        """Request what an entry needs, for each lane in the order of first use."""
        entry = Entry(items.reshape(-1, *items.shape[-2:]), {}, {})
        by_lane = np.array_split(entry.items, self.lanes, axis=1)
        for lane, part in enumerate(by_lane):
            rows = part.reshape(-1, 4)
            shards, first = np.unique(rows[:, 0], return_index=True)
            ids = []
            for shard in shards[np.argsort(first)].tolist():
                entry.positions[shard] = self._positions_of(shard)
                of_shard, name = rows[rows[:, 0] == shard], self.source.shards[shard].name
                views = np.unique(of_shard[:, 2]).tolist()
                ids += [SliceId(layer, name, view) for layer in self.source.layers for view in views]
                due = of_shard[_due(self.verify, of_shard[:, 3])]
                ids += [SliceId(self.source.digests, name, view) for view in np.unique(due[:, 2]).tolist()]
            entry.slices.update(self._slices.request(lane, self._held(ids)))
        return entry

    def _held(self, ids: list[SliceId]) -> list[SliceId]:
        """Those of the slices that the cache holds: all, by `join`."""
        return ids

    def _slice(self, slices: dict[SliceId, Slice], name: SliceId) -> Slice | None:
        return slices[name]

    def _positions_of(self, shard: int) -> Future[_Index]:
        found = self._positions.get(shard)
        if found is None:
            found = self._positions[shard] = self._slices.pool.submit(self._in_tar, self.source.shards[shard])
        self._positions.move_to_end(shard)
        if len(self._positions) > self._most_positions:
            self._positions.popitem(last=False)
        return found

    def _in_tar(self, shard: Shard) -> _Index:
        """int64 [I], the index in its tar of every cached image of a shard, by key (I8)."""
        keys = self.reader.keys(shard.name)
        places = places_in_tar(shard, keys, None if self._lost is None else self._lost[shard.name])
        return np.array([places[key] for key in keys], dtype=np.int64)

    def _handed_out(self, entry: Entry) -> Items | TinymimError:
        self._in_flight.append(entry)
        items = entry.items.copy()
        try:
            for shard, positions in entry.positions.items():
                of_shard = items[..., 0] == shard
                items[of_shard, 1] = positions.result()[items[of_shard, 1]]
        except TinymimError as error:
            return error
        return items

    def _gathered(self, items: Items, slices: dict[SliceId, Slice], pin_memory: bool) -> dict[str, Tensor]:
        """The records of a batch's items [B, 4], by `records.named`, first axis B; any value where there is none."""
        found: dict[str, Tensor] = {}
        for shard, view, at in by_slice(items):
            for layer in self.source.layers:
                held = self._slice(slices, SliceId(layer, self.source.shards[shard].name, view))
                arrays = {} if held is None else held.arrays()
                for name, array in ((named(layer, own), array) for own, array in arrays.items()):
                    if name not in found:
                        like = torch.from_numpy(np.empty(0, array.dtype))
                        shape = (len(items), *array.shape[1:])
                        found[name] = torch.empty(shape, dtype=like.dtype, pin_memory=pin_memory)
                    found[name].numpy()[at] = array[items[at, 1]]
        return found

    def _check(self, batch: ViewBatch, items: Items, slices: dict[SliceId, Slice]) -> None:
        """Compare the digests that are due."""
        due = np.flatnonzero(_due(self.verify, items[:, 3]))
        rendered = batch.records[DIGEST].numpy()
        for shard, view, at in by_slice(items[due]):
            held = self._slice(slices, SliceId(self.source.digests, self.source.shards[shard].name, view))
            if held is None:
                continue
            stored, places = held.arrays()[DIGEST], due[at]
            found, wanted = rendered[places].astype(stored.dtype), stored[items[places, 1]]  # the bits that are stored
            if wrong := np.flatnonzero(found != wanted).tolist():
                first = wrong[0]
                digests = int(found[first]), int(wanted[first])
                name, made_with = self.source.shards[shard].name, self.manifest.environment
                partner = None if batch.partners is None else batch.partners.keys[places[first]]
                raise view_mismatch(batch.keys[places[first]], name, view, *digests, made_with, partner)


def by_slice(items: Items) -> Iterator[tuple[int, int, _Index]]:
    """Shard, view, and the places in `items` [B, 4] of all items of that slice."""
    slices = items[:, 0] << 32 | items[:, 2]
    for number in np.unique(slices).tolist():
        yield number >> 32, number & (2**32 - 1), np.flatnonzero(slices == number)
