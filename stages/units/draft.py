"""A unit while it is filled, batch by batch in tar order: keys, views, digests, encoded arrays, audit."""

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
from tinymim.storage.layout import UnitId
from tinymim.targets.contract import TargetKind


@dataclass
class AuditedViews:
    """Views for the unit audit, on the teacher's device.

    Attributes:
        tapped: the teacher's tapped tensors, first axis B.
        pixels: uint8 [B, 3, S, S].
        records: the codec's arrays, first axis B.
        view_keys: int64 [B].
    """

    tapped: Tapped
    pixels: Tensor
    records: dict[str, Tensor]
    view_keys: Tensor


@dataclass
class EncodedBatch:
    """A batch after the teacher. On a GPU `arrays` and `finite` are filled only after `marks.wait()`.

    Attributes:
        piece: the batch's place in its unit.
        batch: the decoded views.
        arrays: the codec's arrays on the CPU, first axis records.
        marks: before the teacher, after it, after the codec, after the copy to the CPU.
        audited: views for the unit audit; None after a unit's first batches.
        finite: bool [B] on the CPU, whether the tapped tensors of a view are finite.
    """

    piece: Piece
    batch: ViewBatch
    arrays: dict[str, Tensor] = field(default_factory=dict)
    marks: Marks | None = None
    audited: AuditedViews | None = None
    finite: Tensor | None = None


def encode(
    teacher: Teacher, kind: TargetKind, batch: ViewBatch, piece: Piece, audit_views: int, device: torch.device
) -> EncodedBatch:
    """Launch teacher and codec on a batch; on a GPU the work goes on after this returns.

    Args:
        teacher: the teacher, on `device`.
        kind: the codec, on `device`.
        batch: the decoded views; may be empty.
        piece: the batch's place in its unit.
        audit_views: views that the audit still needs. It gets one view per image, because views of one image are too
            alike to show how gradients vary.
        device: the device that runs teacher and codec.
    """
    if not batch.keys:
        return EncodedBatch(piece, batch)
    # Nothing here may wait for the GPU: the next batch is launched while this one computes.
    pixels = batch.pixels.to(device, non_blocking=True)
    view_keys = batch.view_keys.to(device, non_blocking=True)
    marks = Marks(device)
    marks.mark()
    tapped: Tapped = teacher(pixels, check=False)  # reading the check would wait; the collector reads `finite` later
    finite = finite_views(tapped)
    marks.mark()
    records = kind.encode(tapped, view_keys)
    marks.mark()
    audited = None
    if audit_views > 0:
        first = np.flatnonzero(batch.items[:, 2] == batch.items[0, 2])[:audit_views]
        rows = torch.from_numpy(first).to(device)
        audited = AuditedViews(
            {tap: tuple(tensor[rows] for tensor in tensors) for tap, tensors in tapped.items()},
            pixels[rows],
            {name: _picked(array, rows) for name, array in records.items()},
            view_keys[rows],
        )
    arrays = {name: array.to("cpu", non_blocking=True) for name, array in records.items()}
    finite = finite.to("cpu", non_blocking=True)
    marks.mark()
    return EncodedBatch(piece, batch, arrays, marks, audited, finite)


def _picked(array: Tensor, rows: Tensor) -> Tensor:
    if array.dtype == torch.uint16:  # CUDA cannot index uint16, the dtype of indices above 256 tokens
        return array.view(torch.int16)[rows].view(torch.uint16)
    return array[rows]


class Draft:
    """A unit's records so far. The thread "collect" makes and fills it, then hands it to the thread "write"."""

    def __init__(self, unit: UnitId, audit: UnitAudit) -> None:
        self.unit, self.audit = unit, audit
        self.unreadable: list[tuple[str, str]] = []
        self._keys: list[str] = []
        self._parts: list[dict[str, npt.NDArray[Any]]] = []

    def add(self, encoded: EncodedBatch) -> None:
        """Append a batch, after `marks.wait()`."""
        batch = encoded.batch
        self.unreadable += batch.unreadable
        if not batch.keys:
            return
        self._keys += batch.keys
        # Copied out of pinned memory: a whole unit of it is too much, and torch never returns it to the system.
        parts = {name: array.clone() if array.is_pinned() else array for name, array in encoded.arrays.items()}
        self._parts.append(batch.stored() | {name: part.numpy() for name, part in parts.items()})

    def compare(self, views: AuditedViews) -> None:
        """Add views to the unit audit (I5)."""
        self.audit.add(views.tapped, views.pixels, views.records, views.view_keys)

    def keys(self) -> list[str]:
        """One key per readable image."""
        return self._keys[:: self.unit.num_views]

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All arrays of the unit, first axis records; empty without records."""
        if not self._parts:
            return {}
        return {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}

    def statistics(self) -> dict[str, Any]:
        """The commit record's statistics: fidelity (I5) and unreadable images."""
        return {"fidelity": self.audit.summary(), "unreadable": [list(row) for row in self.unreadable]}

    def refuse_too_many_unreadable(self, count: int, max_share: float) -> None:
        """Print how many of the shard's `count` images are unreadable.

        Raises:
            SourceError: all are, or more than the share `max_share`.
        """
        if self.unreadable:
            missing = f"{len(self.unreadable)} of {count} images of {self.unit.shard}"
            logger.info(f"cache-teacher: {missing} are unreadable and skipped")
        if len(self.unreadable) > max_share * count or len(self.unreadable) == count:
            key, reason = self.unreadable[0]
            raise SourceError(
                f"too many unreadable images in shard {self.unit.shard}, the first is '{key}' ({reason})",
                got=f"{len(self.unreadable)} of {count}",
                expected=f"at most {max_share:.1%} unreadable, and at least one readable image",
                hint="repair the shard, or raise max_unreadable" if max_share < 1 else "repair or remove the shard",
            )
