"""Fidelity of stored records against the dense maps they came from, on an audited subset (I5).

Shapes: B view, N relation, H head, Q query row, T token.
"""

from typing import Any

import torch
from torch import Tensor

from tinymim.targets.relations import QKV, relation_probs
from tinymim.targets.target import Target


class Audit:
    """Collects, per relation and head, how diffuse the teacher's rows are and how much of them a record names.

    Args:
        most: views to audit; later ones are ignored.
    """

    def __init__(self, most: int = 16) -> None:
        self.most = most
        self.views = 0
        self._sums: dict[str, dict[str, Tensor]] = {}

    @property
    def wants_more(self) -> bool:
        """Whether fewer than `most` views were audited."""
        return self.views < self.most

    @torch.no_grad()
    def add(self, qkv: QKV, target: Target) -> None:
        """Audit the first views of a batch: q, k, v float [B, H, T, D] and the decoded records of the same views."""
        count = min(self.most - self.views, len(qkv.q))
        self.views += count
        for relation, rows in target.items():
            dense = relation_probs(qkv, relation, rows.rows)[:count]
            decoded = rows.dense()[:count].to(dense.dtype)
            named = (decoded != 0).to(dense.dtype)
            values = {
                "entropy_nats": torch.special.entr(dense).sum(-1),
                "kept_mass": (dense * named).sum(-1),
                # Of one draw per row: falls to the sketch's own variance, not to zero, for an unbiased codec.
                "squared_error": (decoded - dense).square().sum(-1),
            }
            sums = self._sums.setdefault(relation, {})
            for name, value in values.items():
                per_head = value.mean(dim=2).sum(dim=0).double().cpu()  # over Q, then over views: [H]
                sums[name] = sums[name] + per_head if name in sums else per_head

    def summary(self) -> dict[str, Any]:
        """{"views": n, relation: {"entropy_nats": [H values], "kept_mass": [...], "squared_error": [...]}}."""
        result: dict[str, Any] = {"views": self.views}
        for relation, sums in self._sums.items():
            result[relation] = {name: [round(v, 6) for v in (s / self.views).tolist()] for name, s in sums.items()}
        return result
