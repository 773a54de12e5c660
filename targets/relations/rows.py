"""Rows of relation maps: the target of a batch of views, in the form that the loss reads.

Shapes: B view, H head, Q query row, K kept entry, T token.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tinymim.configs.codecs import Relation

# What the mass 1 - sum of weights of a row means: there is none; it lies evenly on the tokens that were not kept; it
# is one more bucket, compared with the student's own mass on the tokens that were not kept.
Tail = Literal["none", "uniform", "ghost"]


@dataclass(frozen=True)
class SparseRows:
    """Some query rows of one relation, each a few weighted tokens."""

    rows: Int64[Tensor, "B H Q"] | None  # None: all T rows in order
    index: Int64[Tensor, "B H Q K"]  # tokens, unordered; may repeat where tail is "none"
    weight: Float[Tensor, "B H Q K"]  # a sketch may hold small negative ones; sums to one where tail is "none"
    entropy: Float[Tensor, " B"]  # nats, mean over H and Q: of the exact rows, with a tail of the rows as they are here
    tokens: int
    tail: Tail = "none"

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, Q, T)."""
        return (*self.index.shape[:3], self.tokens)

    def dense(self) -> Float[Tensor, "B H Q T"]:
        """The rows written out; what was not kept is zero, with a uniform tail its even share.

        A ghost tail says nothing of single tokens, so its rows do not sum to one.
        """
        if self.tail != "uniform":
            return self.weight.new_zeros(self.shape).scatter_add(-1, self.index, self.weight)
        share = (1.0 - self.weight.sum(-1, keepdim=True)) / (self.tokens - self.index.shape[-1])
        return share.expand(self.shape).scatter(-1, self.index, self.weight)


@dataclass(frozen=True)
class DenseRows:
    """Query rows of one relation, written out."""

    rows: Int64[Tensor, "B H Q"] | None  # None: all T rows in order
    probs: Float[Tensor, "B H Q T"]
    entropy: Tensor  # nats, of the teacher's exact rows: [B] mean over H and Q, or [B, H] mean over Q

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, Q, T)."""
        return tuple(self.probs.shape)

    def dense(self) -> Float[Tensor, "B H Q T"]:
        """The rows themselves."""
        return self.probs


RowTarget = SparseRows | DenseRows
Rows = dict[Relation, RowTarget]


def pick(target: Rows, some: slice, device: torch.device | None = None) -> Rows:
    """The rows of some views, on `device` where one is given."""

    def of(tensor: Tensor) -> Tensor:
        return tensor[some] if device is None else tensor[some].to(device)

    def one(rows: RowTarget) -> RowTarget:
        numbers = None if rows.rows is None else of(rows.rows)
        if isinstance(rows, DenseRows):
            return DenseRows(numbers, of(rows.probs), of(rows.entropy))
        return replace(rows, rows=numbers, index=of(rows.index), weight=of(rows.weight), entropy=of(rows.entropy))

    return {relation: one(rows) for relation, rows in target.items()}
