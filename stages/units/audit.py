"""Fidelity of a unit's records, written into its commit record (I5): some views compared with their dense targets."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from tinymim.models.taps import Tapped
from tinymim.stages.units.gradients import GradientProbe, Judged
from tinymim.targets.fidelity import StatisticMoments, merged

FEWEST_VIEWS: Final = 4  # below, variances between views say nothing


class UnitAudit:
    """Compares views with their dense targets until it has seen enough.

    Args:
        probe: gradients of the reference student.
        most: views to compare; later ones are ignored.
    """

    def __init__(self, probe: GradientProbe, most: int) -> None:
        self.probe, self.most = probe, most
        self.views = 0
        self._statistics, self._judged = StatisticMoments(), Judged(most)

    def add(self, tapped: Tapped, pixels: Tensor, records: Mapping[str, Tensor], view_keys: Tensor) -> None:
        """Some views.

        Args:
            tapped: what the teacher gave.
            pixels: uint8 [B, 3, S, S].
            records: the arrays of their records, first axis B.
            view_keys: int64 [B].
        """
        kind = self.probe.kind
        target = kind.decode(records, view_keys, self.probe.shapes)
        for row in range(min(self.most - self.views, len(pixels))):
            some = torch.tensor([row], device=pixels.device)
            one = {tap: tuple(tensor[some] for tensor in tensors) for tap, tensors in tapped.items()}
            stored, exact = kind.pick(target, slice(row, row + 1)), kind.exact(one)
            dense, drawn = self.probe(pixels[row : row + 1], [exact, stored])
            self._judged.add(dense, [drawn])
            self._statistics.add(kind.statistics(one, stored), 1)
            self.views += 1

    def summary(self) -> dict[str, Any]:
        """{"views": n}, and by loss and for "all" parameters lists over parts (see `targets/fidelity.py`)."""
        if self.views < FEWEST_VIEWS:
            return {"views": self.views}
        return {"views": self.views, **merged(self._statistics.summary(), self._judged.summary())}
