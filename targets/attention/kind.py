"""Attention logits as a target kind.

Source: the attention distillation of Wang et al., "A Closer Look at Self-Supervised Lightweight Vision Transformers"
(MAE-Lite), ICML 2023. The student's logits come from one more block's q and k (the decoupled form), or from an inner
block's own.

Shapes: B view, H teacher head, S student head, Q query row, T token, P prefix token, D head width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from tinymim.configs.codecs.relations import AttentionCodec
from tinymim.configs.errors import RecipeError
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
    WholeHead,
    Yardstick,
)
from tinymim.targets.counter import spread, uniforms
from tinymim.targets.picture import logit_shares, query_lines, written_out
from tinymim.targets.squares import square_statistics, square_yardstick, squared_error
from tinymim.targets.vectors import check_grid

_ROWS, _ROUNDING = 320, 321  # streams
_CODES = 255
_MARGIN = 1 + 2.0**-20  # keeps the largest logit within the codes, although `step` is rounded to fp32


@dataclass(frozen=True)
class AttentionTarget(Views):
    """Rows of the attention logits of B views."""

    rows: Int64[Tensor, "B Q"] | None  # the same in all heads; None: all T in order
    logits: Float[Tensor, "B H Q T"]
    square: Float[Tensor, " B"]  # mean square of the exact logits in these rows


class AttentionHead(WholeHead):
    """q and k of one more block on the student's final norm, and a bias-free 1x1 adapter to the teacher's heads.

    The answers are q and k, each [B, S, T, D], and the adapter [B, H, S], the same for every view. The adapter is
    there also where the numbers of heads are equal, because heads have no order. At an inner block, q and k are that
    block's own, joined to [B, T, 2C] (`TargetHead.inner`).

    Args:
        student: the student's shapes.
        heads: H.
        without_prefix: leave the prefix tokens out.
    """

    inner = "attention"

    def __init__(self, student: Shapes, heads: int, without_prefix: bool) -> None:
        super().__init__()
        self.heads, self.left_out = student.heads, student.prefix_tokens if without_prefix else 0
        self.projection = nn.Linear(student.width, 2 * student.width)
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)
        bound = 1 / math.sqrt(student.heads)  # as of a 1x1 convolution
        self.adapter = nn.Parameter(torch.empty(heads, student.heads).uniform_(-bound, bound))

    def forward(self, tokens: Float[Tensor, "B T C"]) -> Answers:
        """See `TargetHead`."""
        sides = self.projection(tokens[:, self.left_out :]).unflatten(-1, (2, self.heads, -1))
        q, k = sides.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, self.adapter.expand(len(tokens), -1, -1)


@dataclass(frozen=True)
class Attention(ChosenKind):
    """q k^T / sqrt(D) of one block before the softmax, without position biases, compared by squared error.

    - `rows`: some query rows, the same in all heads, in 8 bits. A row of one head is coded from its smallest logit up,
      as code = floor((x - low) / step + u) with u uniform, a function of the view key. With z = (x - low) / step,
      E[floor(z + u)] = z, so a decoded logit is right on average. Every row is as likely to be in the sample
      (`counter.spread`), and sample and rounding are independent. The gradient of (s - x)^2 by the student's logit s
      is 2 (s - x), linear in x. So the gradient is **unbiased**; the floor, the exact mean square, is stored.
    - `dense`: all rows in fp32, for audits. fp16 could not hold large logits.
    """

    config: AttentionCodec
    measure: ClassVar[str] = "distance"

    @property
    def meaning(self) -> tuple[object, ...]:
        """See `TargetKind`."""
        return ("attention", self.taps, self.config.prefix)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """See `TargetKind`."""
        return (Tap("attention", self.block),)

    def sides(self, tapped: Tapped) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H T D"]]:
        """q and k of the tokens that take part."""
        q, k, prefix = tapped[self.taps[0]]
        left_out = 0 if self.config.prefix else prefix.shape[2]
        return q[:, :, left_out:], k[:, :, left_out:]

    def count(self, shapes: Shapes) -> int:
        """T."""
        return shapes.tokens - (0 if self.config.prefix else shapes.prefix_tokens)

    # ---- records

    def draws(self, shapes: Shapes) -> bool:
        """See `TargetKind`."""
        return self.config.name == "rows"

    def specs(self, shapes: Shapes) -> tuple[ArraySpec, ...]:
        """See `TargetKind`: codes, their origin and step by head and row, and the mean square."""
        heads, tokens = shapes.heads, self.count(shapes)
        square = ArraySpec("square", "float32", ())
        if self.config.name == "dense":
            return (ArraySpec("logits", "float32", (heads, tokens, tokens)), square)
        rows = min(self.config.rows, tokens)
        lines = [ArraySpec(name, "float32", (heads, rows)) for name in ("low", "step")]
        return (ArraySpec("code", "uint8", (heads, rows, tokens)), *lines, square)

    @torch.no_grad()
    def encode(self, tapped: Tapped, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """See `TargetKind`."""
        q, k = self.sides(tapped)
        rows = self._sampled(view_keys, q.shape[2])
        logits = attention_logits(q, k, rows)
        square = logits.double().square().mean((1, 2, 3)).float()
        if self.config.name == "dense":
            return {"logits": logits.float(), "square": square}
        x = logits.double()
        low = x.amin(-1).float()
        # From the rounded origin, which a logit may be below by less than the margin covers.
        above = (x - low.double()[..., None]).clamp(min=0)
        step = (above.amax(-1) * (_MARGIN / _CODES)).float()
        exact = step.double()[..., None]
        z = torch.where(exact > 0, above / exact, 0.0)
        code = (z + uniforms(view_keys, _ROUNDING, tuple(x.shape[1:]))).floor().clamp(max=_CODES)
        return {"code": code.to(torch.uint8), "low": low, "step": step, "square": square}

    @torch.no_grad()
    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], shapes: Shapes) -> AttentionTarget:
        """See `TargetKind`."""
        if self.config.name == "dense":
            return AttentionTarget(None, arrays["logits"], arrays["square"])
        logits = arrays["low"][..., None] + arrays["code"].float() * arrays["step"][..., None]
        return AttentionTarget(self._sampled(view_keys, self.count(shapes)), logits, arrays["square"])

    @torch.no_grad()
    def exact(self, tapped: Tapped) -> AttentionTarget:
        """See `TargetKind`: float32 (float64 for float64 inputs) [B, H, T, T]."""
        logits = attention_logits(*self.sides(tapped), None)
        return AttentionTarget(None, logits, logits.square().mean((1, 2, 3)))

    def _sampled(self, view_keys: Tensor, tokens: int) -> Tensor | None:
        if self.config.name == "dense" or self.config.rows >= tokens:
            return None
        return spread(view_keys, _ROWS, (), tokens, self.config.rows)

    # ---- students

    def parts(self, shapes: Shapes) -> dict[str, int]:
        """See `TargetKind`: one part, because the adapter mixes heads."""
        return {"attention": 1}

    def head(self, student: Shapes, teacher: Shapes) -> TargetHead:
        """See `TargetKind`."""
        check_grid(student, teacher)
        if self.config.prefix and student.prefix_tokens != teacher.prefix_tokens:
            raise RecipeError(
                "the student has other prefix tokens (class token, registers) than the teacher",
                got=f"codec.prefix true, and {student.prefix_tokens} prefix tokens of the student",
                expected=teacher.prefix_tokens,
                hint="set codec.prefix: false, for the attention between patches",
            )
        return AttentionHead(student, teacher.heads, without_prefix=not self.config.prefix)

    def losses(self, answers: Answers, target: AttentionTarget) -> dict[str, Loss]:
        """See `TargetKind`: mean over heads, rows and tokens."""
        s = _answer(answers, target.rows)
        assert s.shape == target.logits.shape, f"student {s.shape}, teacher {target.logits.shape}"
        return {"attention": squared_error(s, target.logits, target.square)}

    # ---- audits

    def yardsticks(self, targets: Sequence[AttentionTarget]) -> dict[str, Yardstick]:
        """See `TargetKind`: the error of zeros, and of the mean over all other views."""
        return {"attention": square_yardstick([(each.logits, each.square) for each in targets])}

    def statistics(self, tapped: Tapped, target: AttentionTarget) -> dict[str, dict[str, Float[Tensor, "B 1"]]]:
        """See `TargetKind`: `rms` of the logits, and `relative_error`, the squared error over the mean square."""
        exact = attention_logits(*self.sides(tapped), target.rows).double()
        return {"attention": square_statistics(exact, target.logits)}

    # ---- pictures

    def answered(self, answers: Answers, shapes: Shapes) -> AttentionTarget:
        """See `TargetKind`."""
        logits = _answer(answers, None)
        return AttentionTarget(None, logits, logits.square().mean((1, 2, 3)))

    def picture(self, columns: Mapping[str, AttentionTarget], shapes: Shapes, lines: int) -> list[PictureLine]:
        """See `TargetKind`: the most selective query patches, each of another head."""

        def whole(target: AttentionTarget) -> Float[Tensor, "H T T"]:
            [logits] = target.logits
            rows = None if target.rows is None else target.rows[0].expand(len(logits), -1)
            return written_out(logits, rows, logits.shape[-1])

        maps = {"attention logits": {name: whole(each) for name, each in columns.items()}}
        prefix = shapes.prefix_tokens if self.config.prefix else 0
        return query_lines(maps, prefix, shapes.grid, lines, logit_shares)


def _answer(answers: Answers, rows: Int64[Tensor, "B Q"] | None) -> Float[Tensor, "B H Q T"]:
    """A student's logits in the teacher's heads."""
    q, k, adapter = answers
    own = attention_logits(q, k, rows)
    with torch.autocast(q.device.type, enabled=False):
        mixed: Tensor = torch.einsum("bhs,bsqt->bhqt", adapter.to(own.dtype), own)
    return mixed


def attention_logits(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B H T D"], rows: Int64[Tensor, "B Q"] | None
) -> Float[Tensor, "B H Q T"]:
    """q k^T / sqrt(D) of some query rows, or of all, in fp32 also under autocast (fp64 for fp64 inputs)."""
    if rows is not None:
        q = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        logits: Tensor = (q.to(dtype) / math.sqrt(q.shape[-1])) @ k.to(dtype).transpose(-2, -1)
    return logits
