"""Versioned codecs: how the teacher's relations become named arrays of a record, and come back as a target.

`sketch` is unbiased and the default; `renormalise` is the published top-k, biased, for comparison; `dense` is
for audits. A codec's arrays, their meaning and the randomness behind them are fixed by (name, version).

Shapes: B view, H head, Q query row, K kept entry, T token, D head width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from tinymim.configs.errors import RecipeError
from tinymim.configs.schema import CodecConfig, Relation
from tinymim.targets.counter import sample_rows, stream_of, uniforms
from tinymim.targets.relations import QKV, relation_probs
from tinymim.targets.sparsify import dequantise, quantise, systematic_draws, top_entries
from tinymim.targets.target import DenseRows, SparseRows, Target

# ---------------------------------------------------------------- the interface


@dataclass(frozen=True)
class ArraySpec:
    """One stored array: name ("qk_tail_index"), numpy dtype name, shape of one record."""

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


def make_codec(config: CodecConfig) -> Codec:
    """The codec that a recipe or a manifest names."""
    if config.name == "dense":
        return Dense(config)
    return Sketch(config) if config.tail == "sampled" else Renormalise(config)


# ---------------------------------------------------------------- the codecs


@dataclass(frozen=True)
class Sketch:
    """Per sampled row: the `head_k` largest entries, rounded to 8 bits, and `tail_k` systematic draws.

    A row decodes to the head entries with weight q_j (the rounded value) and the draws with weight
    w = (1 - sum of q over the head) / tail_k each, so it sums to one by construction. It is unbiased,
    E[weight at j] = p_j for every j: in the head E[q_j] = p_j (`quantise`); outside, j is drawn N_j times,
    N_j is independent of the rounding (another stream), and with m the mass outside the head

        E[w N_j] = E[w] E[N_j] = (1 - sum of p over the head) / tail_k x tail_k p_j / m = p_j.

    The query rows are a uniform subset, so the mean over them has the mean over all rows as expectation, and
    the loss is linear in the weights: expected loss and gradient are those of the dense maps. (w is slightly
    negative where the head holds nearly everything and was rounded up; clamping it would be a bias.)

    Bytes: the rows are recomputed from the view key, the draws need no values.
    """

    config: CodecConfig
    name: ClassVar[str] = "sketch"
    version: ClassVar[int] = 1

    def arrays(self, heads: int, tokens: int) -> tuple[ArraySpec, ...]:
        """See `Codec`; head_k + 1 tokens are the least that leave a tail to draw from."""
        head_k, tail_k, rows = self.config.head_k, self.config.tail_k, min(self.config.rows, tokens)
        _check_head_k(head_k, tokens - 1)
        fields = {
            "head_index": (_index_dtype(tokens), (heads, rows, head_k)),
            "head_code": ("uint8", (heads, rows, head_k)),
            "tail_index": (_index_dtype(tokens), (heads, rows, tail_k)),
            "entropy": ("float32", ()),
        }
        return _specs(self.config, fields)

    @torch.no_grad()
    def encode(self, qkv: QKV, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """See `Codec`."""
        fields: dict[str, Tensor] = {}
        specs = self.arrays(*qkv.q.shape[1:3])
        for relation, probs, entropy in _teacher_rows(self.config, qkv, view_keys):
            head_index, head = top_entries(probs, self.config.head_k)
            u_head = uniforms(view_keys, stream_of("rounding", relation), tuple(head.shape[1:]))
            u_tail = uniforms(view_keys, stream_of("tail", relation), tuple(probs.shape[1:3]))
            fields[f"{relation}_head_index"] = head_index
            fields[f"{relation}_head_code"] = quantise(head, u_head)
            fields[f"{relation}_tail_index"] = systematic_draws(probs, head_index, u_tail, self.config.tail_k)
            fields[f"{relation}_entropy"] = entropy
        return _stored(fields, specs)

    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], tokens: int) -> Target:
        """See `Codec`; every relation is a `SparseRows` with K = head_k + tail_k."""
        target: Target = {}
        for relation in self.config.relations:
            index = arrays[f"{relation}_tail_index"].long()
            tail_mass = torch.ones(index.shape[:3], device=index.device)
            weights = []
            if self.config.head_k:
                head = dequantise(arrays[f"{relation}_head_code"])
                tail_mass = tail_mass - head.sum(-1)
                index = torch.cat([arrays[f"{relation}_head_index"].long(), index], dim=-1)
                weights.append(head)
            tail = (tail_mass / self.config.tail_k)[..., None].expand(-1, -1, -1, self.config.tail_k)
            weight = torch.cat([*weights, tail], dim=-1)
            rows = _rows(self.config, relation, view_keys, index.shape[1], tokens)
            target[relation] = SparseRows(rows, index, weight, arrays[f"{relation}_entropy"], tokens)
        return target


@dataclass(frozen=True)
class Renormalise:
    """The published top-k: the `head_k` largest entries in fp16, scaled up to sum to one.

    **Biased**: what the tail held is given to the head, so the expected gradient is another one and no
    number of steps averages it out. For comparison only. The stored entropy is that of the exact rows, so the
    reported "KL" is not one and can be negative.
    """

    config: CodecConfig
    name: ClassVar[str] = "renormalise"
    version: ClassVar[int] = 1

    def arrays(self, heads: int, tokens: int) -> tuple[ArraySpec, ...]:
        """See `Codec`."""
        shape = (heads, min(self.config.rows, tokens), self.config.head_k)
        _check_head_k(self.config.head_k, tokens)
        fields = {
            "head_index": (_index_dtype(tokens), shape),
            "head_value": ("float16", shape),
            "entropy": ("float32", ()),
        }
        return _specs(self.config, fields)

    @torch.no_grad()
    def encode(self, qkv: QKV, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """See `Codec`."""
        fields: dict[str, Tensor] = {}
        specs = self.arrays(*qkv.q.shape[1:3])
        for relation, probs, entropy in _teacher_rows(self.config, qkv, view_keys):
            fields[f"{relation}_head_index"], fields[f"{relation}_head_value"] = top_entries(probs, self.config.head_k)
            fields[f"{relation}_entropy"] = entropy
        return _stored(fields, specs)

    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], tokens: int) -> Target:
        """See `Codec`; every relation is a `SparseRows` with K = head_k."""
        target: Target = {}
        for relation in self.config.relations:
            index = arrays[f"{relation}_head_index"].long()
            weight = arrays[f"{relation}_head_value"].float()
            weight = weight / weight.sum(-1, keepdim=True)
            rows = _rows(self.config, relation, view_keys, index.shape[1], tokens)
            target[relation] = SparseRows(rows, index, weight, arrays[f"{relation}_entropy"], tokens)
        return target


@dataclass(frozen=True)
class Dense:
    """Every probability of every row in fp16; `rows`, `head_k` and `tail_k` are ignored."""

    config: CodecConfig
    name: ClassVar[str] = "dense"
    version: ClassVar[int] = 1

    def arrays(self, heads: int, tokens: int) -> tuple[ArraySpec, ...]:
        """See `Codec`."""
        return _specs(self.config, {"probs": ("float16", (heads, tokens, tokens)), "entropy": ("float32", ())})

    @torch.no_grad()
    def encode(self, qkv: QKV, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """See `Codec`."""
        fields: dict[str, Tensor] = {}
        for relation in self.config.relations:
            probs = relation_probs(qkv, relation)
            fields |= {f"{relation}_probs": probs, f"{relation}_entropy": _entropy(probs, relation)}
        return _stored(fields, self.arrays(*qkv.q.shape[1:3]))

    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], tokens: int) -> Target:
        """See `Codec`; every relation is a `DenseRows` with the stored values in float32."""
        return {
            relation: DenseRows(arrays[f"{relation}_probs"].float(), arrays[f"{relation}_entropy"])
            for relation in self.config.relations
        }


# ---------------------------------------------------------------- shared parts

_Fields = Mapping[str, tuple[str, tuple[int, ...]]]  # name: (dtype, shape)


def _specs(config: CodecConfig, fields: _Fields) -> tuple[ArraySpec, ...]:
    """The same fields for every relation; one without elements is not stored."""
    return tuple(
        ArraySpec(f"{relation}_{name}", dtype, shape)
        for relation in config.relations
        for name, (dtype, shape) in fields.items()
        if 0 not in shape
    )


def _stored(fields: Mapping[str, Tensor], specs: tuple[ArraySpec, ...]) -> dict[str, Tensor]:
    """The fields in the order and dtypes of their specs."""
    return {spec.name: fields[spec.name].to(getattr(torch, spec.dtype)) for spec in specs}


def _index_dtype(tokens: int) -> str:
    return "uint8" if tokens <= 256 else "uint16"


def _check_head_k(head_k: int, most: int) -> None:
    if head_k > most:
        raise RecipeError(
            "codec.head_k is too large for the teacher's number of tokens",
            got=head_k,
            expected=f"at most {most}",
            hint="lower codec.head_k, or use codec.name: dense",
        )


def _rows(
    config: CodecConfig, relation: Relation, view_keys: Tensor, heads: int, tokens: int
) -> Int64[Tensor, "B H Q"] | None:
    """The query rows of a sparse codec; None where that is all of them."""
    if config.rows >= tokens:
        return None
    return sample_rows(view_keys, relation, heads, tokens, config.rows)


def _teacher_rows(
    config: CodecConfig, qkv: QKV, view_keys: Tensor
) -> Iterator[tuple[Relation, Float[Tensor, "B H Q T"], Float32[Tensor, " B"]]]:
    """(relation, exact probabilities of its sampled rows, their mean entropy), one relation at a time."""
    for relation in config.relations:
        probs = relation_probs(qkv, relation, _rows(config, relation, view_keys, *qkv.q.shape[1:3]))
        yield relation, probs, _entropy(probs, relation)


def _entropy(probs: Tensor, relation: Relation) -> Float32[Tensor, " B"]:
    """Mean over H and Q of -sum p log p, in nats; the one place where a teacher that overflowed shows."""
    entropy: Tensor = torch.special.entr(probs).sum(-1).mean((1, 2)).float()
    if not entropy.isfinite().all():
        raise RecipeError(
            f"the teacher's {relation} relation is not finite",
            got=f"{int((~entropy.isfinite()).sum())} of {len(entropy)} views with inf or nan",
            expected="finite queries, keys and values",
            hint="set teacher.precision: fp32 or bf16, and check the teacher's weights",
        )
    return entropy
