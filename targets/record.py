"""Parts of records that codecs share: named arrays, their dtypes, gaps between ascending indices.

Shapes: K kept entry.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int64, Integer
from torch import Tensor

from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.errors import RecipeError
from tinymim.targets.contract import ArraySpec

Fields = Mapping[str, tuple[str, tuple[int, ...]]]  # name: (dtype, shape)


def specs_of(prefixes: Sequence[str], fields: Fields) -> tuple[ArraySpec, ...]:
    """Specs of the same fields under every prefix; fields without elements are left out."""
    return tuple(
        ArraySpec(f"{prefix}_{name}", dtype, shape)
        for prefix in prefixes
        for name, (dtype, shape) in fields.items()
        if 0 not in shape
    )


def stored(fields: Mapping[str, Tensor], specs: tuple[ArraySpec, ...]) -> dict[str, Tensor]:
    """The fields in the order and dtypes of their specs."""
    return {spec.name: fields[spec.name].to(getattr(torch, spec.dtype)) for spec in specs}


def refuse_targets(targets: TargetsConfig, kind: str, takes: Sequence[str]) -> None:
    """Raises RecipeError, naming the field, where `targets` holds one that a kind of target does not take."""
    for name, value in targets:
        if value and name not in takes:
            raise RecipeError(
                f"targets.{name} is for another kind of target",
                got=f"targets.{name} {value}",
                expected=f"no targets.{name} for {kind}",
                hint=f"fields for {kind}: {', '.join(f'targets.{each}' for each in takes) or 'none'}",
            )


def refuse_loss(targets: TargetsConfig, takes: Sequence[str], kind: str, hint: str = "") -> None:
    """Raises RecipeError where `targets.loss` is none of those that a kind of target, or its codec, has."""
    if targets.loss not in (None, *takes):
        raise RecipeError(
            f"targets.loss {targets.loss} is not a loss of {kind}",
            got=f"targets.loss {targets.loss}",
            expected=", ".join(takes),
            hint=hint or "leave targets.loss out for the default",
        )


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
    """Raises RecipeError where `head_k` exceeds `most`, the number of entries that a row can give."""
    if head_k > most:
        raise RecipeError(
            "codec.head_k is too large for the teacher's number of tokens",
            got=head_k,
            expected=f"at most {most}",
            hint="lower codec.head_k, or use codec.name: dense",
        )
