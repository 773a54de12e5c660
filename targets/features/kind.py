"""Patch tokens as a target kind.

Shapes: B view, N patch, C width.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from tinymim.configs.codecs.vectors import FeaturesCodec
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets.contract import Tapped, TargetHead
from tinymim.targets.vectors import Projector, Vectors, check_grid


def token_tap(at: str, block: int) -> Tap:
    """The tap of tokens for a codec's `at`."""
    return {"block": Tap("tokens", block), "normed": Tap("normed", block), "final": Tap("tokens")}[at]


@dataclass(frozen=True)
class Features(Vectors):
    """The patch tokens of one block, all or a sample, without class token and registers.

    Source: the features arm of Ren et al., "TinyMIM", CVPR 2023; LayerNorm'd targets of Wei et al., "Contrastive
    Learning Rivals Masked Image Modeling in Fine-tuning via Feature Distillation", 2022.
    """

    config: FeaturesCodec
    loss_name: ClassVar[str] = "features"
    streams: ClassVar[int] = 256

    @property
    def taps(self) -> tuple[Tap, ...]:
        """See `TargetKind`."""
        return (token_tap(self.config.at, self.block),)

    @property
    def sampled(self) -> int | None:
        """See `Vectors`."""
        return self.config.tokens

    def vectors(self, tapped: Tapped) -> Float[Tensor, "B N C"]:
        """See `Vectors`."""
        tokens, prefix = tapped[self.taps[0]]
        return tokens[:, prefix.shape[1] :]

    def count(self, shapes: Shapes) -> int:
        """See `Vectors`."""
        return shapes.tokens - shapes.prefix_tokens

    def head(self, student: Shapes, teacher: Shapes) -> TargetHead:
        """See `TargetKind`."""
        check_grid(student, teacher)
        return Projector(student, teacher.width, self.targets, patches=True)
