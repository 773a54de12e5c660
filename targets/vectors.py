"""What the kinds of vectors share: normalised targets, few-bit codes, losses, and a projector on the student's tokens.

Shapes: B view, N vector of a view, Q sampled vector, C width, P calibration vector.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast, get_args

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.nn.functional import l1_loss, normalize, smooth_l1_loss

from tinymim.configs.codecs.targets import TargetsConfig, VectorLoss
from tinymim.configs.codecs.vectors import ClsCodec, FeaturesCodec
from tinymim.configs.errors import RecipeError
from tinymim.configs.taps import Shapes
from tinymim.targets.contract import (
    Answers,
    ArraySpec,
    ChosenKind,
    Loss,
    PictureLine,
    Projection,
    Tapped,
    Views,
    WholeHead,
    Yardstick,
)
from tinymim.targets.counter import spread, uniforms
from tinymim.targets.dither import Dither
from tinymim.targets.picture import bar_line, colour_line, written_out
from tinymim.targets.record import refuse_loss
from tinymim.targets.squares import square_statistics

_EPS = 1e-6  # of LayerNorm
LEAST_NORM = 1e-3  # of a student's vector: below it the gradient of the cosine stays finite, also in fp16
_SHRINK = 1e-3  # share of the mean variance that whitening adds to every direction
_SAMPLE, _ROUNDING = 0, 1  # streams, from `Vectors.streams` on


@dataclass(frozen=True)
class VectorTarget(Views):
    """The vectors of B views."""

    index: Int64[Tensor, "B Q"] | None  # which of the N vectors; None: all in order
    value: Float[Tensor, "B Q C"]
    length: Float[Tensor, "B Q"]  # of the exact vectors


class Projector(WholeHead):
    """A student's vectors in the teacher's width.

    Args:
        student: the student's shapes.
        width: the teacher's width.
        targets: whether there are two linear layers with a GELU between them, or one; whether it is exported.
        patches: answer for every patch token; else for the first prefix token (the class token), or the mean over
            patches where there is no prefix.
    """

    def __init__(self, student: Shapes, width: int, targets: TargetsConfig, patches: bool) -> None:
        super().__init__()
        self.prefix, self.patches, self.exported = student.prefix_tokens, patches, targets.keep_projector
        layers: list[nn.Module] = [nn.Linear(student.width, width)]
        if targets.projector == "mlp":
            layers += [nn.GELU(), nn.Linear(width, width)]
        self.projection = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Float[Tensor, "B T C"]) -> Answers:
        """See `TargetHead`: float [B, N, C]."""
        return (self.projection(tokens[:, self.prefix :] if self.patches else embedding(tokens, self.prefix)),)

    def kept(self) -> dict[str, Tensor]:
        """See `TargetHead`: weights and biases of the layers, by their number in a `nn.Sequential`."""
        return self.projection.state_dict() if self.exported else {}


def embedding(tokens: Float[Tensor, "B T C"], prefix: int) -> Float[Tensor, "B 1 C"]:
    """A student's class token, which is the first of its prefix, or the mean over patches where it has no prefix."""
    return tokens[:, :1] if prefix else tokens.mean(1, keepdim=True)


@dataclass(frozen=True)
class Vectors(ChosenKind):
    """Vectors of a teacher, stored by `targets/dither.py`, and compared by squared error, cosine or smooth L1.

    The target is the teacher's vector as it is (`raw`), after a LayerNorm without weights (`layernorm`), or whitened
    by mean and covariance of the calibration views (`whiten`).

    **Unbiased** with `mse` and `cosine`. With d the decoded vector, E[d] = t (`targets/dither.py`), every vector is as
    likely to be in the sample (`counter.spread`), and sample and rounding are independent. The gradient of |s - d|^2
    by the student's vector s is 2 (s - d), and that of -cos = -s d / (|s| |t|) divides by the exact length |t|,
    which is stored. Both are linear in d, so their means are those of the exact target. The floors are -|t|^2 and -1.

    **Biased** with `smooth_l1`: its gradient, min(max(s - d, -1), 1), is not linear in d, so the mean over d is that
    of a smoother loss, the convolution of smooth L1 with the distribution of the rounding error. With `int8` that
    error is below 1/255 of a vector's largest component, and the bias as small. So is `l1`, whose gradient is the sign
    of s - d.
    """

    config: FeaturesCodec | ClsCodec
    measure: ClassVar[str] = "distance"
    loss_name: ClassVar[str]
    streams: ClassVar[int]
    default_loss: ClassVar[VectorLoss] = "mse"

    def __post_init__(self) -> None:
        """Raises RecipeError for a loss of relations."""
        refuse_loss(self.targets, get_args(VectorLoss), self.loss_name)

    @abstractmethod
    def vectors(self, tapped: Tapped) -> Float[Tensor, "B N C"]:
        """The teacher's vectors."""

    @abstractmethod
    def count(self, shapes: Shapes) -> int:
        """N."""

    @property
    @abstractmethod
    def sampled(self) -> int | None:
        """Number of vectors in a record, where there are more; None for all."""

    @property
    def loss(self) -> VectorLoss:
        """The loss of the student."""
        return cast(VectorLoss, self.targets.loss or self.default_loss)  # by `refuse_loss`

    @property
    def unbiased(self) -> bool:
        """See `TargetKind`."""
        return self.loss in ("mse", "cosine")

    @property
    def whole(self) -> bool:
        """See `TargetKind`."""
        return self.config.name == "int8" and self.sampled is None

    @property
    def meaning(self) -> tuple[object, ...]:
        """See `TargetKind`."""
        whitened_by = self.config.calibration_views if self.config.target == "whiten" else 0
        return (self.loss_name, self.taps, self.config.target, whitened_by)

    # ---- records

    def draws(self, shapes: Shapes) -> bool:
        """See `TargetKind`: rounding is random."""
        return True

    def specs(self, shapes: Shapes) -> tuple[ArraySpec, ...]:
        """See `TargetKind`: packed codes, their step, and the exact length, of every sampled vector."""
        count = min(self.sampled or self.count(shapes), self.count(shapes))
        return (
            ArraySpec("code", "uint8", (count, self._dither(shapes.width).num_bytes)),
            ArraySpec("step", "float32", (count,)),
            ArraySpec("length", "float32", (count,)),
        )

    @torch.no_grad()
    def encode(self, tapped: Tapped, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """See `TargetKind`."""
        vectors = self.vectors(tapped)
        _, count, width = vectors.shape
        index = self._index(view_keys, count)
        exact = self._target(vectors if index is None else rows_of(vectors, index), torch.float64)
        code, step = self._dither(width).encode(exact, self._uniform(view_keys, *exact.shape[1:]))
        return {"code": code, "step": step, "length": _length(exact).float()}

    @torch.no_grad()
    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], shapes: Shapes) -> VectorTarget:
        """See `TargetKind`."""
        dither, count = self._dither(shapes.width), arrays["step"].shape[1]
        uniform = self._uniform(view_keys, count, shapes.width) if dither.rotated else None
        value = dither.decode(arrays["code"], arrays["step"], uniform)
        return VectorTarget(self._index(view_keys, self.count(shapes)), value, arrays["length"])

    @torch.no_grad()
    def exact(self, tapped: Tapped) -> VectorTarget:
        """See `TargetKind`: float32 (float64 for float64 inputs) [B, N, C]."""
        vectors = self.vectors(tapped)
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        value = self._target(vectors, dtype)
        return VectorTarget(None, value, _length(value))

    def _dither(self, width: int) -> Dither:
        return Dither(width, self.config.bits, rotated=self.config.name == "dither")

    def _index(self, view_keys: Tensor, count: int) -> Tensor | None:
        if self.sampled is None or self.sampled >= count:
            return None
        return spread(view_keys, self.streams + _SAMPLE, (), count, self.sampled)

    def _uniform(self, view_keys: Tensor, count: int, width: int) -> Tensor:
        return uniforms(view_keys, self.streams + _ROUNDING, (count, width))

    def _target(self, vectors: Float[Tensor, "B N C"], dtype: torch.dtype) -> Float[Tensor, "B N C"]:
        x = vectors.to(dtype)
        if self.config.target == "raw":
            return x
        if self.config.target == "whiten":
            assert self.constants, "whitening needs constants"
            return (x - self.constants["mean"].to(dtype)) @ self.constants["whiten"].to(dtype)
        centred = x - x.mean(-1, keepdim=True)
        # Scaled first: the square of a large fp32 number may be infinite. Constant vectors become zero.
        size = centred.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        scaled = centred / size
        normed: Tensor = scaled / (scaled.square().mean(-1, keepdim=True) + (_EPS**0.5 / size) ** 2).sqrt()
        return normed

    # ---- students

    def parts(self, shapes: Shapes) -> dict[str, int]:
        """See `TargetKind`."""
        return {self.loss_name: 1}

    def losses(self, answers: Answers, target: VectorTarget) -> dict[str, Loss]:
        """See `TargetKind`: means over vectors, and over components but for the cosine."""
        [student] = answers
        dtype = torch.promote_types(student.dtype, torch.float32)
        with torch.autocast(student.device.type, enabled=False):
            s = student.to(dtype) if target.index is None else rows_of(student.to(dtype), target.index)
            t, length = target.value.to(dtype), target.length.to(dtype)
            assert s.shape == t.shape, f"student {s.shape}, teacher {t.shape}"
            if self.loss == "cosine":
                unit = t / length.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
                parts = -(normalize(s, dim=-1, eps=LEAST_NORM) * unit).sum(-1).mean(1, keepdim=True)
                floor = -torch.ones_like(parts[:, 0])
            elif self.loss == "mse":
                parts = (s * (s - 2 * t)).mean((1, 2))[:, None]
                floor = -length.square().mean(1) / t.shape[-1]
            else:
                distance = l1_loss if self.loss == "l1" else smooth_l1_loss
                parts = distance(s, t, reduction="none").mean((1, 2))[:, None]
                floor = torch.zeros_like(parts[:, 0])
        return {self.loss_name: Loss(parts, floor)}

    # ---- audits

    def yardsticks(self, targets: Sequence[VectorTarget]) -> dict[str, Yardstick]:
        """See `TargetKind`: the loss of zeros, and of the mean over all other views."""
        count = sum(len(each.value) for each in targets)
        total = torch.stack([each.value.sum(0, dtype=torch.float64) for each in targets]).sum(0)
        even = common = 0.0
        for each in targets:
            others = (total - each.value) / (count - 1)
            even += float(self.losses((torch.zeros_like(others),), each)[self.loss_name].mean()) * len(others)
            common += float(self.losses((others,), each)[self.loss_name].mean()) * len(others)
        return {self.loss_name: Yardstick(even / count, common / count)}

    def statistics(self, tapped: Tapped, target: VectorTarget) -> dict[str, dict[str, Float[Tensor, "B 1"]]]:
        """See `TargetKind`: `rms` of the components, and `relative_error`, the squared error over the squared norm."""
        vectors = self.vectors(tapped)
        exact = self._target(vectors if target.index is None else rows_of(vectors, target.index), torch.float64)
        return {self.loss_name: square_statistics(exact, target.value)}

    # ---- pictures

    def answered(self, answers: Answers, shapes: Shapes) -> VectorTarget:
        """See `TargetKind`."""
        value = answers[0].float()
        return VectorTarget(None, value, _length(value))

    def picture(self, columns: Mapping[str, VectorTarget], shapes: Shapes, lines: int) -> list[PictureLine]:
        """See `TargetKind`: the patches as colours, or the only vector as bars."""
        count, cosine = self.count(shapes), self.loss == "cosine"
        vectors = {
            name: written_out(each.value[0], None if each.index is None else each.index[0], count)
            for name, each in columns.items()
        }
        if count > 1:
            return [colour_line("vectors of the patches", vectors, shapes, unit=cosine)]
        bars = {name: (normalize(each, dim=-1) if cosine else each)[0] for name, each in vectors.items()}
        return [bar_line("the vector" + (", at length 1" if cosine else ""), bars)]

    # ---- constants

    @property
    def calibration_views(self) -> int:
        """See `TargetKind`."""
        return self.config.calibration_views if self.config.target == "whiten" else 0

    def check_teacher(self, tapped: Tapped, projection: Projection) -> None:
        """See `TargetKind`: every teacher's vectors can be whitened."""

    @torch.no_grad()
    def calibrate(self, tapped: Iterable[Tapped], projection: Projection) -> dict[str, Tensor]:
        """See `TargetKind`: the constants of whitening."""
        if not self.calibration_views:
            return {}
        return self._whitening(torch.cat([self.vectors(each).cpu().double().flatten(0, 1) for each in tapped]))

    @staticmethod
    def _whitening(vectors: Float64[Tensor, "P C"]) -> dict[str, Tensor]:
        """`mean` [C] and `whiten` [C, C], the inverse root of the covariance, float32.

        Every direction's variance is raised by 0.001 of the mean variance, so that directions without any stay finite.
        """
        variance, axes = torch.linalg.eigh(torch.cov(vectors.T))
        variance = variance.clamp(min=0)
        raised = (variance + _SHRINK * variance.mean()).clamp(min=torch.finfo(torch.float32).tiny)
        return {"mean": vectors.mean(0).float(), "whiten": (axes * raised.rsqrt() @ axes.T).float()}


def check_visible(student: Shapes, teacher: Shapes) -> None:
    """Raises RecipeError where of two models of one grid only one is masked, or both see other numbers of patches."""
    masked = student.masked or teacher.masked
    if masked and (student.grid, student.visible) != (teacher.grid, teacher.visible):
        seen = (f"{each.visible} of {each.grid[0]} x {each.grid[1]} patches" for each in (student, teacher))
        raise RecipeError(
            "the student does not see the patches that the teacher saw",
            got=f"a student of {next(seen)}",
            expected=f"{next(seen)}, as the mask of the layer has them",
            hint="leave `mask` out for the layer's own, or set mask.hide: token for a student of whole views",
        )


def check_grid(student: Shapes, teacher: Shapes) -> None:
    """Raises RecipeError where a student has another grid of patches than the teacher."""
    check_visible(student, teacher)
    if student.grid != teacher.grid:
        raise RecipeError(
            "the student's patches are not the teacher's",
            got=f"student.img_size and student.patch_size that give a grid of {student.grid[0]} x {student.grid[1]}",
            expected=f"{teacher.grid[0]} x {teacher.grid[1]}, a whole multiple or a whole part of it",
        )


def rows_of(vectors: Float[Tensor, "B N C"], index: Int64[Tensor, "B Q"]) -> Float[Tensor, "B Q C"]:
    """The vectors of these numbers."""
    return vectors.gather(1, index[..., None].expand(-1, -1, vectors.shape[-1]))


def _length(vectors: Float[Tensor, "B N C"]) -> Float[Tensor, "B N"]:
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return length
