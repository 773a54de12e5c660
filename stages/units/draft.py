"""Batches behind the teacher, and the part of a unit that they fill: keys, digests, records, audit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinymim.configs.errors import SourceError
from tinymim.models.taps import Tapped, finite_views
from tinymim.models.teacher import Teacher
from tinymim.pipeline.dataset import ViewBatch
from tinymim.stages.run.progress import logger
from tinymim.stages.units.audit import UnitAudit
from tinymim.stages.units.ledger import Piece
from tinymim.stages.units.timing import Marks
from tinymim.storage.blocks import DIGEST
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.targets.contract import TargetKind


@dataclass
class AuditedViews:
    """Views for the unit audit, on the teacher's device.

    Attributes:
        tapped: the teacher's tapped tensors, first axis B.
        pixels: uint8 [B, 3, S, S].
        records: by layer the codec's arrays, first axis B.
        view_keys: int64 [B].
    """

    tapped: Tapped
    pixels: Tensor
    records: dict[str, dict[str, Tensor]]
    view_keys: Tensor


@dataclass
class EncodedBatch:
    """A batch after the teacher. On a GPU `arrays` and `finite` are filled only after `marks.wait()`.

    Attributes:
        piece: the batch's place in its unit.
        batch: the decoded views.
        arrays: by layer the codec's arrays on the CPU, first axis records.
        marks: before the teacher, after it, after the codecs, after the copy to the CPU.
        audited: views for the unit audit; None after a unit's first batches.
        finite: bool [B] on the CPU, whether the tapped tensors of a view are finite.
    """

    piece: Piece
    batch: ViewBatch
    arrays: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    marks: Marks | None = None
    audited: AuditedViews | None = None
    finite: Tensor | None = None


def encode(
    teacher: Teacher,
    kinds: Mapping[str, TargetKind],
    batch: ViewBatch,
    piece: Piece,
    audit_views: int,
    device: torch.device,
) -> EncodedBatch:
    """Launch teacher and codecs of the unit's layers on a batch; on a GPU the work goes on after this returns.

    Args:
        teacher: the teacher, on `device`.
        kinds: the codecs by layer, on `device`.
        batch: the decoded views; may be empty.
        piece: the batch's place in its unit.
        audit_views: views that the audit still needs. It gets one view per image, because views of one image are too
            alike to show how gradients vary.
        device: the device that runs teacher and codecs.
    """
    if not batch.keys:
        return EncodedBatch(piece, batch)
    # Nothing here may wait for the GPU: the next batch is launched while this one computes.
    pixels = batch.pixels.to(device, non_blocking=True)
    view_keys = batch.view_keys.to(device, non_blocking=True)
    marks = Marks(device)
    marks.mark()
    used = {layer: kinds[layer] for layer in piece.layers}
    taps = {tap for kind in used.values() for tap in kind.taps}
    # Reading the check would wait; the collector reads `finite` later.
    tapped: Tapped = teacher(pixels, check=False, taps=taps)
    finite = finite_views(tapped)
    marks.mark()
    records = {layer: kind.encode(tapped, view_keys) for layer, kind in used.items()}
    marks.mark()
    audited = None
    if audit_views > 0:
        first = np.flatnonzero(batch.items[:, 2] == batch.items[0, 2])[:audit_views]
        rows = torch.from_numpy(first).to(device)
        audited = AuditedViews(
            {tap: tuple(tensor[rows] for tensor in tensors) for tap, tensors in tapped.items()},
            pixels[rows],
            {layer: {name: _picked(each, rows) for name, each in own.items()} for layer, own in records.items()},
            view_keys[rows],
        )
    arrays = {
        layer: {name: each.to("cpu", non_blocking=True) for name, each in own.items()} for layer, own in records.items()
    }
    finite = finite.to("cpu", non_blocking=True)
    marks.mark()
    return EncodedBatch(piece, batch, arrays, marks, audited, finite)


def _picked(array: Tensor, rows: Tensor) -> Tensor:
    if array.dtype == torch.uint16:  # CUDA cannot index uint16, the dtype of indices above 256 tokens
        return array.view(torch.int16)[rows].view(torch.uint16)
    return array[rows]


class UnitPart:
    """The records of all images of a unit for some of its views. "collect" fills it, then hands it to "write".

    Args:
        unit: the unit.
        views: k adjacent views of it.
        num_images: images of the shard.
        audits: by layer the unit's audit, which its parts share; these are the layers that lack the unit.

    Attributes:
        keys: one key per readable image, I of them.
        unreadable: (key, reason) of the others.
    """

    def __init__(self, unit: UnitId, views: range, num_images: int, audits: Mapping[str, UnitAudit]) -> None:
        self.unit, self.views, self.audits = unit, views, audits
        self.keys: list[str] = []
        self.unreadable: list[tuple[str, str]] = []
        self._num_images = num_images
        # By layer and array, [k, images of the shard, ...].
        self._arrays: dict[str, dict[str, npt.NDArray[Any]]] = {layer: {} for layer in (VIEWS, *audits)}

    @property
    def begins_unit(self) -> bool:
        """Whether it is the unit's first part."""
        return self.views.start == self.unit.first_view

    @property
    def ends_unit(self) -> bool:
        """Whether it is the unit's last part."""
        return self.views.stop == self.unit.views.stop

    def add(self, encoded: EncodedBatch) -> None:
        """Add a batch, after `marks.wait()`."""
        batch, num_views = encoded.batch, len(self.views)
        self.unreadable += batch.unreadable
        if not batch.keys:
            return
        begin, keys = len(self.keys), batch.keys[::num_views]
        self.keys += keys
        found = {VIEWS: {DIGEST: low_digests(batch)}}
        found |= {layer: {name: each.numpy() for name, each in own.items()} for layer, own in encoded.arrays.items()}
        for layer, arrays in found.items():
            held = self._arrays[layer]
            for name, values in arrays.items():
                shape = values.shape[1:]
                if name not in held:
                    held[name] = np.empty((num_views, self._num_images, *shape), values.dtype)
                # Batches hold the views of an image next to each other, units the images of a view. The copy also
                # frees pinned memory: a whole part of it is too much, and torch never returns it to the system.
                by_view = values.reshape(len(keys), num_views, *shape).swapaxes(0, 1)
                held[name][:, begin : len(self.keys)] = by_view

    def fill(
        self, keys: list[str], unreadable: list[tuple[str, str]], arrays: dict[str, dict[str, npt.NDArray[Any]]]
    ) -> None:
        """Take the records of all readable images at once, instead of `add`: by layer and name, arrays [k, I, ...]."""
        self.keys, self.unreadable, self._arrays = keys, unreadable, arrays

    def compare(self, views: AuditedViews) -> None:
        """Add views to the unit audit of every layer (I5)."""
        for layer, audit in self.audits.items():
            audit.add(views.tapped, views.pixels, views.records[layer], views.view_keys)

    def records(self, layer: str) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a layer, also of the view layer, [k, I, ...]; empty without readable images."""
        return {name: values[:, : len(self.keys)] for name, values in self._arrays[layer].items()}

    def refuse_too_many_unreadable(self, max_share: float) -> None:
        """Print how many of the shard's images are unreadable.

        Raises:
            SourceError: all are, or more than the share `max_share`.
        """
        lost, count = len(self.unreadable), self._num_images
        if lost:
            logger.info(f"cache-teacher: {lost} of {count} images of {self.unit.shard} are unreadable and skipped")
        if lost > max_share * count or lost == count:
            key, reason = self.unreadable[0]
            if lost == count:
                what, expected, hint = "no readable image", "at least one readable image", "repair or remove the shard"
            else:
                what, expected = "too many unreadable images", f"at most {max_share:.1%} unreadable"
                hint = "repair the shard, or raise max_unreadable"
            raise SourceError(
                f"{what} in shard {self.unit.shard}, the first is '{key}' ({reason})",
                got=f"{lost} of {count} unreadable",
                expected=expected,
                hint=hint,
            )


def low_digests(batch: ViewBatch) -> npt.NDArray[np.uint32]:
    """uint32 [B]: the low 32 bits of the digest of every view's pixels (I2)."""
    return batch.digests().numpy().astype(np.uint32)
