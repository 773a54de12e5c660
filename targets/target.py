"""What the teacher says about a batch of views, in the form that the loss reads.

Shapes: B view, H head, Q query row, K kept entry, T token.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int64
from torch import Tensor

from tinymim.configs.schema import Relation


@dataclass(frozen=True)
class SparseRows:
    """Some query rows of one relation, each a few weighted tokens."""

    rows: Int64[Tensor, "B H Q"] | None  # None: all T rows in order
    index: Int64[Tensor, "B H Q K"]  # tokens, unordered, may repeat
    weight: Float[Tensor, "B H Q K"]  # sums to one over K; a sketch may hold small negative ones
    entropy: Float[Tensor, " B"]  # nats, mean over H and Q of the teacher's exact rows
    tokens: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, Q, T)."""
        return (*self.index.shape[:3], self.tokens)

    def expect(self, values: Float[Tensor, "B H Q T"]) -> Float[Tensor, "B H Q"]:
        """The mean of `values` under every row, in the dtype of `values`."""
        return (values.gather(-1, self.index) * self.weight.to(values.dtype)).sum(-1)

    def dense(self) -> Float[Tensor, "B H Q T"]:
        """The rows written out, zeros where nothing was kept."""
        return self.weight.new_zeros(self.shape).scatter_add(-1, self.index, self.weight)


@dataclass(frozen=True)
class DenseRows:
    """All query rows of one relation, written out."""

    probs: Float[Tensor, "B H T T"]
    entropy: Float[Tensor, " B"]  # nats, mean over H and T of the teacher's exact rows
    rows: ClassVar[None] = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, T, T)."""
        return tuple(self.probs.shape)

    def expect(self, values: Float[Tensor, "B H T T"]) -> Float[Tensor, "B H T"]:
        """The mean of `values` under every row, in the dtype of `values`."""
        return (values * self.probs.to(values.dtype)).sum(-1)

    def dense(self) -> Float[Tensor, "B H T T"]:
        """The rows themselves."""
        return self.probs


RowTarget = SparseRows | DenseRows
Target = dict[Relation, RowTarget]
