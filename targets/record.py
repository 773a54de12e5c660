"""What a codec is, and the parts that codecs share: named arrays of a record, their dtypes, index gaps, entropies.

Shapes: B view, H head, Q query row, K kept entry, T token.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float, Float32, Int64, Integer
from torch import Tensor

from tinymim.configs.codecs import Relation
from tinymim.configs.errors import RecipeError
from tinymim.targets.relations.qkv import QKV
from tinymim.targets.relations.rows import Target


@dataclass(frozen=True)
class ArraySpec:
    """One stored array: name ("qk_tail_gap"), numpy dtype name, shape of one record."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Codec(Protocol):
    """Turns a block's q, k, v into the arrays of B records, and such arrays into a target."""

    name: ClassVar[str]
    version: ClassVar[int]

    def arrays(self, heads: int, tokens: int) -> tuple[ArraySpec, ...]:
        """What a record holds for a teacher of so many heads and tokens, in stored order.

        Raises:
            RecipeError: the rows of this teacher are too short for what the codec keeps.
        """
        ...

    def relation_heads(self, heads: int) -> int:
        """H of the decoded target for a teacher of so many heads."""
        ...

    def encode(self, qkv: QKV, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """The arrays of B records: by name, [B, *spec.shape] in spec.dtype, on the device of both arguments.

        A record depends on its own q, k, v and view key, not on the batch around it.

        Raises:
            RecipeError: as `arrays`, and where the teacher's relations are not finite.
        """
        ...

    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], tokens: int) -> Target:
        """The target of B records; `arrays` as from `encode`, on the device of `view_keys`; `tokens` is T."""
        ...


Fields = Mapping[str, tuple[str, tuple[int, ...]]]  # name: (dtype, shape)


def specs_of(relations: tuple[Relation, ...], fields: Fields) -> tuple[ArraySpec, ...]:
    """The same fields for every relation; one without elements is not stored."""
    return tuple(
        ArraySpec(f"{relation}_{name}", dtype, shape)
        for relation in relations
        for name, (dtype, shape) in fields.items()
        if 0 not in shape
    )


def stored(fields: Mapping[str, Tensor], specs: tuple[ArraySpec, ...]) -> dict[str, Tensor]:
    """The fields in the order and dtypes of their specs."""
    return {spec.name: fields[spec.name].to(getattr(torch, spec.dtype)) for spec in specs}


def index_dtype(tokens: int) -> str:
    """The smallest unsigned dtype for token indices, and so for gaps between them."""
    return "uint8" if tokens <= 256 else "uint16"


def to_gaps(index: Int64[Tensor, "... K"]) -> Int64[Tensor, "... K"]:
    """Ascending indices as the first one and the steps to the next: small numbers, which zstd packs well."""
    return index.diff(dim=-1, prepend=index.new_zeros(*index.shape[:-1], 1))


def from_gaps(gaps: Integer[Tensor, "... K"]) -> Int64[Tensor, "... K"]:
    """The inverse of `to_gaps`."""
    return gaps.long().cumsum(dim=-1)


def check_head_k(head_k: int, most: int) -> None:
    """Raises RecipeError where rows are too short for `head_k` entries and what must be left of them."""
    if head_k > most:
        raise RecipeError(
            "codec.head_k is too large for the teacher's number of tokens",
            got=head_k,
            expected=f"at most {most}",
            hint="lower codec.head_k, or use codec.name: dense",
        )


def mean_entropy(probs: Float[Tensor, "B H Q T"], relation: Relation) -> Float32[Tensor, " B"]:
    """Mean over H and Q of -sum p log p, in nats.

    Raises:
        RecipeError: it is not finite; the one place where a teacher that overflowed shows.
    """
    entropy: Tensor = torch.special.entr(probs).sum(-1).mean((1, 2)).float()
    require_finite_teacher(entropy, relation)
    return entropy


@dataclass
class FiniteCheck:
    """A check of `require_finite_teacher` that is still to be made."""

    per_view: Float[Tensor, " B"]
    what: str

    def make(self) -> None:
        """Raises RecipeError, as `require_finite_teacher`."""
        _require_finite(self.per_view, self.what)


_deferred: ContextVar[list[FiniteCheck] | None] = ContextVar("deferred", default=None)


@contextmanager
def finite_checks_deferred() -> Iterator[list[FiniteCheck]]:
    """Meanwhile, checks come into the list and are the caller's to make: each of them would wait for the device."""
    checks: list[FiniteCheck] = []
    token = _deferred.set(checks)
    try:
        yield checks
    finally:
        _deferred.reset(token)


def require_finite_teacher(per_view: Float[Tensor, " B"], what: str) -> None:
    """Raises RecipeError where a number per view, such as an entropy, is inf or nan; see `finite_checks_deferred`."""
    deferred = _deferred.get()
    if deferred is None:
        _require_finite(per_view, what)
    else:
        deferred.append(FiniteCheck(per_view, what))


def _require_finite(per_view: Float[Tensor, " B"], what: str) -> None:
    if not per_view.isfinite().all():
        raise RecipeError(
            f"the teacher's {what} relation is not finite",
            got=f"{int((~per_view.isfinite()).sum())} of {len(per_view)} views with inf or nan",
            expected="finite queries, keys and values",
            hint="set teacher.precision: fp32 or bf16, and check the teacher's weights",
        )
