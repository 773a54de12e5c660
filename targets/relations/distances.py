"""Relations compared by a distance instead of the KL: of softmaxed rows, or of their logits before the softmax.

These are the arms of the loss in the ablation of Ren et al., "TinyMIM", CVPR 2023. Its text does not fix their scale.
Here a distance of softmaxed rows is summed over a row's tokens, as the KL is, and one of logits is their mean.

Shapes: B view, H relation head, Q query row, T token.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from tinymim.configs.codecs.relations import Relation
from tinymim.configs.codecs.targets import RelationLoss
from tinymim.configs.taps import Shapes
from tinymim.targets.contract import Answers, ArraySpec, Loss, PictureLine, Projection, Tapped, Views, Yardstick
from tinymim.targets.relations.dense import Dense
from tinymim.targets.relations.hidden import Hidden
from tinymim.targets.relations.kind import RelationKind
from tinymim.targets.relations.qkv import QKV, relation_logits
from tinymim.targets.relations.rows import DenseRows, Rows
from tinymim.targets.vectors import LEAST_NORM


@dataclass(frozen=True)
class RowValues(Views):
    """Query rows of one relation of B views: probabilities, or logits."""

    rows: Int64[Tensor, "B H Q"] | None  # None: all T rows in order
    value: Float[Tensor, "B H Q T"]


Values = dict[Relation, RowValues]


@dataclass(frozen=True)
class RelationDistance(RelationKind):
    """Relation maps of a codec that holds whole rows, compared by squared error, L1 or cosine.

    The gradients of `mse` and `cosine` are linear in the teacher's row (`targets/vectors.py`), that of `l1` is not. The
    codecs draw nothing but rows, each as likely as any other, so all three are as unbiased as the codec.

    Attributes:
        codec: the codec, with the relations, heads and rows to compare.
        loss: the distance.
        before_softmax: compare logits; only a codec that rebuilds q, k and v has them.
        block: the tapped block of the teacher, counted from 1.
    """

    codec: Dense | Hidden
    loss: RelationLoss
    before_softmax: bool
    block: int = 1
    version: ClassVar[int] = 1
    measure: ClassVar[str] = "distance"

    @property
    def name(self) -> str:  # type: ignore[override]  # of the codec
        """See `TargetKind`."""
        return self.codec.name

    @property
    def unbiased(self) -> bool:
        """See `TargetKind`."""
        return self.codec.unbiased

    @property
    def whole(self) -> bool:
        """See `TargetKind`."""
        return self.codec.whole

    @property
    def relations(self) -> tuple[Relation, ...]:
        """See `RelationKind`."""
        return self.codec.relations

    @property
    def rows(self) -> int | None:
        """See `RelationKind`."""
        return self.codec.rows

    def relation_heads(self, heads: int) -> int:
        """See `RelationKind`."""
        return self.codec.relation_heads(heads)

    # ---- records

    def specs(self, shapes: Shapes) -> tuple[ArraySpec, ...]:
        """See `TargetKind`."""
        return self.codec.specs(shapes)

    def encode(self, tapped: Tapped, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """See `TargetKind`."""
        return self.codec.encode(tapped, view_keys)

    @torch.no_grad()
    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], shapes: Shapes) -> Values:
        """See `TargetKind`: float32."""
        if isinstance(self.codec, Hidden):
            rebuilt = self.codec.logits(arrays, view_keys, shapes)
            return {relation: self._values(rows, logits) for relation, (rows, logits) in rebuilt.items()}
        held = self.codec.decode(arrays, view_keys, shapes)
        return {name: RowValues(each.rows, each.probs) for name, each in held.items() if isinstance(each, DenseRows)}

    @torch.no_grad()
    def exact(self, tapped: Tapped) -> Values:  # type: ignore[override]
        """See `TargetKind`: float32 (float64 for float64 inputs) [B, H, T, T]."""
        qkv = self.split(tapped)
        return {relation: self._values(None, relation_logits(qkv, relation)) for relation in self.relations}

    def pick(self, target: Values, some: slice, device: torch.device | None = None) -> Values:  # type: ignore[override]
        """See `TargetKind`."""
        return {relation: held.pick(some, device) for relation, held in target.items()}

    # ---- pictures

    def answered(self, answers: Answers, shapes: Shapes) -> Values:  # type: ignore[override]
        """See `TargetKind`."""
        qkv = QKV(*answers).resplit(self.relation_heads(shapes.heads))
        return {relation: self._values(None, relation_logits(qkv, relation)) for relation in self.relations}

    def picture(  # type: ignore[override]
        self, columns: Mapping[str, Values], shapes: Shapes, lines: int
    ) -> list[PictureLine]:
        """See `RelationKind`; logits are shown as probabilities."""
        shown: dict[str, Rows] = {
            name: {relation: self._shown(held) for relation, held in values.items()} for name, values in columns.items()
        }
        return super().picture(shown, shapes, lines)

    def _shown(self, held: RowValues) -> DenseRows:
        probs = held.value.softmax(-1) if self.before_softmax else held.value
        return DenseRows(held.rows, probs, torch.special.entr(probs).sum(-1).mean((1, 2)))

    def _values(self, rows: Tensor | None, logits: Float[Tensor, "B H Q T"]) -> RowValues:
        return RowValues(rows, logits if self.before_softmax else logits.softmax(-1))

    # ---- students

    def losses(self, answers: Answers, target: Values) -> dict[str, Loss]:  # type: ignore[override]
        """See `TargetKind`: mean over the target's rows."""
        heads, found = next(iter(target.values())).value.shape[1], {}
        qkv = QKV(*answers).resplit(heads)
        for relation, teacher in target.items():
            own = self._values(teacher.rows, relation_logits(qkv, relation, teacher.rows)).value
            # broadcasting would accept a student with one view or head
            assert own.shape == teacher.value.shape, f"student {own.shape}, teacher {teacher.value.shape}"
            found[str(relation)] = self.distance(own, teacher.value.to(own.dtype))
        return found

    def distance(self, student: Float[Tensor, "B H Q T"], teacher: Float[Tensor, "B H Q T"]) -> Loss:
        """The loss by head of rows of the same dtype, at least fp32."""
        share = 1 / student.shape[-1] if self.before_softmax else 1.0
        with torch.autocast(student.device.type, enabled=False):
            if self.loss == "cosine":
                unit = normalize(teacher, dim=-1, eps=torch.finfo(torch.float32).tiny)
                parts = -(normalize(student, dim=-1, eps=LEAST_NORM) * unit).sum(-1).mean(-1)
                return Loss(parts, -unit.square().sum(-1).mean(-1))
            if self.loss == "l1":
                parts = share * (student - teacher).abs().sum(-1).mean(-1)
                return Loss(parts, torch.zeros_like(parts))
            parts = share * (student * (student - 2 * teacher)).sum(-1).mean(-1)
            return Loss(parts, -share * teacher.square().sum(-1).mean(-1))

    # ---- audits

    def yardsticks(self, targets: Sequence[Values]) -> dict[str, Yardstick]:  # type: ignore[override]
        """See `TargetKind`: the distance of even rows, and of the mean over all other views."""
        found = {}
        for relation in targets[0]:
            own = torch.cat([each[relation].value for each in targets]).double()
            even = torch.full_like(own, 0.0 if self.before_softmax else 1 / own.shape[-1])
            others = (own.sum(0) - own) / (len(own) - 1)
            losses = (self.distance(even, own).mean(), self.distance(others, own).mean())
            found[str(relation)] = Yardstick(*map(float, losses))
        return found

    def statistics(  # type: ignore[override]
        self, tapped: Tapped, target: Values
    ) -> dict[str, dict[str, Float[Tensor, "B H"]]]:
        """See `TargetKind`: `rms` of the exact values, and `relative_error`, the squared error over their square."""
        qkv, found = self.split(tapped), {}
        for relation, held in target.items():
            exact = self._values(held.rows, relation_logits(qkv, relation, held.rows)).value.double()
            square, error = (each.square().mean((2, 3)) for each in (exact, held.value - exact))
            relative = error / square.clamp(min=torch.finfo(torch.float32).tiny)
            found[str(relation)] = {"rms": square.sqrt(), "relative_error": relative}
        return found

    # ---- constants

    @property
    def calibration_views(self) -> int:
        """See `TargetKind`."""
        return self.codec.calibration_views

    def check_teacher(self, tapped: Tapped, projection: Projection) -> None:
        """See `TargetKind`."""
        self.codec.check_teacher(tapped, projection)

    def calibrate(self, tapped: Iterable[Tapped], projection: Projection) -> dict[str, Tensor]:
        """See `TargetKind`."""
        return self.codec.calibrate(tapped, projection)
