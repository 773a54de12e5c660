"""Stage two's views: the boxes the cache stored, cut from the same images, checked by digest (I2, I8).

Records are read a whole unit at a time (I9) and kept for as long as the order needs them.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, SourceError, UserError, ViewMismatch
from tinymim.configs.schema import VerifyConfig
from tinymim.pipeline.dataset import ViewBatch, render_items
from tinymim.pipeline.decode import environment, pixel_digest
from tinymim.pipeline.order import Items
from tinymim.pipeline.shards import Shard, ShardSet
from tinymim.pipeline.views import View
from tinymim.storage.commit import UnitInfo
from tinymim.storage.reader import CacheReader, UnitRecords

_BASE_ARRAYS = ("box", "flip", "digest")


@dataclass(frozen=True)
class CachedSource:
    """The shards of a source that a cache covers with all its views, joined to their units.

    Attributes:
        shards: covered shards in source order; item arrays index into this.
        units: by shard name, the committed units, ascending by view.
        skipped: names of source shards that the cache does not cover.
    """

    shards: tuple[Shard, ...]
    units: dict[str, tuple[UnitInfo, ...]]
    skipped: tuple[str, ...]

    @property
    def counts(self) -> list[int]:
        """Cached images per covered shard."""
        return [self.units[shard.name][0].num_images for shard in self.shards]


def join(source: ShardSet, reader: CacheReader) -> CachedSource:
    """Match source shards with committed units by name and content.

    Raises:
        CacheMismatch: a shard's bytes differ from those the teacher saw.
        UserError: the cache covers nothing of this source.
    """
    known = reader.manifest.shards
    for shard in source.shards:
        stored = known.get(shard.name)
        if stored is not None and stored.content_hash != shard.content_hash:
            raise CacheMismatch(
                f"source.{shard.name}.content_hash differs: the shard is not the one the teacher saw",
                got=shard.content_hash,
                expected=stored.content_hash,
                hint="restore the shard, or cache the changed images anew",
            )
    units: dict[str, list[UnitInfo]] = {}
    for info in reader.units():
        units.setdefault(info.unit.shard, []).append(info)
    wanted = reader.manifest.num_views
    complete = {name: tuple(infos) for name, infos in units.items() if sum(i.unit.num_views for i in infos) == wanted}
    for name, infos in complete.items():
        if len({info.key_digest for info in infos}) > 1:
            raise CacheMismatch(
                f"the units of shard {name} hold different images",
                got=", ".join(f"{info.unit.view_range}: {info.num_images}" for info in infos),
                expected="the same sample keys in every unit of a shard",
                hint="another decoder could read other images; cache all views of the shard anew",
            )
    covered = tuple(shard for shard in source.shards if shard.name in complete)
    if not covered:
        raise UserError(
            "the cache covers no shard of this source",
            got=str(reader.coverage()),
            hint="run `tinymim cache-teacher` to the end of at least one shard, with the same source",
        )
    skipped = tuple(shard.name for shard in source.shards if shard.name not in complete)
    return CachedSource(covered, {shard.name: complete[shard.name] for shard in covered}, skipped)


class ReplayedViews:
    """Batches of cached views: pixels rendered from the stored boxes, and the codec's arrays beside them.

    Item samples number the *cached* images of a shard (unreadable ones have no record). Digests are checked for
    the first `verify.first` items after a start or resume and then for one in `verify.every`.

    Args:
        reader: the cache.
        source: from `join`.
        arrays: names of the codec's arrays to hand on.
        verify: how many pixel digests to check.
        resident_units: units kept in memory per process; the order's mixing width times units per shard.
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
        self.resident_units = resident_units
        self._resident: OrderedDict[str, UnitRecords] = OrderedDict()
        self._positions: dict[str, dict[str, int]] = {}

    def batch(self, numbered: Items) -> ViewBatch:
        """The batch of `numbered` items, int64 [B, 4]: shard, cached image, view, running number since the start.

        Raises:
            ViewMismatch: pixels differ from those the teacher saw.
            SourceError: an image that the cache holds is gone or unreadable.
            CacheCorrupt: a unit's bytes are damaged.
        """
        items, numbers = numbered[:, :3], numbered[:, 3]
        records = [self._unit(int(unit), int(view)) for unit, _, view in items]
        rows = [record.unit.row(int(image), int(view)) for record, (_, image, view) in zip(records, items, strict=True)]
        tar_items = items.copy()
        tar_items[:, 1] = [
            self._position(int(item[0]), record.keys[int(item[1])]) for record, item in zip(records, items, strict=True)
        ]
        stored = _StoredBoxes(records, rows, self.reader.manifest.views)
        batch = render_items(self.source.shards, tar_items, stored, int(self.reader.manifest.views["seed"]))
        if batch.unreadable:
            key, reason = batch.unreadable[0]
            raise SourceError(
                f"image '{key}' is in the cache but can no longer be read", got=reason, hint="restore its shard"
            )
        self._check(batch, records, rows, numbers)
        return replace(batch, records={name: _gather(name, records, rows) for name in self.arrays})

    def _unit(self, shard: int, view: int) -> UnitRecords:
        name = self.source.shards[shard].name
        info = next(i for i in self.source.units[name] if view in i.unit.views)
        identity = str(info.unit)
        if identity not in self._resident:
            self._resident[identity] = self.reader.read_unit(info, (*_BASE_ARRAYS, *self.arrays))
            if len(self._resident) > self.resident_units:
                self._resident.popitem(last=False)
        self._resident.move_to_end(identity)
        return self._resident[identity]

    def _position(self, shard: int, key: str) -> int:
        """The place of `key` in its tar: records are joined by key, never by position (I8)."""
        source = self.source.shards[shard]
        if source.name not in self._positions:
            self._positions[source.name] = {k: i for i, k in enumerate(source.members().keys)}
        position = self._positions[source.name].get(key)
        if position is None:
            raise CacheCorrupt(f"key '{key}' of the cache is not in shard {source.name}")
        return position

    def _check(
        self, batch: ViewBatch, records: Sequence[UnitRecords], rows: Sequence[int], numbers: npt.NDArray[np.int64]
    ) -> None:
        first, every = self.verify.first, self.verify.every
        for place, number in enumerate(numbers.tolist()):
            if not (number < first or (every and number % every == 0)):
                continue
            found = pixel_digest(batch.pixels[place]) & (2**64 - 1)
            wanted = int(records[place].arrays["digest"][rows[place]])
            if found != wanted:
                self._refuse(batch, place, found, wanted)

    def _refuse(self, batch: ViewBatch, place: int, found: int, wanted: int) -> None:
        then, now = self.reader.manifest.environment, environment()
        changed = [f"{n} {then.get(n)} -> {now.get(n)}" for n in sorted({*then, *now}) if then.get(n) != now.get(n)]
        unit, _, view = batch.items[place].tolist()
        raise ViewMismatch(
            f"image '{batch.keys[place]}' of shard {self.source.shards[unit].name}, view {view}: "
            "the pixels are not those the teacher saw",
            got=f"digest {found:016x}",
            expected=f"digest {wanted:016x}",
            hint="libraries that changed since the cache was made: " + (", ".join(changed) or "none; the image did"),
        )


class _StoredBoxes:
    """A view law that looks boxes up instead of drawing them: the i-th call is the i-th record."""

    def __init__(self, records: Sequence[UnitRecords], rows: Sequence[int], views: object) -> None:
        assert isinstance(views, dict)
        self.size: int = views["size"]
        self.interpolation: str = views["interpolation"]
        pairs = zip(records, rows, strict=True)
        self._views = iter([_stored_view(record, row) for record, row in pairs])

    def __call__(self, key: str, view: int, height: int, width: int) -> View:
        stored = next(self._views)
        if stored.top + stored.height > height or stored.left + stored.width > width:
            raise ViewMismatch(
                f"image '{key}', view {view}: the stored box lies outside the image",
                got=f"{width} x {height} pixels",
                expected=f"at least {stored.left + stored.width} x {stored.top + stored.height}",
                hint="the image was replaced since the cache was made",
            )
        return stored


def _stored_view(record: UnitRecords, row: int) -> View:
    top, left, height, width = record.arrays["box"][row].tolist()
    return View(top, left, height, width, bool(record.arrays["flip"][row]))


def _gather(name: str, records: Sequence[UnitRecords], rows: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.stack([record.arrays[name][row] for record, row in zip(records, rows, strict=True)]))
