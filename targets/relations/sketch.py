"""The sketch: a few weighted tokens of some query rows, unbiased (I4).

Shapes: B view, H head, Q query row, K kept entry, T token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int64
from torch import Tensor

from tinymim.configs.codecs import Relation, SketchCodec
from tinymim.configs.taps import Shapes
from tinymim.targets.contract import ArraySpec, Tapped
from tinymim.targets.record import check_head_k, from_gaps, index_dtype, specs_of, stored, to_gaps
from tinymim.targets.relations.draws import sample_rows
from tinymim.targets.relations.kernels.encode import sketch_rows, top_rows
from tinymim.targets.relations.kind import RelationKind
from tinymim.targets.relations.rows import Rows, SparseRows
from tinymim.targets.relations.sparsify import dequantise


@dataclass(frozen=True)
class _Sampled(RelationKind):
    """Some query rows of every relation, the same for all codecs that draw rows."""

    config: SketchCodec
    block: int = 1

    @property
    def relations(self) -> tuple[Relation, ...]:
        """See `RelationKind`."""
        return self.config.relations

    def relation_heads(self, heads: int) -> int:
        """See `RelationKind`."""
        return self.config.relation_heads or heads

    def draws(self, shapes: Shapes) -> bool:
        """See `TargetKind`."""
        return self.config.rows < shapes.tokens

    def sampled_rows(
        self, relation: Relation, view_keys: Int64[Tensor, " B"], heads: int, tokens: int
    ) -> Int64[Tensor, "B H Q"] | None:
        """The query rows of a record; None where that is all of them."""
        if self.config.rows >= tokens:
            return None
        return sample_rows(view_keys, relation, heads, tokens, self.config.rows)


@dataclass(frozen=True)
class Sketch(_Sampled):
    """Per sampled row: the `head_k` largest entries, rounded to 8 bits, and `tail_k` systematic draws.

    A row decodes to the head entries with weight q_j (the rounded value) and the draws with weight
    w = (1 - sum of q over the head) / tail_k each, so it sums to one by construction. It is unbiased,
    E[weight at j] = p_j for every j: in the head E[q_j] = p_j (`quantise`); outside, j is drawn N_j times,
    N_j is independent of the rounding (another stream), and with m the mass outside the head

        E[w N_j] = E[w] E[N_j] = (1 - sum of p over the head) / tail_k x tail_k p_j / m = p_j.

    Every row is in the sample with the same probability (`sample_rows`), so the mean over the sampled rows has
    the mean over all rows as expectation. Rows and draws are independent, and the loss is linear in the weights:
    expected loss and gradient are those of the dense maps. (w is slightly negative where the head holds nearly
    everything and was rounded up; clamping it would be a bias.)

    Bytes: the rows are recomputed from the view key, the draws need no values, and sorted indices are stored as
    gaps, which zstd packs to within 2 % of their entropy (benchmarks/bench_packing.py).
    """

    name: ClassVar[str] = "sketch"
    version: ClassVar[int] = 2

    def draws(self, shapes: Shapes) -> bool:
        """See `TargetKind`: the tail, whatever the rows."""
        return True

    def specs(self, shapes: Shapes) -> tuple[ArraySpec, ...]:
        """See `TargetKind`; head_k + 1 tokens are the least that leave a tail to draw from."""
        heads, tokens = self.relation_heads(shapes.heads), shapes.tokens
        head_k, tail_k, rows = self.config.head_k, self.config.tail_k, min(self.config.rows, tokens)
        check_head_k(head_k, tokens - 1)
        fields = {
            "head_gap": (index_dtype(tokens), (heads, rows, head_k)),
            "head_code": ("uint8", (heads, rows, head_k)),
            "tail_gap": (index_dtype(tokens), (heads, rows, tail_k)),
            "entropy": ("float32", ()),
        }
        return specs_of(self.config.relations, fields)

    @torch.no_grad()
    def encode(self, tapped: Tapped, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """See `TargetKind`."""
        fields: dict[str, Tensor] = {}
        qkv, specs = self.split(tapped), self.specs(self.shapes(tapped))
        for relation in self.config.relations:
            rows = self.sampled_rows(relation, view_keys, *qkv.q.shape[1:3])
            sketch = sketch_rows(qkv, relation, rows, view_keys, self.config.head_k, self.config.tail_k)
            fields[f"{relation}_entropy"] = sketch.entropy
            fields[f"{relation}_head_gap"] = to_gaps(sketch.head_index)
            fields[f"{relation}_head_code"] = sketch.head_code
            fields[f"{relation}_tail_gap"] = to_gaps(sketch.tail_index)
        return stored(fields, specs)

    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], shapes: Shapes) -> Rows:
        """See `TargetKind`; every relation is a `SparseRows` with K = head_k + tail_k."""
        target: Rows = {}
        tokens = shapes.tokens
        for relation in self.config.relations:
            index = from_gaps(arrays[f"{relation}_tail_gap"])
            tail_mass = torch.ones(index.shape[:3], device=index.device)
            weights = []
            if self.config.head_k:
                head = dequantise(arrays[f"{relation}_head_code"])
                tail_mass = tail_mass - head.sum(-1)
                index = torch.cat([from_gaps(arrays[f"{relation}_head_gap"]), index], dim=-1)
                weights.append(head)
            tail = (tail_mass / self.config.tail_k)[..., None].expand(-1, -1, -1, self.config.tail_k)
            weight = torch.cat([*weights, tail], dim=-1)
            rows = self.sampled_rows(relation, view_keys, index.shape[1], tokens)
            target[relation] = SparseRows(rows, index, weight, arrays[f"{relation}_entropy"], tokens)
        return target


@dataclass(frozen=True)
class TopK(_Sampled):
    """Published top-k: per sampled row the `head_k` largest entries in fp16, and a rule for what is left.

    **Biased**: the expected gradient is another one than that of the dense maps, and no number of steps averages
    that out. For comparison, and for rows so narrow that the head holds nearly all. `tail` is

    - `renormalise`: the kept entries are scaled up to sum to one;
    - `uniform`: the mass left, m, is spread evenly over the other tokens (Wu et al., TinyViT, ECCV 2022);
    - `ghost`: m is compared with the student's own mass outside the kept entries, as one more bucket
      (Anshumann et al., "Sparse Logit Sampling", ACL 2025).

    The entropy is that of the row as decoded, so the loss is the KL of the published method.
    """

    name: ClassVar[str] = "topk"
    version: ClassVar[int] = 2
    unbiased: ClassVar[bool] = False

    def specs(self, shapes: Shapes) -> tuple[ArraySpec, ...]:
        """See `TargetKind`; `renormalise` may keep whole rows."""
        tokens = shapes.tokens
        check_head_k(self.config.head_k, tokens - (self.config.tail != "renormalise"))
        shape = (self.relation_heads(shapes.heads), min(self.config.rows, tokens), self.config.head_k)
        fields = {"head_gap": (index_dtype(tokens), shape), "head_value": ("float16", shape)}
        return specs_of(self.config.relations, fields)

    @torch.no_grad()
    def encode(self, tapped: Tapped, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """See `TargetKind`."""
        fields: dict[str, Tensor] = {}
        qkv, specs = self.split(tapped), self.specs(self.shapes(tapped))
        for relation in self.config.relations:
            rows = self.sampled_rows(relation, view_keys, *qkv.q.shape[1:3])
            index, fields[f"{relation}_head_value"] = top_rows(qkv, relation, rows, self.config.head_k)
            fields[f"{relation}_head_gap"] = to_gaps(index)
        return stored(fields, specs)

    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], shapes: Shapes) -> Rows:
        """See `TargetKind`; every relation is a `SparseRows` with K = head_k."""
        target: Rows = {}
        tokens = shapes.tokens
        tail = self.config.tail
        assert tail != "sampled"
        for relation in self.config.relations:
            index = from_gaps(arrays[f"{relation}_head_gap"])
            weight = arrays[f"{relation}_head_value"].float()
            rows = self.sampled_rows(relation, view_keys, index.shape[1], tokens)
            if tail == "renormalise":
                weight = weight / weight.sum(-1, keepdim=True)
                entropy = torch.special.entr(weight).sum(-1)
                target[relation] = SparseRows(rows, index, weight, entropy.mean((1, 2)), tokens)
                continue
            left = (1.0 - weight.sum(-1)).clamp(min=0.0)  # fp16 may round the kept mass above one
            buckets = 1 if tail == "ghost" else tokens - self.config.head_k
            entropy = torch.special.entr(weight).sum(-1) + buckets * torch.special.entr(left / buckets)
            target[relation] = SparseRows(rows, index, weight, entropy.mean((1, 2)), tokens, tail=tail)
        return target
