"""The class embedding against a bank of anchors as a target kind.

Source: the global loss of today's distillation products: a student's view is as near to other images' embeddings as
the teacher's is. There the bank is a queue of recent embeddings; here it is fixed, so that records can name anchors.

Shapes: B view, A anchor, C width.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from tinymim.configs.codecs.probabilities import BankCodec, LogitsCodec
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets.cls.kind import embedding_tap
from tinymim.targets.contract import (
    Answers,
    ArraySpec,
    ChosenKind,
    Loss,
    PictureLine,
    Projection,
    Tapped,
    TargetHead,
    Yardstick,
)
from tinymim.targets.logits.kind import Logits, LogitTarget, probability_line
from tinymim.targets.vectors import LEAST_NORM, Projector

_KEYS: Final = 0x62616E6B  # keeps its draws apart from those of a layer of logits of the same view


@dataclass(frozen=True)
class Bank(ChosenKind):
    """softmax(cosines of a view's embedding with the anchors / tau), compared by KL, under the codecs of logits.

    The anchors are the embeddings of the calibration views, constants of the cache. A cosine with an anchor is a class
    logit, so `draws` is **unbiased** for the reason given in `Logits`. The student answers with a projector to the
    teacher's width.
    """

    config: BankCodec
    measure: ClassVar[str] = "kl"

    @property
    def meaning(self) -> tuple[object, ...]:
        """See `TargetKind`."""
        return ("bank", self.taps, self.config.anchors, self.config.tau)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """See `TargetKind`."""
        return (embedding_tap(self.config.at, self.block),)

    @cached_property
    def _logits(self) -> Logits:
        """The codec of the softmax."""
        config = self.config
        codec = LogitsCodec(
            kind="logits",
            name=config.name,
            classes=config.anchors,
            head_k=config.head_k,
            tail_k=config.tail_k,
            values=config.values,
        )
        return Logits(codec)

    def cosines(self, embedding: Float[Tensor, "B C"], least_norm: float = 1e-12) -> Float[Tensor, "B A"]:
        """Cosines over tau, in the embedding's dtype."""
        anchors = self.constants["anchors"].to(embedding)  # students may be on other devices than the records
        return normalize(embedding, dim=-1, eps=least_norm) @ anchors.T / self.config.tau

    def _tapped(self, tapped: Tapped) -> Tapped:
        """The cosines as the codec of the softmax reads them; float64, so that they do not depend on the batch."""
        return {self._logits.taps[0]: (self.cosines(tapped[self.taps[0]][0].double()),)}

    # ---- records

    def draws(self, shapes: Shapes) -> bool:
        """See `TargetKind`."""
        return self._logits.draws(shapes)

    def specs(self, shapes: Shapes) -> tuple[ArraySpec, ...]:
        """See `TargetKind`."""
        return self._logits.specs(shapes)

    def encode(self, tapped: Tapped, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """See `TargetKind`."""
        return self._logits.encode(self._tapped(tapped), view_keys ^ _KEYS)

    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], shapes: Shapes) -> LogitTarget:
        """See `TargetKind`."""
        return self._logits.decode(arrays, view_keys ^ _KEYS, shapes)

    def exact(self, tapped: Tapped) -> LogitTarget:
        """See `TargetKind`: float32 (float64 for float64 inputs) [B, A]."""
        target = self._logits.exact(self._tapped(tapped))
        dtype = torch.promote_types(tapped[self.taps[0]][0].dtype, torch.float32)
        return LogitTarget(None, *(each.to(dtype) for each in (target.weight, target.share, target.entropy)))

    # ---- students

    def parts(self, shapes: Shapes) -> dict[str, int]:
        """See `TargetKind`."""
        return {"bank": 1}

    def head(self, student: Shapes, teacher: Shapes) -> TargetHead:
        """See `TargetKind`."""
        return Projector(student, teacher.width, self.targets, patches=False)

    def losses(self, answers: Answers, target: LogitTarget) -> dict[str, Loss]:
        """See `TargetKind`: cross entropy in nats of the student's softmax over the anchors."""
        return {"bank": self._logits.losses((self._answer(answers),), target)["logits"]}

    def _answer(self, answers: Answers) -> Float[Tensor, "B A"]:
        """A student's cosines over tau."""
        embedding = answers[0][:, 0]
        with torch.autocast(embedding.device.type, enabled=False):
            return self.cosines(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), LEAST_NORM)

    # ---- audits

    def yardsticks(self, targets: Sequence[LogitTarget]) -> dict[str, Yardstick]:
        """See `TargetKind`: as for logits."""
        return {"bank": self._logits.yardsticks(targets)["logits"]}

    def statistics(self, tapped: Tapped, target: LogitTarget) -> dict[str, dict[str, Float[Tensor, "B 1"]]]:
        """See `TargetKind`: as for logits."""
        return {"bank": self._logits.statistics(self._tapped(tapped), target)["logits"]}

    # ---- pictures

    def answered(self, answers: Answers, shapes: Shapes) -> LogitTarget:
        """See `TargetKind`."""
        return self._logits.answered((self._answer(answers),), shapes)

    def picture(self, columns: Mapping[str, LogitTarget], shapes: Shapes, lines: int) -> list[PictureLine]:
        """See `TargetKind`: the nearest anchors, as bars."""
        return [probability_line("nearness to anchors", columns, self.config.anchors)]

    # ---- constants

    @property
    def calibration_views(self) -> int:
        """See `TargetKind`: one for each anchor."""
        return self.config.anchors

    def check_teacher(self, tapped: Tapped, projection: Projection) -> None:
        """See `TargetKind`: every teacher's embeddings can be anchors."""

    @torch.no_grad()
    def calibrate(self, tapped: Iterable[Tapped], projection: Projection) -> dict[str, Tensor]:
        """See `TargetKind`: `anchors` [A, C], unit vectors in float32. Fewer views than anchors repeat."""
        found = normalize(torch.cat([each[self.taps[0]][0].cpu().double() for each in tapped]), dim=-1)
        repeats = math.ceil(self.config.anchors / len(found))
        return {"anchors": found.repeat(repeats, 1)[: self.config.anchors].float()}
