"""The relation `ff` as a target kind: which patches of a view look alike, as softmaxed cosines of tokens.

The rows softmax(cos(f_i, f_j) / tau) over all patches j are relation rows of one head, whose two sides are the unit
tokens times (sqrt(C) / tau)^(1/2), so the codecs of relations store them as they store v v^T.

Shapes: B view, N patch, Q query row, C width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from tinymim.configs.codecs.relations import DenseCodec, FFCodec, Relation, SketchCodec
from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets.contract import Answers, ArraySpec, ChosenKind, Loss, PictureLine, Tapped, TargetHead, Yardstick
from tinymim.targets.features.kind import token_tap
from tinymim.targets.relations.kind import RelationKind, exact_rows, relation_lines
from tinymim.targets.relations.losses import reference_cross_entropy
from tinymim.targets.relations.make import make_relations
from tinymim.targets.relations.qkv import QKV, relation_logits
from tinymim.targets.relations.rows import Rows
from tinymim.targets.vectors import LEAST_NORM, Projector, check_grid

_AS: Final[Relation] = "vv"  # the relation as which its codec stores it
_KEYS: Final = 0x6666  # keeps its draws apart from those of a relation layer of the same view


@dataclass(frozen=True)
class FF(ChosenKind):
    """Cosines of patch tokens, compared by KL: a relation with one head, under the codecs of relations.

    `sketch` is unbiased and `topk` biased for the reasons given there. The student answers with a projector to the
    teacher's width.
    """

    config: FFCodec
    measure: ClassVar[str] = "kl"

    @property
    def unbiased(self) -> bool:
        """See `TargetKind`."""
        return self._rows.unbiased

    @property
    def meaning(self) -> tuple[object, ...]:
        """See `TargetKind`."""
        return ("ff", self.taps, self.config.tau)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """See `TargetKind`."""
        return (token_tap(self.config.at, self.block),)

    @cached_property
    def _rows(self) -> RelationKind:
        """The codec of the rows."""
        config = self.config
        chosen: SketchCodec | DenseCodec = DenseCodec(name="dense", relations=(_AS,))
        if config.name != "dense":
            tail = "sampled" if config.name == "sketch" else config.tail
            chosen = SketchCodec(
                relations=(_AS,), rows=config.rows, head_k=config.head_k, tail_k=config.tail_k, tail=tail
            )
        return make_relations(chosen, TargetsConfig(), self.block, {})

    def sides(self, tokens: Float[Tensor, "B N C"], least_norm: float = 1e-12) -> QKV:
        """The rows' sides, one head, in fp32 (fp64 for fp64 tokens)."""
        unit = normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1, eps=least_norm)
        side = (unit * (math.sqrt(tokens.shape[-1]) / self.config.tau) ** 0.5)[:, None]
        return QKV(side, side, side)

    def _tapped(self, tapped: Tapped) -> Tapped:
        """The sides as the codec of the rows reads them."""
        tokens, prefix = tapped[self.taps[0]]
        qkv = self.sides(tokens[:, prefix.shape[1] :])
        return {self._rows.taps[0]: (qkv.q, qkv.k, qkv.v)}

    @staticmethod
    def _shapes(shapes: Shapes) -> Shapes:
        return Shapes(1, shapes.width, shapes.tokens - shapes.prefix_tokens, 0, shapes.grid)

    # ---- records

    def draws(self, shapes: Shapes) -> bool:
        """See `TargetKind`."""
        return self._rows.draws(self._shapes(shapes))

    def specs(self, shapes: Shapes) -> tuple[ArraySpec, ...]:
        """See `TargetKind`."""
        return tuple(replace(spec, name=_own(spec.name)) for spec in self._rows.specs(self._shapes(shapes)))

    def encode(self, tapped: Tapped, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """See `TargetKind`."""
        arrays = self._rows.encode(self._tapped(tapped), view_keys ^ _KEYS)
        return {_own(name): array for name, array in arrays.items()}

    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], shapes: Shapes) -> Rows:
        """See `TargetKind`."""
        rows = {spec.name: arrays[_own(spec.name)] for spec in self._rows.specs(self._shapes(shapes))}
        target: Rows = self._rows.decode(rows, view_keys ^ _KEYS, self._shapes(shapes))
        return target

    def exact(self, tapped: Tapped) -> Rows:
        """See `TargetKind`."""
        return self._rows.exact(self._tapped(tapped))

    def pick(self, target: Rows, some: slice, device: torch.device | None = None) -> Rows:
        """See `TargetKind`."""
        return self._rows.pick(target, some, device)

    # ---- students

    def parts(self, shapes: Shapes) -> dict[str, int]:
        """See `TargetKind`."""
        return {"ff": 1}

    def head(self, student: Shapes, teacher: Shapes) -> TargetHead:
        """See `TargetKind`."""
        check_grid(student, teacher)
        return Projector(student, teacher.width, self.targets, patches=True)

    def losses(self, answers: Answers, target: Rows) -> dict[str, Loss]:
        """See `TargetKind`: KL(teacher row || student row) in nats, mean over the target's rows."""
        [tokens], teacher = answers, target[_AS]
        # One head's logits are small enough to be in memory, and too wide for the kernel of relations.
        logits = relation_logits(self.sides(tokens, LEAST_NORM), _AS, teacher.rows)
        assert logits.shape == teacher.shape, f"student {logits.shape}, teacher {teacher.shape}"
        return {"ff": Loss(reference_cross_entropy(logits, teacher).mean(-1), teacher.entropy)}

    # ---- audits

    def yardsticks(self, targets: Sequence[Rows]) -> dict[str, Yardstick]:
        """See `TargetKind`."""
        return {"ff": self._rows.yardsticks(targets)[_AS]}

    def statistics(self, tapped: Tapped, target: Rows) -> dict[str, dict[str, Float[Tensor, "B 1"]]]:
        """See `TargetKind`: as for relations."""
        return {"ff": self._rows.statistics(self._tapped(tapped), target)[_AS]}

    # ---- pictures

    def answered(self, answers: Answers, shapes: Shapes) -> Rows:
        """See `TargetKind`."""
        return exact_rows(self.sides(answers[0], LEAST_NORM), (_AS,))

    def picture(self, columns: Mapping[str, Rows], shapes: Shapes, lines: int) -> list[PictureLine]:
        """See `TargetKind`: the most selective patches."""
        title = {_AS: "softmax of cosines: what looks like this patch"}
        return relation_lines(title, columns, self._shapes(shapes), lines)


def _own(name: str) -> str:
    return f"ff{name.removeprefix(_AS)}"
