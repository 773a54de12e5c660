"""Stage two's views: rendered again by the cache's view law, checked by digest, with their records (I2, I8).

Loader workers render pixels. The rank's own process reads records and stored digests ahead, one slice once per pass
(`pipeline.records`), and adds them to the batches that come back.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinymim.configs.errors import (
    CacheCorrupt,
    CacheMismatch,
    RecipeError,
    SourceError,
    TinymimError,
    UserError,
)
from tinymim.configs.sections.loader import LoaderConfig, VerifyConfig
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.decode import pixel_digest
from tinymim.pipeline.loader import batches, places_in
from tinymim.pipeline.mismatch import other_images, view_mismatch
from tinymim.pipeline.order import Items, PartnersOf
from tinymim.pipeline.pairs import partners_of
from tinymim.pipeline.records import Slice, SliceId, Slices, UnitReader, Units, named
from tinymim.pipeline.shards import Shard, ShardSet
from tinymim.pipeline.views import RandomViews, law_of, view_key
from tinymim.storage import layout
from tinymim.storage.blocks import DIGEST
from tinymim.storage.commit import UnitInfo
from tinymim.storage.layout import VIEWS, is_views
from tinymim.storage.manifest import Manifest
from tinymim.storage.reader import CacheReader, views_from_zero

_Index = npt.NDArray[np.int64]
_AHEAD: Final = 4  # entries that are requested before they go to a worker


@dataclass(frozen=True)
class CachedSource:
    """The shards of a source for which a cache holds all wanted views, with their units.

    Attributes:
        shards: covered shards in source order; item arrays index into this.
        num_views: views per image, from view 0.
        units: the committed units of the layers of the records, of the view layer and of that of the views' size, by
            layer and shard, ascending by view.
        skipped: names of source shards that the cache does not cover.
        without_record: readable images of the covered shards for which the cache holds no record.
    """

    shards: tuple[Shard, ...]
    num_views: int
    units: Units
    skipped: tuple[str, ...] = ()
    without_record: int = 0

    @property
    def layers(self) -> list[str]:
        """The layers of the records."""
        return [layer for layer in self.units if not is_views(layer)]

    @property
    def digests(self) -> str:
        """The layer with the digests of the views: the view layer, or that of another size."""
        return [layer for layer in self.units if is_views(layer)][-1]

    @property
    def counts(self) -> list[int]:
        """Cached images per covered shard."""
        return [self.units[VIEWS][shard.name][0].num_images for shard in self.shards]


def join(
    source: ShardSet,
    reader: CacheReader,
    layers: Sequence[str | None] = (None,),
    num_views: int | None = None,
    on_missing: Literal["refuse", "skip"] = "refuse",
    size: int | None = None,
) -> CachedSource:
    """Match source shards with committed units by name and content.

    Args:
        source: the images.
        reader: the cache.
        layers: the layers of the records; None: the only one.
        num_views: wanted views per image, from view 0; None: as many as all shards have in all layers, or with `skip`
            all shards that have any.
        on_missing: whether images without a record raise an error or are left out. Images that were unreadable in
            stage one are always left out.
        size: the size of the views to train on, one of the cache's; None: that of its manifest.

    Raises:
        CacheMismatch: a shard's bytes differ from those the teacher saw, its units hold different images, or images
            have no record and `on_missing` is refuse.
        UserError: the cache covers no shard of this source, or not all of them and `on_missing` is refuse, or it has no
            such layer.
        RecipeError: no shard has as many views as `num_views`.
    """
    refuse_changed(source, reader.manifest)
    names = [VIEWS, layout.view_layer(reader.manifest, size), *(reader.layer(each).name for each in layers)]
    units = {each: reader.by_shard(each) for each in names}
    views = {each: {s: views_from_zero(infos) for s, infos in by_shard.items()} for each, by_shard in units.items()}
    held = {shard.name: min(counts.get(shard.name, 0) for counts in views.values()) for shard in source.shards}
    present = [count for count in held.values() if count]
    wanted = num_views or (min(present) if present else 1)
    covered = tuple(shard for shard in source.shards if held[shard.name] >= wanted)
    skipped = tuple(shard.name for shard in source.shards if held[shard.name] < wanted)
    if not covered or (skipped and on_missing == "refuse"):
        existing = "; ".join(f"layer {each}: {_existing(source, counts)}" for each, counts in views.items())
        short = [each for each, counts in views.items() if any(counts.get(name, 0) < wanted for name in skipped)]
        raise _lacking(reader.place, short, skipped, list(held.values()), wanted, existing)
    in_use = {
        each: {shard.name: _first_views(by_shard[shard.name], wanted) for shard in covered}
        for each, by_shard in units.items()
    }
    without_record = 0
    for shard in covered:
        info = same_images(shard.name, [info for each in in_use.values() for info in each[shard.name]])
        without_record += (lost := _without_record(shard, info))
        if lost and on_missing == "refuse":
            _refuse_missing(shard, info, reader)
    return CachedSource(covered, wanted, in_use, skipped, without_record)


def refuse_changed(source: ShardSet, manifest: Manifest) -> None:
    """Raises CacheMismatch where a shard is not the one in the manifest."""
    for shard in source.shards:
        stored = manifest.shards.get(shard.name)
        if stored is not None and stored.content_hash != shard.content_hash:
            raise CacheMismatch(
                f"source.{shard.name}.content_hash differs: the shard is not the one the teacher saw",
                got=shard.content_hash,
                expected=stored.content_hash,
                hint="restore the shard, or make a new cache of the changed images",
            )


def _first_views(infos: Sequence[UnitInfo], num_views: int) -> tuple[UnitInfo, ...]:
    """The units that hold any of the views 0 to `num_views` - 1."""
    return tuple(takewhile(lambda info: info.unit.first_view < num_views, infos))


def _lacking(
    place: object, layers: Sequence[str], skipped: Sequence[str], held: Sequence[int], wanted: int, existing: str
) -> UserError:
    """The error for shards without all wanted views.

    Args:
        place: the cache.
        layers: the layers that lack them.
        skipped: names of these shards.
        held: number of views of each shard.
        wanted: number of wanted views.
        existing: what the cache holds.
    """
    present, lacking = [views for views in held if views], f"layer {' and layer '.join(layers)}"
    if present and wanted > max(present):
        return RecipeError(
            f"num_views is more than the cache holds in {lacking}",
            got=wanted,
            expected=f"at most {max(present)}; {existing}",
            hint="`tinymim cache-teacher` with a larger num_views adds to the cache; `tinymim train-student` with "
            "on_missing: teacher computes the rest",
        )
    hint = "run `tinymim cache-teacher` to its end with the same source"
    if not present:
        return UserError(f"the cache {place} covers no shard of this source in {lacking}", got=existing, hint=hint)
    if wanted > min(present):
        hint += f", or set num_views: {min(present)}"
    return UserError(
        f"the cache {place} lacks {len(skipped)} of {len(held)} shards of this source in {lacking}, the first is "
        f"{skipped[0]}",
        got=existing,
        expected=f"views 0 to {wanted - 1} of every shard",
        hint=f"{hint}, or on_missing: skip to leave these shards out; `tinymim train-student` can compute them with "
        "on_missing: teacher",
    )


def _existing(source: ShardSet, views: Mapping[str, int]) -> str:
    """The number of shards by their number of views, for a message: "3 shards have 2 views, 1 shard has none"."""
    counts = Counter(views.get(shard.name, 0) for shard in source.shards)
    return ", ".join(
        f"{shards:,} {'shard has' if shards == 1 else 'shards have'} "
        + (f"{number} view{'s' if number > 1 else ''}" if number else "none")
        for number, shards in sorted(counts.items(), reverse=True)
    )


def same_images(shard: str, infos: Sequence[UnitInfo]) -> UnitInfo:
    """The first of a shard's units. Raises CacheMismatch unless all hold the same images."""
    if len({info.key_digest for info in infos}) > 1:
        held = (
            f"{info.layer} {info.unit.view_range}: {info.num_images} images, digest of keys {info.key_digest[:8]}"
            for info in infos
        )
        raise other_images(shard, ", ".join(held), "the same sample keys in every unit of a shard")
    return infos[0]


def unreadable_keys(info: UnitInfo) -> frozenset[str]:
    """The keys that a unit of the view layer lists as unreadable."""
    listed = info.statistics.get("unreadable", ())
    rows = listed if isinstance(listed, list) else ()
    return frozenset(str(row[0]) for row in rows if isinstance(row, list) and row)


def lost_partners(units: Mapping[str, Sequence[UnitInfo]]) -> dict[str, frozenset[str]]:
    """By shard, the keys of unreadable images, from its units of the view layer. No view is mixed with them."""
    return {shard: unreadable_keys(infos[0]) for shard, infos in units.items()}


def partners_of_source(source: CachedSource, reader: UnitReader, manifest: Manifest) -> PartnersOf | None:
    """The pairs of a cache's views among its cached images, numbered as in items; None: its law has no pairs."""
    law = law_of(manifest.views, manifest.environment)
    if law.pairs is None:
        return None
    seed, lost = law.pairs.seed, lost_partners(source.units[VIEWS])

    def partners(shard: int, view: int) -> _Index:
        name = source.shards[shard].name
        keys = reader.keys(name)
        everything = [*keys, *lost[name]]
        found = partners_of(np.array([view_key(seed, key, view) for key in everything], np.int64))[: len(keys)]
        return np.where(found < len(keys), found, np.arange(len(keys)))

    return partners


def _without_record(shard: Shard, info: UnitInfo) -> int:
    """The number of a shard's images without a record, except those listed as unreadable."""
    unreadable = info.statistics.get("unreadable", ())
    return shard.num_samples - info.num_images - (len(unreadable) if isinstance(unreadable, list) else 0)


def places_in_tar(shard: Shard, keys: Sequence[str], lost: Collection[str] | None = None) -> dict[str, int]:
    """By key, the index in its tar of every image of a shard (I8).

    Args:
        shard: the shard.
        keys: the keys that the cache holds of it.
        lost: the keys that the cache lists as unreadable, where its views are pairs. Partners depend on all keys.

    Raises:
        CacheCorrupt: the shard lacks a key of the cache.
        CacheMismatch: views are pairs, and the shard does not have the same images as in stage one.
    """
    places = {key: place for place, key in enumerate(shard.members().keys)}
    for key in keys:
        if key not in places:
            raise CacheCorrupt(f"key '{key}' of the cache is not in shard {shard.name}")
    if lost is not None and (other := sorted(places.keys() ^ {*keys, *lost})):
        known = other[0] not in places
        raise CacheMismatch(
            f"shard {shard.name} does not hold the images of stage one, so partners in views.pairs differ",
            got=f"{'no ' if known else ''}image '{other[0]}'{f' and {len(other) - 1} more' if other[1:] else ''}",
            expected=f"{len(keys) + len(lost)} images, {len(lost)} of them unreadable",
            hint="restore the shard, or make a new cache",
        )
    return places


def _refuse_missing(shard: Shard, info: UnitInfo, reader: CacheReader) -> None:
    """Raises CacheMismatch with the keys that the cache lacks."""
    held = set(reader.keys(shard.name))
    lost = [key for key in shard.members().keys if key not in held | unreadable_keys(info)]
    raise CacheMismatch(
        f"the cache {reader.place} holds no record of {len(lost)} image(s) of shard {shard.name}",
        got=f"no record of {', '.join(map(repr, lost[:3]))}{', ...' if len(lost) > 3 else ''}",
        expected="a record of every image",
        hint="`tinymim cache repair` computes the unit again, or set on_missing: skip to leave these images out",
    )


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
