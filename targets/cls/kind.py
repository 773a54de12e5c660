"""The class embedding as a target kind.

Shapes: B view, C width.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from tinymim.configs.codecs.targets import VectorLoss
from tinymim.configs.codecs.vectors import ClsCodec
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets.contract import Tapped, TargetHead
from tinymim.targets.vectors import Projector, Vectors


def embedding_tap(at: str, block: int) -> Tap:
    """The tap of the class embedding for a codec's `at`."""
    return {"block": Tap("cls", block), "final": Tap("cls"), "pooled": Tap("pooled")}[at]


@dataclass(frozen=True)
class Cls(Vectors):
    """One vector a view: the class token after the tapped block or the final norm, or the pooled embedding.

    The student answers with its class token, or the mean over its patches where it has none.
    """

    config: ClsCodec
    loss_name: ClassVar[str] = "cls"
    streams: ClassVar[int] = 272
    default_loss: ClassVar[VectorLoss] = "cosine"

    @property
    def taps(self) -> tuple[Tap, ...]:
        """See `TargetKind`."""
        return (embedding_tap(self.config.at, self.block),)

    @property
    def sampled(self) -> None:
        """See `Vectors`."""

    def vectors(self, tapped: Tapped) -> Float[Tensor, "B 1 C"]:
        """See `Vectors`."""
        return tapped[self.taps[0]][0][:, None]

    def count(self, shapes: Shapes) -> int:
        """See `Vectors`."""
        return 1

    def head(self, student: Shapes, teacher: Shapes) -> TargetHead:
        """See `TargetKind`."""
        return Projector(student, teacher.width, self.targets, patches=False)
