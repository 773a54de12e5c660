"""One unit being filled, batch by batch in tar order: keys, views, digests, encoded arrays, counts, audit."""

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
from tinymim.stages.run.progress import say
from tinymim.stages.units.audit import UnitAudit
from tinymim.stages.units.ledger import Piece
from tinymim.stages.units.timing import Marks
from tinymim.storage.layout import UnitId
from tinymim.targets.contract import TargetKind


@dataclass
class AuditedViews:
    """Views whose records are to be compared with their dense maps, on the teacher's device.

    Attributes:
        tapped: what the teacher gave, first axis views.
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
    """A batch behind the teacher.

    Attributes:
        arrays: the codec's, on the CPU once `marks` has been waited for.
        marks: before the teacher, behind it, behind the codec, behind the copy to the CPU.
        audited: for the unit's audit, from its first batches.
        finite: bool [B] on the CPU, whether what the teacher gave is finite, once `marks` has been waited for.
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
    """Run a batch through teacher and codec. On a GPU that goes on when this returns.

    Args:
        audit_views: how many of its views the audit still wants; it gets one an image, for views of the same
            image are too alike to say how gradients vary.
    """
    if not batch.keys:
        return EncodedBatch(piece, batch)
    pixels = batch.pixels.to(device, non_blocking=True)
    view_keys = batch.view_keys.to(device, non_blocking=True)
    marks = Marks(device)
    marks.mark()
    tapped: Tapped = teacher(pixels, check=False)  # the check would wait for the device: it is made by the collector
    finite = finite_views(tapped)
    marks.mark()
    records = kind.encode(tapped, view_keys)
    marks.mark()
    audited = None
    if audit_views > 0:
        first = np.flatnonzero(batch.items[:, 2] == batch.items[0, 2])[:audit_views]
        some = torch.from_numpy(first).to(device)
        picked = {name: _picked(array, some) for name, array in records.items()}
        seen = {tap: tuple(tensor[some] for tensor in tensors) for tap, tensors in tapped.items()}
        audited = AuditedViews(seen, pixels[some], picked, view_keys[some])
    arrays = {name: array.to("cpu", non_blocking=True) for name, array in records.items()}
    finite = finite.to("cpu", non_blocking=True)
    marks.mark()
    return EncodedBatch(piece, batch, arrays, marks, audited, finite)


def _picked(array: Tensor, some: Tensor) -> Tensor:
    """`array[some]`; of more than 256 tokens indices are uint16, which CUDA cannot index."""
    if array.dtype == torch.uint16:
        return array.view(torch.int16)[some].view(torch.uint16)
    return array[some]


class Draft:
    """A unit's records so far. Made and filled by one thread, then handed to the one that writes it."""

    def __init__(self, unit: UnitId, audit: UnitAudit) -> None:
        self.unit, self.audit = unit, audit
        self.unreadable: list[tuple[str, str]] = []
        self._keys: list[str] = []
        self._parts: list[dict[str, npt.NDArray[Any]]] = []

    def add(self, encoded: EncodedBatch) -> None:
        """Append a batch; its marks have been waited for."""
        batch = encoded.batch
        self.unreadable += batch.unreadable
        if not batch.keys:
            return
        self._keys += batch.keys
        # Copied out of pinned memory: a whole unit of it would be too much, and is never given back to the system.
        parts = {name: array.clone() if array.is_pinned() else array for name, array in encoded.arrays.items()}
        self._parts.append(batch.stored() | {name: part.numpy() for name, part in parts.items()})

    def compare(self, views: AuditedViews) -> None:
        """Give views to the audit (I5)."""
        self.audit.add(views.tapped, views.pixels, views.records, views.view_keys)

    def keys(self) -> list[str]:
        """One key per readable image."""
        return self._keys[:: self.unit.num_views]

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All arrays of the unit, first axis records."""
        if not self._parts:
            return {}
        return {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}

    def statistics(self) -> dict[str, Any]:
        """What the commit record keeps: fidelity (I5) and the unreadable images."""
        return {"fidelity": self.audit.summary(), "unreadable": [list(row) for row in self.unreadable]}

    def refuse_too_many_unreadable(self, count: int, most: float) -> None:
        """Raises SourceError where more than the share `most` of the shard's `count` images, or all, are unreadable."""
        if self.unreadable:
            missing = f"{len(self.unreadable)} of {count} images of {self.unit.shard}"
            say(f"cache-teacher: {missing} are unreadable and left out")
        if len(self.unreadable) > most * count or len(self.unreadable) == count:
            key, reason = self.unreadable[0]
            raise SourceError(
                f"too many unreadable images in shard {self.unit.shard}, the first is '{key}' ({reason})",
                got=f"{len(self.unreadable)} of {count}",
                expected=f"at most {most:.1%}",
                hint="repair the shard, or raise max_unreadable",
            )
