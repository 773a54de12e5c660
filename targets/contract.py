"""The contract of every target kind: its tensors at a teacher's taps, its records, and the loss of a student.

Code outside a kind uses this contract only. A new kind is one folder in `targets/`, one config section and one line in
`targets/kinds.py`. `tests/targets/contract.py` is the test suite that every kind inherits. `docs/targets.md` has one
row for each kind.

Shapes: B view, P part of a loss (a head, or 1), T token, C width, N gradient coordinate.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.taps import Shapes, Tap

Tapped = Mapping[Tap, tuple[Tensor, ...]]  # a model's tensors at its taps; first axis views
Answers = tuple[Tensor, ...]  # a head's outputs for a student's tokens; first axis views
Target = Any  # decoded records of B views; opaque outside its kind
# Weight [W, C] and bias [W] of the linear layer behind a tap's tensors. Raises RecipeError where there is none.
Projection = Callable[[Tap], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class ArraySpec:
    """One stored array: name ("qk_tail_gap"), numpy dtype name, shape of one record."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of one record's array before compression."""
        return math.prod(self.shape) * int(getattr(torch, self.dtype).itemsize)


class Loss(NamedTuple):
    """One named loss of B views.

    Attributes:
        parts: float [B, P]; only these have a gradient. Their gradient is linear in the target unless the kind says
            that it is biased (`TargetKind.unbiased`).
        floor: float [B] or [B, P], the share that depends on the target alone: a cross entropy minus its floor is a KL,
            and |answer|^2 - 2 answer x target minus its floor, -|target|^2, is a squared error.
    """

    parts: Float[Tensor, "B P"]
    floor: Tensor

    def mean(self) -> Float[Tensor, ""]:
        """Mean over views and parts."""
        return self.parts.mean() - self.floor.mean()

    def per_part(self) -> Float[Tensor, "B P"]:
        """Loss of each view and part, less the floor."""
        return self.parts - (self.floor if self.floor.ndim == 2 else self.floor[:, None])


class Labels(NamedTuple):
    """The labels of B views: a `share` of class `first`, the rest of class `second`, as of a mixed pair of images."""

    first: Int64[Tensor, " B"]
    second: Int64[Tensor, " B"]
    share: Float[Tensor, " B"]

    @classmethod
    def hard(cls, labels: Int64[Tensor, " B"]) -> "Labels":
        """The labels of whole images."""
        return cls(labels, labels, torch.ones_like(labels, dtype=torch.float32))


class Yardstick(NamedTuple):
    """Losses of two imagined students, means over views; they depend on the teacher alone.

    Attributes:
        even: loss of a student that has learnt nothing.
        common: loss of a student that answers every view with the mean of all other views.
    """

    even: float
    common: float


class PictureLine(NamedTuple):
    """One line of a target's picture: the same place of a view, in every column.

    Attributes:
        title: names the place, such as "head 3".
        query: (row, column) of the patch on the grid that the line is about; None for the whole view.
        panels: by the title of a group and by column ("teacher", a student's name), a map [rows, columns], colours
            [rows, columns, 3] from 0 to 1, or bars [N]. What a record does not hold is nan.
        own_scale: columns of random draws, whose size cannot be compared with that of exact values.
        labels: names of the bars.
    """

    title: str
    query: tuple[int, int] | None
    panels: dict[str, dict[str, Tensor]]
    own_scale: frozenset[str] = frozenset()
    labels: tuple[str, ...] = ()


class TargetHead(nn.Module, ABC):
    """A student's final tokens to answers. It is trained with the student and dropped at export, but for `kept`.

    Attributes:
        inner: what it reads of a student's inner block, as a kind of tap: its tokens, or its own q, k (and v), which
            then stand in the place of what `projection` makes of tokens.
        projection: the first layer of a head whose `inner` is not "tokens".
    """

    inner: ClassVar[str] = "tokens"
    projection: nn.Module

    def at_block(self, block: int) -> Tap:
        """Read a block of the student, counted from 1, instead of the final tokens. Returns the student's own tap."""
        if self.inner != "tokens":
            self.projection = nn.Identity()
        return Tap(self.inner, block)

    @abstractmethod
    def forward(self, tokens: Float[Tensor, "B T C"]) -> Answers:
        """The answers, which the kind's `losses` compares with a target."""

    @abstractmethod
    def by_part(
        self, tokens: Float[Tensor, "1 T C"], gradients: Sequence[Tensor | None], parts: int
    ) -> Float[Tensor, "P N"]:
        """Gradient of each part of a loss with respect to the head's own weights for that part.

        Args:
            tokens: the tokens of one view, as given to `forward`.
            gradients: the loss's gradient with respect to each answer; None where the loss does not depend on it.
            parts: P.
        """

    def kept(self) -> dict[str, Tensor]:
        """The tensors that are exported beside the student, by name."""
        return {}


class WholeHead(TargetHead):
    """A head whose losses have one part, on all its weights."""

    def by_part(
        self, tokens: Float[Tensor, "1 T C"], gradients: Sequence[Tensor | None], parts: int
    ) -> Float[Tensor, "1 N"]:
        """See `TargetHead`: the gradient of all weight matrices."""
        assert parts == 1, f"{parts} parts of a loss that has one"
        with torch.enable_grad():
            answers = self(tokens)
        used = [(answer, grad) for answer, grad in zip(answers, gradients, strict=True) if grad is not None]
        weights = [parameter for parameter in self.parameters() if parameter.ndim > 1]
        found = torch.autograd.grad([a for a, _ in used], weights, [g.to(a.dtype) for a, g in used])
        return torch.cat([grad.flatten() for grad in found])[None]


class StudentTarget(Protocol):
    """The members of a target kind that training uses."""

    measure: ClassVar[str]

    @property
    def taps(self) -> tuple[Tap, ...]:
        """See `TargetKind`."""

    def head(self, student: Shapes, teacher: Shapes) -> nn.Module:
        """See `TargetKind`."""

    def losses(self, answers: Answers, target: Target) -> dict[str, Loss]:
        """See `TargetKind`."""


class TargetKind(ABC):
    """One kind of target under one codec.

    Attributes:
        name, version: name and version of the codec; they fix its arrays, their meaning and their randomness.
        measure: prefix of the losses' metric names, such as "kl".
    """

    name: ClassVar[str]
    version: ClassVar[int]
    measure: ClassVar[str]

    @property
    def unbiased(self) -> bool:
        """Whether a student's gradient, as a mean over view keys, is that of the exact target."""
        return True

    @property
    def whole(self) -> bool:
        """Whether a decoded target is complete, as audits of students need it."""
        return False

    @property
    @abstractmethod
    def meaning(self) -> tuple[object, ...]:
        """What the target is, whatever the codec: records of one meaning can audit students of the other."""

    @property
    @abstractmethod
    def taps(self) -> tuple[Tap, ...]:
        """The taps that the kind reads."""

    @abstractmethod
    def draws(self, shapes: Shapes) -> bool:
        """Whether a decoded target depends on the view key."""

    # ---- records

    @abstractmethod
    def specs(self, shapes: Shapes) -> tuple[ArraySpec, ...]:
        """The arrays of a record, in stored order, for a teacher of these shapes.

        Raises:
            RecipeError: the codec cannot store this teacher's target.
        """

    @abstractmethod
    def encode(self, tapped: Tapped, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """The arrays of B records by name, each [B, *spec.shape] in spec.dtype, on the device of both arguments.

        A record depends on its own view and view key, not on the batch around it. `tapped` must be finite.

        Raises:
            RecipeError: as `specs`.
        """

    @abstractmethod
    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], shapes: Shapes) -> Target:
        """The target of B records; `arrays` as `encode` returns them, on the device of `view_keys`."""

    @abstractmethod
    def exact(self, tapped: Tapped) -> Target:
        """The dense target, for audits and for training with the teacher in the loop."""

    @abstractmethod
    def pick(self, target: Target, some: slice, device: torch.device | None = None) -> Target:
        """The target of some views, moved to `device` where one is given."""

    # ---- students

    @abstractmethod
    def parts(self, shapes: Shapes) -> dict[str, int]:
        """The number P of parts of each loss, by name. A student's width must be a multiple of each."""

    @abstractmethod
    def head(self, student: Shapes, teacher: Shapes) -> TargetHead:
        """A new head for a student.

        Raises:
            RecipeError: the student does not fit the teacher.
        """

    @abstractmethod
    def losses(self, answers: Answers, target: Target) -> dict[str, Loss]:
        """The losses by name, in fp32 (fp64 for fp64 answers). The training loss is the sum of their means."""

    @property
    def label_classes(self) -> int:
        """The number of classes, where `label_losses` compares a student with labels; else 0."""
        return 0

    def label_losses(self, answers: Answers, labels: Labels) -> dict[str, Loss]:
        """Further losses, which compare a student with the labels of its images instead of the teacher's target."""
        return {}

    def hits(self, tapped: Tapped, labels: Int64[Tensor, " B"]) -> Float[Tensor, " B"] | None:
        """1 where the teacher's first class is the label, 0 where not, nan without a label; None: no classes."""
        return None

    # ---- audits

    @abstractmethod
    def yardsticks(self, targets: Sequence[Target]) -> dict[str, Yardstick]:
        """Reference values of each loss, for audits. The targets are whole, and hold at least two views together."""

    @abstractmethod
    def statistics(self, tapped: Tapped, target: Target) -> dict[str, dict[str, Float[Tensor, "B P"]]]:
        """Named numbers of each loss that need no student, such as the entropy of the teacher's rows."""

    # ---- pictures

    @abstractmethod
    def answered(self, answers: Answers, shapes: Shapes) -> Target:
        """A student's answers as a whole target, in the form that `exact` gives for a teacher of these shapes."""

    @abstractmethod
    def picture(self, columns: Mapping[str, Target], shapes: Shapes, lines: int) -> list[PictureLine]:
        """The picture of one view.

        Args:
            columns: targets of the same view by the title of their column, as `decode`, `exact` and `answered` return
                them; an exact one comes before others.
            shapes: the teacher's shapes.
            lines: most lines, where the picture is of some patches.
        """

    # ---- constants, which some codecs need

    @property
    def calibration_views(self) -> int:
        """Number of views that the codec's constants are computed from; 0 where it has no constants."""
        return 0

    def check_teacher(self, tapped: Tapped, projection: Projection) -> None:
        """Raises RecipeError where the codec cannot encode this teacher; `tapped` may be any view."""
        assert not self.calibration_views, "a codec with constants checks its teacher"

    def calibrate(self, tapped: Iterable[Tapped], projection: Projection) -> dict[str, Tensor]:
        """The constants of a cache, on the CPU, from batches of the teacher's tensors for the calibration views."""
        return {}


@dataclass(frozen=True)
class Views:
    """Base of decoded targets: a dataclass of tensors, first axis views, some of which may be None."""

    def pick(self, some: slice, device: torch.device | None = None) -> Self:
        """The target of some views, moved to `device` where one is given."""
        held = {own.name: getattr(self, own.name) for own in fields(self)}
        picked = {name: value[some] for name, value in held.items() if value is not None}
        return replace(self, **{n: v if device is None else v.to(device) for n, v in picked.items()})


@dataclass(frozen=True)
class ChosenKind(TargetKind):
    """A kind that follows two sections of a recipe: `codec`, and `targets` for a student's losses and head.

    Attributes:
        config: the codec section.
        targets: the targets section.
        block: the tapped block of the teacher, counted from 1.
        constants: the codec's constants, on the device of the records; empty for codecs without any.
    """

    config: Any
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    block: int = 1
    constants: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    version: ClassVar[int] = 1

    @property
    def name(self) -> str:  # type: ignore[override]  # of the config
        """See `TargetKind`."""
        return str(self.config.name)

    @property
    def whole(self) -> bool:
        """See `TargetKind`."""
        return self.name == "dense"

    def pick(self, target: Any, some: slice, device: torch.device | None = None) -> Target:
        """See `TargetKind`; the target is a `Views`."""
        return target.pick(some, device)
