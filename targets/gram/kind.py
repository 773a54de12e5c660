"""The Gram matrix of patch tokens as a target kind: which patches of a view look alike, as plain cosines.

Source: the Gram loss of Siméoni et al., "DINOv3", 2025, |G_s - G_t|^2 of unit tokens.

Shapes: B view, N patch, Q query row, K column, C width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from tinymim.configs.codecs.relations import GramCodec
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets.contract import (
    Answers,
    ArraySpec,
    ChosenKind,
    Loss,
    PictureLine,
    Tapped,
    TargetHead,
    Views,
    Yardstick,
)
from tinymim.targets.counter import spread, uniforms
from tinymim.targets.features.kind import token_tap
from tinymim.targets.picture import logit_shares, query_lines, written_out
from tinymim.targets.squares import square_statistics, square_yardstick, squared_error
from tinymim.targets.vectors import LEAST_NORM, Projector, check_grid, rows_of

_ROWS, _COLUMNS, _ROUNDING = 336, 337, 338  # streams
_SHARPNESS = 0.07  # temperature at which the picture's patches are chosen
_STEP = 2 / 254  # codes 0..254 are -1..1; the last one takes what rounding lifts above


@dataclass(frozen=True)
class GramTarget(Views):
    """Entries of the Gram matrices of B views."""

    rows: Int64[Tensor, "B Q"] | None  # None, as for columns: all N in order
    columns: Int64[Tensor, "B K"] | None
    cosines: Float[Tensor, "B Q K"]
    square: Float[Tensor, " B"]  # mean square of the exact entries


@dataclass(frozen=True)
class Gram(ChosenKind):
    """Cosines of patch tokens, compared by squared error. The student answers with a projector to the teacher's width.

    - `entries`: some rows times some columns, a byte each. A cosine is rounded at random between two steps of 1/127, so
      it is right on average. Rows and columns are drawn apart, each as likely as any other (`counter.spread`), so every
      entry is as likely to be in the sample. Sample and rounding are independent. The gradient of (s - g)^2 by the
      student's cosine s is 2 (s - g), linear in g. So the gradient is **unbiased**; the floor is stored.
    - `dense`: all entries in fp16, for audits.
    """

    config: GramCodec
    measure: ClassVar[str] = "distance"

    @property
    def meaning(self) -> tuple[object, ...]:
        """See `TargetKind`."""
        return ("gram", self.taps)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """See `TargetKind`."""
        return (token_tap(self.config.at, self.block),)

    def _exact(self, tapped: Tapped, target: "GramTarget | None" = None) -> Float[Tensor, "B Q K"]:
        """The teacher's cosines, of a target's entries or all; float64."""
        tokens, prefix = tapped[self.taps[0]]
        rows, columns = (None, None) if target is None else (target.rows, target.columns)
        return gram(tokens[:, prefix.shape[1] :].double(), rows, columns)

    # ---- records

    def draws(self, shapes: Shapes) -> bool:
        """See `TargetKind`."""
        return self.config.name == "entries"

    def specs(self, shapes: Shapes) -> tuple[ArraySpec, ...]:
        """See `TargetKind`: the entries, and their mean square."""
        count = shapes.tokens - shapes.prefix_tokens
        square = ArraySpec("square", "float32", ())
        if self.config.name == "dense":
            return (ArraySpec("cosines", "float16", (count, count)), square)
        sizes = (min(self.config.rows, count), min(self.config.columns, count))
        return (ArraySpec("code", "uint8", sizes), square)

    @torch.no_grad()
    def encode(self, tapped: Tapped, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """See `TargetKind`."""
        tokens, prefix = tapped[self.taps[0]]
        sampled = self._sampled(view_keys, tokens.shape[1] - prefix.shape[1])
        exact = gram(tokens[:, prefix.shape[1] :].double(), *sampled)
        square = exact.square().mean((1, 2)).float()
        if self.config.name == "dense":
            return {"cosines": exact.half(), "square": square}
        uniform = uniforms(view_keys, _ROUNDING, tuple(exact.shape[1:]))
        return {"code": ((exact + 1) / _STEP + uniform).floor().clamp(0, 255).to(torch.uint8), "square": square}

    @torch.no_grad()
    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], shapes: Shapes) -> GramTarget:
        """See `TargetKind`."""
        sampled = self._sampled(view_keys, shapes.tokens - shapes.prefix_tokens)
        if self.config.name == "dense":
            return GramTarget(*sampled, arrays["cosines"].float(), arrays["square"])
        return GramTarget(*sampled, arrays["code"].float() * _STEP - 1, arrays["square"])

    @torch.no_grad()
    def exact(self, tapped: Tapped) -> GramTarget:
        """See `TargetKind`: float32 (float64 for float64 inputs) [B, N, N]."""
        cosines = self._exact(tapped)
        dtype = torch.promote_types(tapped[self.taps[0]][0].dtype, torch.float32)
        return GramTarget(None, None, cosines.to(dtype), cosines.square().mean((1, 2)).to(dtype))

    def _sampled(self, view_keys: Tensor, count: int) -> tuple[Tensor | None, Tensor | None]:
        if self.config.name == "dense":
            return None, None
        sizes = ((_ROWS, self.config.rows), (_COLUMNS, self.config.columns))
        rows, columns = (None if size >= count else spread(view_keys, s, (), count, size) for s, size in sizes)
        return rows, columns

    # ---- students

    def parts(self, shapes: Shapes) -> dict[str, int]:
        """See `TargetKind`."""
        return {"gram": 1}

    def head(self, student: Shapes, teacher: Shapes) -> TargetHead:
        """See `TargetKind`."""
        check_grid(student, teacher)
        return Projector(student, teacher.width, self.targets, patches=True)

    def losses(self, answers: Answers, target: GramTarget) -> dict[str, Loss]:
        """See `TargetKind`: mean over entries."""
        [tokens] = answers
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            s = gram(tokens.to(dtype), target.rows, target.columns, LEAST_NORM)
        assert s.shape == target.cosines.shape, f"student {s.shape}, teacher {target.cosines.shape}"
        return {"gram": squared_error(s, target.cosines, target.square)}

    # ---- audits

    def yardsticks(self, targets: Sequence[GramTarget]) -> dict[str, Yardstick]:
        """See `TargetKind`: the error of zeros, and of the mean over all other views."""
        return {"gram": square_yardstick([(each.cosines, each.square) for each in targets])}

    def statistics(self, tapped: Tapped, target: GramTarget) -> dict[str, dict[str, Float[Tensor, "B 1"]]]:
        """See `TargetKind`: `rms` of the cosines, and `relative_error`, the squared error over the mean square."""
        exact = self._exact(tapped, target)
        return {"gram": square_statistics(exact, target.cosines)}

    # ---- pictures

    def answered(self, answers: Answers, shapes: Shapes) -> GramTarget:
        """See `TargetKind`."""
        cosines = gram(answers[0].float(), None, None, LEAST_NORM)
        return GramTarget(None, None, cosines, cosines.square().mean((1, 2)))

    def picture(self, columns: Mapping[str, GramTarget], shapes: Shapes, lines: int) -> list[PictureLine]:
        """See `TargetKind`: the most selective patches."""
        count = shapes.tokens - shapes.prefix_tokens

        def whole(target: GramTarget) -> Float[Tensor, "1 N N"]:
            in_columns = written_out(target.cosines.mT, target.columns, count).mT
            return written_out(in_columns, target.rows, count)

        maps = {"cosine with this patch": {name: whole(each) for name, each in columns.items()}}
        return query_lines(maps, 0, shapes.grid, lines, lambda rows: logit_shares(rows, _SHARPNESS))


def gram(
    tokens: Float[Tensor, "B N C"],
    rows: Int64[Tensor, "B Q"] | None,
    columns: Int64[Tensor, "B K"] | None,
    least_norm: float = 1e-12,
) -> Float[Tensor, "B Q K"]:
    """Cosines of some tokens with some others, or of all with all."""
    unit = normalize(tokens, dim=-1, eps=least_norm)
    left, right = (unit if index is None else rows_of(unit, index) for index in (rows, columns))
    return left @ right.mT
