"""Relations as a target kind: what all its codecs share.

Shapes: B view, H relation head, Q query row, T token.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tinymim.configs.codecs import Relation
from tinymim.configs.errors import RecipeError
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets.contract import Answers, Loss, Tapped, TargetHead, TargetKind, Yardstick
from tinymim.targets.relations.head import RelationHead
from tinymim.targets.relations.losses import cross_entropy_per_head
from tinymim.targets.relations.qkv import QKV, relation_probs
from tinymim.targets.relations.rows import DenseRows, Rows, SparseRows, pick

_LEAST_PROBABILITY = 2.0**-24  # the smallest that fp16 holds


class RelationKind(TargetKind):
    """Softmaxed relation maps of one attention block, compared by KL (Ren et al., "TinyMIM", CVPR 2023)."""

    measure: ClassVar[str] = "kl"
    block: int

    @property
    def taps(self) -> tuple[Tap, ...]:
        """See `TargetKind`."""
        return (Tap("qkv", self.block),)

    @property
    def relations(self) -> tuple[Relation, ...]:
        """The relations of a decoded target."""
        raise NotImplementedError

    def relation_heads(self, heads: int) -> int:
        """H of the decoded target for a teacher of `heads` heads."""
        raise NotImplementedError

    def tapped(self, tapped: Tapped) -> QKV:
        """The block's projections in the teacher's own heads."""
        return QKV.of(tapped, self.taps[0])

    def split(self, tapped: Tapped) -> QKV:
        """The block's projections in the relation heads."""
        qkv = self.tapped(tapped)
        return qkv.resplit(self.relation_heads(qkv.q.shape[1]))

    def shapes(self, tapped: Tapped) -> Shapes:
        """The sizes of what a teacher gave, as far as they decide a record's."""
        _, heads, tokens, head_dim = self.tapped(tapped).q.shape
        return Shapes(heads, head_dim, tokens, 0, (1, tokens))

    # ---- the contract

    def exact(self, tapped: Tapped) -> Rows:
        """See `TargetKind`: float32 maps [B, H, T, T] (float64 for float64 inputs)."""
        return exact_rows(self.split(tapped), self.relations)

    def pick(self, target: Rows, some: slice, device: torch.device | None = None) -> Rows:
        """See `TargetKind`."""
        return pick(target, some, device)

    def parts(self, shapes: Shapes) -> dict[str, int]:
        """See `TargetKind`: one loss per relation, one part per relation head."""
        return dict.fromkeys(map(str, self.relations), self.relation_heads(shapes.heads))

    def head(self, student: Shapes, teacher: Shapes) -> TargetHead:
        """See `TargetKind`."""
        heads, width = self.relation_heads(teacher.heads), student.width
        if width % heads:
            raise RecipeError(
                f"a student of width {width} cannot be split into {heads} relation heads",
                got=f"student.embed_dim {width}",
                expected=f"a multiple of {heads}",
                hint=f"the nearest are {width // heads * heads or heads} and {(width // heads + 1) * heads}",
            )
        return RelationHead(width, student.heads)

    def losses(self, answers: Answers, target: Rows) -> dict[str, Loss]:
        """See `TargetKind`: KL(teacher row || student row) in nats, mean over the target's rows; linear in the rows."""
        heads = next(iter(target.values())).shape[1]
        found = cross_entropy_per_head(QKV(*answers).resplit(heads), target)
        return {str(relation): Loss(found[relation], rows.entropy) for relation, rows in target.items()}

    def yardsticks(self, targets: Sequence[Rows]) -> dict[str, Yardstick]:
        """See `TargetKind`: KLs of even rows, and of the mean row over all other views."""
        return {str(name): _yardstick(torch.cat([each[name].dense() for each in targets])) for name in targets[0]}

    def statistics(self, tapped: Tapped, target: Rows) -> dict[str, dict[str, Float[Tensor, "B H"]]]:
        """See `TargetKind`: entropy_nats of the teacher's rows, kept_mass: their mass on tokens that a record names."""
        qkv, found = self.split(tapped), {}
        for relation, rows in target.items():
            dense = relation_probs(qkv, relation, rows.rows)
            named = torch.ones_like(dense)
            if isinstance(rows, SparseRows):
                named = torch.zeros_like(dense).scatter(-1, rows.index, 1.0)
            values = {"entropy_nats": torch.special.entr(dense).sum(-1), "kept_mass": (dense * named).sum(-1)}
            found[str(relation)] = {name: value.mean(dim=2) for name, value in values.items()}
        return found


def exact_rows(teacher: QKV, relations: Sequence[Relation]) -> Rows:
    """The dense maps themselves, float32 [B, H, T, T] (float64 for float64 inputs), as a target."""
    probs = {relation: relation_probs(teacher, relation) for relation in relations}
    return {r: DenseRows(None, p, torch.special.entr(p).sum(-1).mean(-1)) for r, p in probs.items()}


def mean_entropy(probs: Float[Tensor, "B H Q T"]) -> Float[Tensor, " B"]:
    """Mean over H and Q of -sum p log p, in nats."""
    entropy: Tensor = torch.special.entr(probs).sum(-1).mean((1, 2))
    return entropy


def _yardstick(rows: Float[Tensor, "B H T T"]) -> Yardstick:
    total, entropy, cross = rows.sum(0, dtype=torch.float64), 0.0, 0.0
    for each in rows:
        own = each.double()
        others = (total - own) / (len(rows) - 1)
        entropy += float(torch.special.entr(own).sum(-1).mean())
        cross -= float((own * others.clamp(min=_LEAST_PROBABILITY).log()).sum(-1).mean())
    return Yardstick(math.log(rows.shape[-1]) - entropy / len(rows), (cross - entropy) / len(rows))
