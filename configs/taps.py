"""Places in a model where tensors are taken, and the sizes of what a ViT gives there. Imports nothing heavy."""

from dataclasses import dataclass
from typing import NamedTuple


class Tap(NamedTuple):
    """A place in a model: "qkv@18" is the queries, keys and values of block 18, "cls@0" the final class token.

    Attributes:
        kind: which tensors (`models/taps.py` lists them with their shapes).
        place: the block, counted from 1; 0 is the end of the model, behind its final norm.
    """

    kind: str
    place: int = 0

    def __str__(self) -> str:
        return f"{self.kind}@{self.place}"

    @classmethod
    def parse(cls, text: str) -> "Tap":
        """The tap that `str` describes. Raises ValueError for any other text."""
        kind, _, place = text.partition("@")
        return cls(kind, int(place))


@dataclass(frozen=True)
class Shapes:
    """Sizes of a plain ViT's tensors for one view.

    Attributes:
        heads, head_dim: of the tapped attention, else of the model; their product is the width.
        tokens: patches that the model sees, and prefix tokens.
        prefix_tokens: class and register tokens, which come first.
        grid: rows and columns of patches, also of hidden ones.
    """

    heads: int
    head_dim: int
    tokens: int
    prefix_tokens: int
    grid: tuple[int, int]

    @property
    def visible(self) -> int:
        """Patches that the model sees."""
        return self.tokens - self.prefix_tokens

    @property
    def masked(self) -> bool:
        """Whether it does not see all patches."""
        return self.visible != self.grid[0] * self.grid[1]

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim
