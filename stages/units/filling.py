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
        views: the draft in the view layer, None where that holds the views.
        known: the unit of the view layer that holds the views.
    """

    keys: list[str]
    unreadable: list[tuple[str, str]]
    targets: dict[str, UnitDraft]
    views: UnitDraft | None
    known: UnitInfo | None


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
            What was committed: with the last part the unit of every layer, after that of the view layer if it was new.

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
        if unit.views is not None:
            unit.views.add(part.records(VIEWS))
        else:
            self._compare(unit, part)
        for layer, draft in unit.targets.items():
            draft.add(part.records(layer))
        if not part.ends_unit:
            return []
        # The view layer's first: a target unit lies within views that it holds. After a kill between two layers, the
        # next run makes the unit for the others alone.
        done = [] if unit.views is None else [unit.views.commit({"unreadable": [list(row) for row in unit.unreadable]})]
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
        present = self._writer.of_shard(VIEWS, unit.shard)
        known = next((self._view_unit(other) for other in present if other.overlaps(unit)), None)
        if present:
            self._require_same_images(part, known or self._view_unit(present[0]))
        begun = {
            layer: self._drafts.enter_context(self._writer.begin(layer, unit, keys))
            for layer in (*part.audits, *(() if known else (VIEWS,)))
        }
        views = begun.pop(VIEWS, None)
        return _OpenUnit(keys, part.unreadable, begun, views, known)

    def _view_unit(self, unit: UnitId) -> UnitInfo:
        writer = self._writer
        data = writer.store.read(layout.commit_file(VIEWS, unit), layout.COMMIT_LIMIT_BYTES)
        return parse_commit(writer.place, VIEWS, unit, data, writer.manifest.spec_id, writer.manifest)

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

    def _compare(self, unit: _OpenUnit, part: UnitPart) -> None:
        assert unit.known is not None
        stored, found = self._reader.read_views(unit.known, part.views)[DIGEST], part.records(VIEWS)[DIGEST]
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
