"""Units from records that a teacher computed during a training run, written beside it.

A unit is written once one rank has computed, in one pass and without a stop, the records of all readable images of a
shard for the views of one decode. All others are dropped: another run, or `cache-teacher`, computes them.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tinymim.configs.errors import SourceError, in_one_line
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.pipeline.dataset import Lacking
from tinymim.pipeline.mismatch import PartnersSeen
from tinymim.pipeline.shards import Shard
from tinymim.stages.run.progress import logger
from tinymim.stages.units.audit import UnitAudit
from tinymim.stages.units.background import Background
from tinymim.stages.units.draft import UnitPart
from tinymim.stages.units.filling import UnitFilling
from tinymim.stages.units.timing import Marks
from tinymim.storage.blocks import DIGEST
from tinymim.storage.commit import holds_keys
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.writer import CacheWriter, UnitTaken

_DEPTH: Final = 2  # batches that may wait for the thread
_MAX_UNREADABLE: Final = float(CacheTeacherRecipe.model_fields["max_unreadable"].default)


class _Computed(NamedTuple):
    """The records of some rows of a batch in one layer; on a GPU they are here after `marks.wait()`."""

    lacking: Lacking
    layer: str
    rows: npt.NDArray[np.int64]
    arrays: dict[str, Tensor]
    marks: Marks


class _Draft:
    """The records of a unit that is not whole yet: by layer, arrays [k views, images of the shard, ...]."""

    def __init__(self, unit: UnitId, layers: tuple[str, ...], num_images: int) -> None:
        self.unit, self.layers = unit, layers
        self.arrays: dict[str, dict[str, npt.NDArray[Any]]] = {layer: {} for layer in (*layers, VIEWS)}
        self.lost: dict[int, str] = {}
        self.partners = PartnersSeen()
        self._here = {layer: np.zeros((unit.num_views, num_images), np.bool_) for layer in layers}

    def add(
        self, layer: str, view: int, samples: npt.NDArray[np.int64], arrays: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        """Add the records of some images for one view; `arrays` are [n, ...]."""
        row = view - self.unit.first_view
        for name, values in arrays.items():
            held = self.arrays[layer]
            if name not in held:
                whole = self._here[self.layers[0]].shape
                held[name] = np.empty((*whole, *values.shape[1:]), values.dtype)
            held[name][row, samples] = values
        if layer != VIEWS:
            self._here[layer][row, samples] = True

    def readable(self) -> npt.NDArray[np.int64] | None:
        """The images of the unit, once it is whole; None before."""
        here = np.stack(list(self._here.values()))
        lost = np.isin(np.arange(here.shape[2]), list(self.lost))
        return np.flatnonzero(~lost) if (here.all((0, 1)) | lost).all() else None


class WriteBack:
    """A context manager that writes units in a thread of its own. Leaving it writes those that are whole.

    It holds at most `most` incomplete units in memory, each of the views of one decode.

    Args:
        writer: a writer of all layers.
        shards: the shards, by the first column of items.
        most: number of incomplete units to keep; the one that waited longest is dropped first.
        on_written: called with the shard of each unit after it was written, or was found written; from the thread.

    Attributes:
        written: number of units written.
        dropped: number of whole units that the cache held by then, whose shard another job held, or that do not fit.
        incomplete: units of which only some images were computed, and which were not written later.
    """

    def __init__(
        self, writer: CacheWriter, shards: tuple[Shard, ...], most: int, on_written: Callable[[str], None]
    ) -> None:
        self._writer, self._most, self._on_written = writer, most, on_written
        self._filling = UnitFilling(writer, _MAX_UNREADABLE)
        self._drafts: OrderedDict[UnitId, _Draft] = OrderedDict()
        self._size = int(writer.manifest.views["size"])
        self._by_name = {shard.name: shard for shard in shards}
        self.written = self.dropped = 0
        self.incomplete: set[UnitId] = set()

    def __enter__(self) -> "WriteBack":
        self._thread = Background("write-back", self._add, _DEPTH).__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.closing(self._filling):
            self._thread.__exit__(kind, error, trace)
        self.incomplete.update(self._drafts)

    def __call__(self, lacking: Lacking, layer: str, rows: npt.NDArray[np.int64], arrays: Mapping[str, Tensor]) -> None:
        """Take computed records, [n, ...] for the batch's `rows`, int64 [n]. Raises what the thread raised."""
        device = next(iter(arrays.values())).device
        marks = Marks(device)
        here = {name: array.to("cpu", non_blocking=True) for name, array in arrays.items()}
        marks.mark()  # of the copy: nobody waits for the device but the thread
        self._thread.give(_Computed(lacking, layer, rows, here, marks))

    # ---- in the thread

    def _add(self, computed: _Computed) -> None:
        lacking, layer, rows, arrays, marks = computed
        marks.wait()
        touched: dict[UnitId, _Draft] = {}
        for (shard, view), (unit, layers) in lacking.units.items():
            lost = {sample: reason for (of, sample), reason in lacking.lost.items() if of == shard}
            at = rows[(lacking.items[rows, 0] == shard) & (lacking.items[rows, 2] == view)]
            if layer not in layers or not (len(at) or lost):
                continue
            draft = touched[unit] = self._draft(unit, layers)
            draft.lost.update(lost)
            if lacking.partners is not None:
                draft.partners.add(lacking.partners.of(at.tolist(), self._by_name[unit.shard]))
            samples, place = lacking.items[at, 1], np.searchsorted(rows, at)
            draft.add(layer, view, samples, {name: array.numpy()[place] for name, array in arrays.items()})
            draft.add(VIEWS, view, samples, {DIGEST: lacking.digests[at]})
        for unit, draft in touched.items():
            if (images := draft.readable()) is not None:
                self._drafts.pop(unit, None)
                self.incomplete.discard(unit)
                self._write(draft, images)

    def _draft(self, unit: UnitId, layers: tuple[str, ...]) -> _Draft:
        draft = self._drafts.get(unit)
        if draft is None or draft.layers != layers:
            draft = self._drafts[unit] = _Draft(unit, layers, self._by_name[unit.shard].num_samples)
        self._drafts.move_to_end(unit)
        if len(self._drafts) > self._most:
            self.incomplete.add(self._drafts.popitem(last=False)[0])
        return draft

    def _write(self, draft: _Draft, images: npt.NDArray[np.int64]) -> None:
        unit, shard, writer = draft.unit, self._by_name[draft.unit.shard], self._writer
        try:
            layers = writer.claim_for(draft.layers, unit)
            if not layers or not self._fits(unit):
                self.dropped += 1
                return
            shard.verify()
            keys = shard.members().keys
            part = UnitPart(
                unit, unit.views, len(keys), {layer: UnitAudit(None, 0) for layer in layers}, {VIEWS: self._size}
            )
            part.partners = draft.partners
            arrays = {
                layer: {name: values[:, images] for name, values in draft.arrays[layer].items()}
                for layer in (*layers, VIEWS)
            }
            part.fill([keys[at] for at in images], [(keys[at], draft.lost[at]) for at in sorted(draft.lost)], arrays)
            self._filling.add(part)
            self.written += 1
        except UnitTaken:
            self.dropped += 1
        except SourceError as error:
            logger.info(f"train-student: warning: unit {unit} is not written: {in_one_line(error)}")
        finally:
            self._filling.close()
            writer.give_back(unit)
            self._on_written(unit.shard)

    def _fits(self, unit: UnitId) -> bool:
        """Whether it lies within a unit of the view layer or outside all, and the shard's keys are there or in it."""
        views = self._writer.of_shard(VIEWS, unit.shard)
        within = all(set(unit.views) <= set(other.views) for other in views if other.overlaps(unit))
        return within and any(holds_keys(VIEWS, other) for other in (unit, *views))
