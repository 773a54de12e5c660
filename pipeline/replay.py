"""Stage two's views: rendered from the same images with the stored boxes, and checked by digest (I2, I8).

Records are read a whole unit at a time (I9) and kept in memory while the order needs them.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, SourceError, UserError, ViewMismatch
from tinymim.configs.sections import VerifyConfig
from tinymim.pipeline.dataset import ViewBatch, render_items
from tinymim.pipeline.decode import environment, pixel_digest
from tinymim.pipeline.order import Items
from tinymim.pipeline.shards import Shard, ShardSet
from tinymim.pipeline.views import DIGEST, VIEW_ARRAYS, StoredViews
from tinymim.storage.commit import UnitInfo
from tinymim.storage.layout import COMMITS, shard_stem
from tinymim.storage.reader import CacheReader

_Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CachedSource:
    """The shards of a source for which a cache holds all wanted views, with their units.

    Attributes:
        shards: covered shards in source order; item arrays index into this.
        units: the committed units by shard name, ascending by view.
        skipped: names of source shards that the cache does not cover.
        without_record: readable images of the covered shards for which the cache holds no record.
    """

    shards: tuple[Shard, ...]
    units: dict[str, tuple[UnitInfo, ...]]
    skipped: tuple[str, ...]
    without_record: int = 0

    @property
    def counts(self) -> list[int]:
        """Cached images per covered shard."""
        return [self.units[shard.name][0].num_images for shard in self.shards]

    @property
    def units_per_shard(self) -> int:
        """The largest number of units of one shard; each unit holds other views."""
        return max(len(infos) for infos in self.units.values())


def join(
    source: ShardSet,
    reader: CacheReader,
    num_views: int | None = None,
    on_missing: Literal["refuse", "skip"] = "refuse",
) -> CachedSource:
    """Match source shards with committed units by name and content.

    Args:
        source: the images.
        reader: the cache.
        num_views: wanted views per image, from view 0; None: the manifest's `num_views`.
        on_missing: whether images without a record raise an error or are left out. Images that were unreadable in
            stage one are always left out.

    Raises:
        CacheMismatch: a shard's bytes differ from those the teacher saw, its units hold different images, or images
            have no record and `on_missing` is refuse.
        UserError: the cache covers no shard of this source, or not all of them and `on_missing` is refuse.
    """
    known = reader.manifest.shards
    for shard in source.shards:
        stored = known.get(shard.name)
        if stored is not None and stored.content_hash != shard.content_hash:
            raise CacheMismatch(
                f"source.{shard.name}.content_hash differs: the shard is not the one the teacher saw",
                got=shard.content_hash,
                expected=stored.content_hash,
                hint="restore the shard, or make a new cache of the changed images",
            )
    units: dict[str, list[UnitInfo]] = {}
    for info in reader.units():
        units.setdefault(info.unit.shard, []).append(info)
    wanted = range(num_views or reader.manifest.num_views)
    complete: dict[str, tuple[UnitInfo, ...]] = {}
    for name, infos in units.items():
        useful = tuple(info for info in infos if info.unit.first_view < len(wanted))
        if set(wanted) <= {view for info in useful for view in info.unit.views}:
            complete[name] = useful
    for name, useful in complete.items():
        if len({info.key_digest for info in useful}) > 1:
            raise CacheMismatch(
                f"the units of shard {name} hold different images",
                got=", ".join(f"{info.unit.view_range}: {info.num_images}" for info in useful),
                expected="the same sample keys in every unit of a shard",
                hint=f"another decoder may have read other images; delete {COMMITS}/{shard_stem(name)}.v*.json in the "
                "cache and run `tinymim cache-teacher` again",
            )
    covered = tuple(shard for shard in source.shards if shard.name in complete)
    if not covered:
        raise UserError(
            "the cache covers no shard of this source",
            got=str(reader.coverage()),
            hint="run `tinymim cache-teacher` to the end of at least one shard, with the same source",
        )
    skipped = tuple(shard.name for shard in source.shards if shard.name not in complete)
    if skipped and on_missing == "refuse":
        raise UserError(
            f"the cache {reader.place} lacks {len(skipped)} of {len(source.shards)} shards of this source, "
            f"the first is {skipped[0]}",
            got=str(reader.coverage()),
            hint="run `tinymim cache-teacher` to its end, or set on_missing: skip to train on the cached shards",
        )
    without_record = {shard.name: _without_record(shard, complete[shard.name][0]) for shard in covered}
    if on_missing == "refuse":
        for shard in covered:
            if without_record[shard.name]:
                _refuse_missing(shard, complete[shard.name][0], reader)
    return CachedSource(
        covered, {shard.name: complete[shard.name] for shard in covered}, skipped, sum(without_record.values())
    )


def _without_record(shard: Shard, info: UnitInfo) -> int:
    """The number of a shard's images without a record in a unit, except those listed as unreadable."""
    unreadable = info.statistics.get("unreadable", ())
    return shard.num_samples - info.num_images - (len(unreadable) if isinstance(unreadable, list) else 0)


def _refuse_missing(shard: Shard, info: UnitInfo, reader: CacheReader) -> None:
    """Raises CacheMismatch with the keys that a unit lacks."""
    held = set(reader.read_unit(info, ()).keys)
    unreadable = {str(key) for key, _ in info.statistics.get("unreadable", ())}
    lost = [key for key in shard.members().keys if key not in held | unreadable]
    raise CacheMismatch(
        f"the cache {reader.place} holds no record of {len(lost)} image(s) of shard {shard.name}",
        got=f"no record of {', '.join(map(repr, lost[:3]))}{', ...' if len(lost) > 3 else ''}",
        expected="a record of every image",
        hint="`tinymim cache repair` computes the unit again, or set on_missing: skip to leave these images out",
    )


@dataclass(frozen=True)
class ResidentUnit:
    """The part of a unit in memory: records of V views of all its I images, in tar order.

    Attributes:
        views: the V view indices, ascending.
        positions: int64 [I], the index in its tar of every cached image; records are joined by key (I8).
        arrays: the arrays by name, first axis I * V.
    """

    views: tuple[int, ...]
    positions: _Index
    arrays: dict[str, npt.NDArray[Any]]

    def rows(self, images: _Index, views: _Index) -> _Index:
        """The indices, int64 [n], of the records of n (image, view) pairs."""
        return images * len(self.views) + np.searchsorted(self.views, views)


class ReplayedViews:
    """Batches of cached views: pixels rendered from the stored views, and the codec's arrays.

    Item samples number the *cached* images of a shard; unreadable ones have no record. Digests are checked for the
    first `verify.first` items after a start or resume, and then for one in `verify.every`.

    Memory per process is `resident_units` x images of a shard x views in use x bytes of a record. While a unit is
    read, all of it and a copy of its largest array come on top.

    Args:
        reader: the cache.
        source: the result of `join`.
        arrays: names of the codec's arrays to put into batches.
        verify: the number of pixel digests to check.
        resident_units: largest number of units in memory per process; `SampleOrder.resident_units` avoids rereading.
    """

    def __init__(
        self,
        reader: CacheReader,
        source: CachedSource,
        arrays: Sequence[str],
        verify: VerifyConfig,
        resident_units: int,
    ) -> None:
        self.reader, self.source, self.arrays, self.verify = reader, source, tuple(arrays), verify
        self.shards = source.shards
        self.resident_units = resident_units
        self._resident: OrderedDict[str, ResidentUnit] = OrderedDict()

    def batch(self, numbered: Items) -> ViewBatch:
        """The batch of `numbered` items, int64 [B, 4]: shard, cached image, view, running number since the start.

        Raises:
            ViewMismatch: pixels differ from those the teacher saw.
            SourceError: an image that the cache holds is gone or unreadable.
            CacheCorrupt: a unit's bytes are damaged, or it holds a key that its shard lacks.
        """
        tar_items, numbers = numbered[:, :3].copy(), numbered[:, 3]
        keys = [""] * len(numbered)
        gathered: dict[str, Tensor] = {}
        for shard, info, at in self._by_unit(numbered):
            positions = self._gather(shard, info, at, numbered, gathered)
            members = self.source.shards[shard].members()
            tar_items[at, 1] = positions
            for place, position in zip(at.tolist(), positions.tolist(), strict=True):
                keys[place] = members.keys[position]
        digests = gathered.pop(DIGEST)
        law = self.reader.manifest.views
        stored = StoredViews(law, keys, {name: gathered.pop(name).numpy() for name in VIEW_ARRAYS})
        batch = render_items(self.source.shards, tar_items, stored, int(law["seed"]))
        if batch.unreadable:
            key, reason = batch.unreadable[0]
            raise SourceError(
                f"image '{key}' is in the cache but can no longer be read", got=reason, hint="restore its shard"
            )
        self._check(batch, digests, numbers)
        return replace(batch, records=gathered)

    def _by_unit(self, numbered: Items) -> Iterator[tuple[int, UnitInfo, _Index]]:
        """Shard, unit, and the places in the batch of all items of that unit.

        Units in memory come first. Otherwise, at the border of two groups of shards, reading a new unit could evict one
        that the same batch still needs.
        """
        groups: list[tuple[int, UnitInfo, _Index]] = []
        for shard in np.unique(numbered[:, 0]).tolist():
            of_shard = np.flatnonzero(numbered[:, 0] == shard)
            infos = self.source.units[self.source.shards[shard].name]
            which = np.searchsorted([info.unit.first_view for info in infos], numbered[of_shard, 2], side="right") - 1
            groups += [(shard, infos[number], of_shard[which == number]) for number in np.unique(which).tolist()]
        yield from sorted(groups, key=lambda group: str(group[1].unit) not in self._resident)

    def _gather(self, shard: int, info: UnitInfo, at: _Index, numbered: Items, gathered: dict[str, Tensor]) -> _Index:
        """Copy the records of the items at places `at`, all of one unit, into the arrays [B, ...] of `gathered`.

        Returns:
            int64 [len(at)], the images' indices in their tar.
        """
        images, views = numbered[at, 1], numbered[at, 2]
        unit = self._unit(shard, info, np.unique(views))
        rows = unit.rows(images, views)
        for name, array in unit.arrays.items():
            if name not in gathered:
                like = torch.from_numpy(array[:0])
                gathered[name] = torch.empty((len(numbered), *array.shape[1:]), dtype=like.dtype)
            gathered[name].numpy()[at] = array[rows]
        positions: _Index = unit.positions[images]
        return positions

    def _unit(self, shard: int, info: UnitInfo, views: _Index) -> ResidentUnit:
        name = str(info.unit)
        held = self._resident.get(name)
        if held is None or not np.isin(views, held.views).all():
            self._resident.pop(name, None)
            del held  # frees the replaced unit before another is read
            while len(self._resident) >= self.resident_units:
                self._resident.popitem(last=False)
            self._resident[name] = self._read(shard, info, views)
        self._resident.move_to_end(name)
        return self._resident[name]

    def _read(self, shard: int, info: UnitInfo, views: _Index) -> ResidentUnit:
        """Read a unit and keep its records of `views`."""
        records = self.reader.read_unit(info, (*VIEW_ARRAYS, DIGEST, *self.arrays))
        source = self.source.shards[shard]
        places = {key: place for place, key in enumerate(source.members().keys)}
        for key in records.keys:
            if key not in places:
                raise CacheCorrupt(f"key '{key}' of the cache is not in shard {source.name}")
        positions = np.array([places[key] for key in records.keys], dtype=np.int64)
        arrays = records.arrays
        # torch cannot index uint64; `pixel_digest` returns int64, too.
        arrays[DIGEST] = arrays[DIGEST].view(np.int64)
        if len(views) < info.unit.num_views:
            images = np.arange(info.num_images)
            rows = (images[:, None] * info.unit.num_views + (views - info.unit.first_view)).reshape(-1)
            for name in list(arrays):
                arrays[name] = arrays[name][rows]  # frees each whole array before the next is copied
        return ResidentUnit(tuple(views.tolist()), positions, arrays)

    def _check(self, batch: ViewBatch, digests: Tensor, numbers: _Index) -> None:
        first, every = self.verify.first, self.verify.every
        due = (numbers < first) | (numbers % every == 0 if every else False)
        for place in np.flatnonzero(due).tolist():
            found, wanted = pixel_digest(batch.pixels[place]), int(digests[place])
            if found != wanted:
                self._refuse(batch, place, found & (2**64 - 1), wanted & (2**64 - 1))

    def _refuse(self, batch: ViewBatch, place: int, found: int, wanted: int) -> None:
        then, now = self.reader.manifest.environment, environment()
        changed = [f"{n} {then.get(n)} -> {now.get(n)}" for n in sorted({*then, *now}) if then.get(n) != now.get(n)]
        unit, _, view = batch.items[place].tolist()
        raise ViewMismatch(
            f"image '{batch.keys[place]}' of shard {self.source.shards[unit].name}, view {view}: "
            "the pixels are not those the teacher saw",
            got=f"digest {found:016x}",
            expected=f"digest {wanted:016x}",
            hint="libraries that changed since the cache was made: "
            + (", ".join(changed) or "none, so the image changed; restore its shard"),
        )
