"""Rows of relation maps: a decoded target of B views.

Shapes: B view, H head, Q query row, K kept entry, T token.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int64
from torch import Tensor

from tinymim.configs.codecs.relations import Relation

# The mass of a row outside its kept tokens, 1 - sum of weights: "none", there is no such mass; "uniform", it is spread
# evenly over the other tokens; "ghost", it is one bucket, compared with the student's mass on the other tokens.
Tail = Literal["none", "uniform", "ghost"]


@dataclass(frozen=True)
class SparseRows:
    """Query rows of one relation, each a few weighted tokens."""

    rows: Int64[Tensor, "B H Q"] | None  # None: all T rows in order
    index: Int64[Tensor, "B H Q K"]  # kept tokens, unordered; they may repeat where tail is "none"
    weight: Float[Tensor, "B H Q K"]  # sums to one where tail is "none"; a sketch may hold small negative weights
    entropy: Float[Tensor, " B"]  # nats, mean over H and Q; of the exact rows, or of these rows where they have a tail
    tokens: int
    tail: Tail = "none"

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, Q, T)."""
        return (*self.index.shape[:3], self.tokens)

    def dense(self) -> Float[Tensor, "B H Q T"]:
        """The rows written out. Tokens that were not kept are zero, or have the even share of a uniform tail.

        Rows with a ghost tail do not sum to one, because its mass belongs to no single token.
        """
        if self.tail != "uniform":
            return self.weight.new_zeros(self.shape).scatter_add(-1, self.index, self.weight)
        share = (1.0 - self.weight.sum(-1, keepdim=True)) / (self.tokens - self.index.shape[-1])
        return share.expand(self.shape).scatter(-1, self.index, self.weight)


@dataclass(frozen=True)
class DenseRows:
    """Query rows of one relation with all T tokens."""

    rows: Int64[Tensor, "B H Q"] | None  # None: all T rows in order
    probs: Float[Tensor, "B H Q T"]
    entropy: Tensor  # nats, of the teacher's exact rows: [B] mean over H and Q, or [B, H] mean over Q

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, Q, T)."""
        return tuple(self.probs.shape)

    def dense(self) -> Float[Tensor, "B H Q T"]:
        """`probs`."""
        return self.probs


RowTarget = SparseRows | DenseRows
Rows = dict[Relation, RowTarget]
