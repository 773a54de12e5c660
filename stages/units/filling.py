"""Units of a layer, written part by part; new views get their unit of the view layer, known ones are compared."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tinymim.configs.errors import SourceError
from tinymim.pipeline.mismatch import half_readable, other_images, view_mismatch
from tinymim.stages.units.draft import UnitPart
from tinymim.storage import layout
from tinymim.storage.blocks import DIGEST, key_arrays
from tinymim.storage.commit import UnitInfo, key_digest, parse_commit
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.reader import CacheReader
from tinymim.storage.writer import CacheWriter, UnitDraft


@dataclass(frozen=True)
class _OpenUnit:
    """A unit that is being written.

    Attributes:
        keys, unreadable: of the first part, and so of all.
        targets: the drafts of the unit in the target layers that lack it, by layer.
        views: the drafts in the view layers that lack the views, by layer.
        known: the units of the other view layers that hold the views, by layer.
    """

    keys: list[str]
    unreadable: list[tuple[str, str]]
    targets: dict[str, UnitDraft]
    views: dict[str, UnitDraft]
    known: dict[str, UnitInfo]


class UnitFilling:
    """Appends parts to units, one unit at a time; used by the thread "write".

    Args:
        writer: the writer of the cache.
        max_unreadable: share of unreadable images above which a unit fails.
    """

    def __init__(self, writer: CacheWriter, max_unreadable: float) -> None:
        self._writer, self._max_unreadable = writer, max_unreadable
        self._drafts = ExitStack()
        self._open: _OpenUnit | None = None

    def add(self, part: UnitPart) -> list[UnitInfo]:
        """Write the next part of a unit.

        Returns:
            What was committed: with the last part the unit of every layer, after those of view layers that were new.

        Raises:
            SourceError: too many images are unreadable, or others than in the parts before or as partners.
            UnitTaken: another writer has the unit.
            ViewMismatch: pixels are not those of the view layer.
            CacheMismatch: the view layer holds other images of the shard.
            UserError: the disk is full or fails.
        """
        if part.begins_unit:
            self.close()  # of a unit whose source failed half-way
            self._open = self._begun(part)
        unit = self._open
        assert unit is not None, part.unit
        if (part.keys, part.unreadable) != (unit.keys, unit.unreadable):
            raise _changed_images(unit, part)
        part.partners.require(part.unit.shard, dict(part.unreadable))
        for layer, info in unit.known.items():
            self._compare(part, layer, info)
        for layer, draft in (unit.views | unit.targets).items():
            draft.add(part.records(layer))
        if not part.ends_unit:
            return []
        # Those of view layers first: a target unit lies within views that they hold. After a kill between two layers,
        # the next run makes the unit for the others alone.
        unreadable = {"unreadable": [list(row) for row in unit.unreadable]}
        done = [draft.commit(unreadable if layer == VIEWS else {}) for layer, draft in unit.views.items()]
        for layer, draft in unit.targets.items():
            done.append(draft.commit(part.audits[layer].statistics()))
        self.close()
        self._writer.give_back(part.unit)
        return done

    def close(self) -> None:
        """Drop the unit that is open, if there is one."""
        self._open = None
        self._drafts.close()

    def _begun(self, part: UnitPart) -> _OpenUnit:
        part.refuse_too_many_unreadable(self._max_unreadable)
        unit, keys = part.unit, part.keys
        known: dict[str, UnitInfo] = {}
        for layer in part.sizes:
            present = self._writer.of_shard(layer, unit.shard)
            if held := [other for other in present if other.overlaps(unit)]:
                known[layer] = self._view_unit(layer, held[0])
            if present:
                self._require_same_images(part, known.get(layer) or self._view_unit(layer, present[0]))
        views = {layer: self._begin(layer, part) for layer in part.sizes if layer not in known}
        return _OpenUnit(
            keys, part.unreadable, {layer: self._begin(layer, part) for layer in part.audits}, views, known
        )

    def _begin(self, layer: str, part: UnitPart) -> UnitDraft:
        return self._drafts.enter_context(self._writer.begin(layer, part.unit, part.keys))

    def _view_unit(self, layer: str, unit: UnitId) -> UnitInfo:
        writer = self._writer
        data = writer.store.read(layout.commit_file(layer, unit), layout.COMMIT_LIMIT_BYTES)
        spec_id = layout.view_spec_id(layer, writer.manifest)
        return parse_commit(writer.place, layer, unit, data, spec_id, writer.manifest)

    def _require_same_images(self, part: UnitPart, known: UnitInfo) -> None:
        if key_digest(key_arrays(part.keys)) != known.key_digest:
            lost = "".join(f", '{key}' is unreadable ({reason})" for key, reason in part.unreadable[:1])
            raise other_images(
                part.unit.shard,
                got=f"{len(part.keys)} images that can be read{lost}",
                expected=f"the {known.num_images} images of unit {known} of the view layer",
            )

    @cached_property
    def _reader(self) -> CacheReader:
        return CacheReader(self._writer.place)

    def _compare(self, part: UnitPart, layer: str, known: UnitInfo) -> None:
        stored, found = self._reader.read_views(known, part.views)[DIGEST], part.records(layer)[DIGEST]
        for view, image in np.argwhere(stored != found)[:1].tolist():
            made_with = self._writer.manifest.environment
            digests = int(found[view, image]), int(stored[view, image])
            raise view_mismatch(part.keys[image], part.unit.shard, part.views[view], *digests, made_with)


def _changed_images(unit: _OpenUnit, part: UnitPart) -> SourceError:
    before, now = dict(unit.unreadable), dict(part.unreadable)
    key = next(iter(before.keys() ^ now.keys()), next(iter(now), ""))
    where = f"views {part.views.start} to {part.views.stop - 1}"
    expected = f"{before.get(key, 'readable')}, as for the views before"
    return half_readable(part.unit.shard, key, now.get(key, "readable"), expected, where)
