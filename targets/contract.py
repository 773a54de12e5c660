"""The contract of every target kind: what a teacher says about a view, how it is stored, and how a student learns it.

Code outside a kind uses this contract only. A new kind is one folder in `targets/`, one config section and one line in
`targets/kinds.py`. `tests/targets/contract.py` is the test suite that every kind inherits.

Shapes: B view, P part of a loss (a head, or 1), T token, C width, N gradient coordinate.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from tinymim.configs.taps import Shapes, Tap

Tapped = Mapping[Tap, tuple[Tensor, ...]]  # what a model gave at its taps; first axis views
Answers = tuple[Tensor, ...]  # what a head makes of a student's tokens; first axis views
Target = Any  # decoded records of B views; opaque outside its kind
# Weight [W, C] and bias [W] of the linear layer that made a tap's tensors. Raises RecipeError where there is none.
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
        parts: float [B, P], linear in the target; only these have a gradient.
        floor: float [B] or [B, P], what the target alone adds: a cross entropy minus its floor is a KL.
    """

    parts: Float[Tensor, "B P"]
    floor: Tensor

    def mean(self) -> Float[Tensor, ""]:
        """Mean over views and parts."""
        return self.parts.mean() - self.floor.mean()

    def per_part(self) -> Float[Tensor, "B P"]:
        """Each view and part."""
        return self.parts - (self.floor if self.floor.ndim == 2 else self.floor[:, None])


class Yardstick(NamedTuple):
    """Losses that depend on the teacher alone, means over views.

    Attributes:
        even: of a student that knows nothing.
        common: of a student that knows what all other views have in common, and nothing of its own view.
    """

    even: float
    common: float


class TargetHead(nn.Module, ABC):
    """Trained beside the student and dropped at export: the student's final tokens to answers."""

    @abstractmethod
    def forward(self, tokens: Float[Tensor, "B T C"]) -> Answers:
        """Answers that the kind's `losses` compares with a target."""

    @abstractmethod
    def by_part(
        self, tokens: Float[Tensor, "1 T C"], gradients: Sequence[Tensor | None], parts: int
    ) -> Float[Tensor, "P N"]:
        """Gradient of each part of a loss with respect to the head's own weights for that part.

        Args:
            tokens: of one view, as given to `forward`.
            gradients: of the loss with respect to each answer, None where it does not depend on it.
            parts: P.
        """


class StudentTarget(Protocol):
    """What training needs of a target kind."""

    measure: ClassVar[str]

    def head(self, student: Shapes, teacher: Shapes) -> nn.Module:
        """See `TargetKind`."""

    def losses(self, answers: Answers, target: Target) -> dict[str, Loss]:
        """See `TargetKind`."""


class TargetKind(ABC):
    """One kind of target under one codec.

    Attributes:
        name, version: the codec's; they fix its arrays, their meaning and the randomness behind them.
        measure: prefix of the losses' metric names, such as "kl".
        unbiased: the expected target, over view keys, is the exact one.
        whole: a decoded target is a whole one, which audits of students need.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    measure: ClassVar[str]
    unbiased: ClassVar[bool] = True
    whole: ClassVar[bool] = False

    @property
    @abstractmethod
    def taps(self) -> tuple[Tap, ...]:
        """What the teacher must give."""

    def draws(self, shapes: Shapes) -> bool:
        """Whether a decoded target depends on the view key."""
        return False

    # ---- records

    @abstractmethod
    def specs(self, shapes: Shapes) -> tuple[ArraySpec, ...]:
        """The arrays of a record of such a teacher, in stored order.

        Raises:
            RecipeError: the teacher does not fit what the codec keeps.
        """

    @abstractmethod
    def encode(self, tapped: Tapped, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """The arrays of B records: by name, [B, *spec.shape] in spec.dtype, on the device of both arguments.

        A record depends on its own view and view key, not on the batch around it. `tapped` holds finite numbers.

        Raises:
            RecipeError: as `specs`.
        """

    @abstractmethod
    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], shapes: Shapes) -> Target:
        """The target of B records; `arrays` as from `encode`, on the device of `view_keys`."""

    @abstractmethod
    def exact(self, tapped: Tapped) -> Target:
        """The dense target itself, for audits and for training with the teacher in the loop."""

    @abstractmethod
    def pick(self, target: Target, some: slice, device: torch.device | None = None) -> Target:
        """The target of some views, moved to `device` where one is given."""

    # ---- students

    @abstractmethod
    def parts(self, shapes: Shapes) -> dict[str, int]:
        """The losses by name, and into how many parts each falls. A student's width must be a multiple of each."""

    @abstractmethod
    def head(self, student: Shapes, teacher: Shapes) -> TargetHead:
        """The head of a student.

        Raises:
            RecipeError: the student does not fit the teacher.
        """

    @abstractmethod
    def losses(self, answers: Answers, target: Target) -> dict[str, Loss]:
        """The losses by name; the training loss is the sum of their means. Computed in fp32, or fp64, at least."""

    # ---- audits

    @abstractmethod
    def yardsticks(self, targets: Sequence[Target]) -> dict[str, Yardstick]:
        """By loss, what an audit's numbers are measured by; whole targets, of two views or more together."""

    @abstractmethod
    def statistics(self, tapped: Tapped, target: Target) -> dict[str, dict[str, Float[Tensor, "B P"]]]:
        """By loss, what the teacher's dense target and a decoded one say without a student, such as an entropy."""

    # ---- constants, which some codecs need

    @property
    def calibration_views(self) -> int:
        """Views that the codec's constants are made from; 0: it has none."""
        return 0

    def check_teacher(self, tapped: Tapped, projection: Projection) -> None:
        """Raises RecipeError where the codec cannot serve this teacher; `tapped` is of any view."""
        assert not self.calibration_views, "a codec with constants checks its teacher"

    def calibrate(self, tapped: Iterable[Tapped], projection: Projection) -> dict[str, Tensor]:
        """The constants of a cache, on the CPU, from what the teacher gives for the calibration views, in batches."""
        return {}
