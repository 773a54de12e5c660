"""The unit audit: the fidelity of some of a unit's views to their dense targets, kept in its commit record (I5).

Of class logits, also the number of views whose label is the teacher's first class.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from tinymim.models.taps import Tapped
from tinymim.stages.units.gradients import CodecMoments, GradientProbe
from tinymim.targets.fidelity import StatisticMoments, merged

MIN_VIEWS: Final = 4  # variances between fewer views are noise


class UnitAudit:
    """Compares the first views of a unit with their dense targets.

    Args:
        probe: gradients of the reference student; may be None if `max_views` is 0.
        max_views: views to compare; later ones are ignored.
    """

    def __init__(self, probe: GradientProbe | None, max_views: int) -> None:
        self.probe, self.max_views = probe, max_views
        self.views = 0
        self._statistics, self._gradients = StatisticMoments(), CodecMoments(max_views)
        self._hits = self._labelled = 0

    def add(
        self,
        tapped: Tapped,
        pixels: Tensor,
        records: Mapping[str, Tensor],
        view_keys: Tensor,
        kept: Tensor | None = None,
    ) -> None:
        """Compare a batch of views.

        Args:
            tapped: the teacher's tapped tensors, first axis B.
            pixels: uint8 [B, 3, S, S].
            records: the codec's arrays, first axis B.
            view_keys: int64 [B].
            kept: int64 [B, M], the patches that teacher and student see; None: all.
        """
        assert self.probe is not None, "an audit of no views gets none"
        kind = self.probe.kind
        target = kind.decode(records, view_keys, self.probe.shapes)
        for row in range(min(self.max_views - self.views, len(pixels))):
            index = torch.tensor([row], device=pixels.device)
            one = {tap: tuple(tensor[index] for tensor in tensors) for tap, tensors in tapped.items()}
            stored, exact = kind.pick(target, slice(row, row + 1)), kind.exact(one)
            dense, drawn = self.probe(
                pixels[row : row + 1], [exact, stored], None if kept is None else kept[row : row + 1]
            )
            self._gradients.add(dense, [drawn])
            self._statistics.add(kind.statistics(one, stored), 1)
            self.views += 1

    def count_hits(self, hits: Tensor) -> None:
        """Count views by `TargetKind.hits`."""
        self._labelled += int(hits.isfinite().sum())
        self._hits += int(hits.nansum())

    def statistics(self) -> dict[str, Any]:
        """The statistics of the unit's commit record; `teacher_top1` where views of class logits have labels."""
        top1 = {"teacher_top1": {"hits": self._hits, "labelled": self._labelled}} if self._labelled else {}
        return {"fidelity": self.summary(), **top1}

    def summary(self) -> dict[str, Any]:
        """{"views": N}; from `MIN_VIEWS` on also lists over parts, by loss and "all" (see `targets/fidelity.py`)."""
        if self.views < MIN_VIEWS:
            return {"views": self.views}
        return {"views": self.views, **merged(self._statistics.summary(), self._gradients.summary())}
