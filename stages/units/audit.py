"""Fidelity of a unit's records, written into its commit record (I5): some views compared with their dense maps."""

from typing import Any, Final

import torch
from torch import Tensor

from tinymim.stages.units.gradients import GradientProbe, Judged, target_of
from tinymim.targets.relations.fidelity import MapMoments, exact_target, merged
from tinymim.targets.relations.qkv import QKV
from tinymim.targets.relations.rows import Target

FEWEST_VIEWS: Final = 4  # below, variances between views say nothing


class Audit:
    """Compares views with their dense maps until it has seen enough.

    Args:
        probe: gradients of the reference student.
        most: views to compare; later ones are ignored.
    """

    def __init__(self, probe: GradientProbe, most: int) -> None:
        self.probe, self.most = probe, most
        self.views = 0
        self._maps, self._judged = MapMoments(), Judged(most)

    @property
    def wants_more(self) -> bool:
        """Whether fewer than `most` views were compared."""
        return self.views < self.most

    def add(self, block: QKV, pixels: Tensor, target: Target) -> None:
        """Some views: the teacher's block, pixels uint8 [B, 3, S, S], and the target decoded from their records."""
        for row in range(min(self.most - self.views, len(pixels))):
            one = block.pick(torch.tensor([row], device=pixels.device)).resplit(self.probe.heads)
            records = target_of(target, row)
            exact = exact_target(one, tuple(target))
            dense, drawn = self.probe(pixels[row : row + 1], [exact, records])
            self._judged.add(exact, dense, [drawn])
            self._maps.add(one, records)
            self.views += 1

    def summary(self) -> dict[str, Any]:
        """{"views": n} and, by relation and for "all" parameters, lists over heads of the
        values in targets/relations/fidelity.py."""
        if self.views < FEWEST_VIEWS:
            return {"views": self.views}
        return {"views": self.views, **merged(self._maps.summary(), self._judged.summary())}
