"""The sketch: a few weighted tokens of some query rows, unbiased (I4).

Shapes: B view, H head, Q query row, K kept entry, T token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int64
from torch import Tensor

from tinymim.configs.codecs.relations import SketchCodec
from tinymim.configs.taps import Shapes
from tinymim.targets.contract import ArraySpec, Tapped
from tinymim.targets.record import check_head_k, from_gaps, index_dtype, specs_of, stored, to_gaps
from tinymim.targets.relations.kernels.encode import sketch_rows, top_rows
from tinymim.targets.relations.kind import StoredRelations
from tinymim.targets.relations.rows import Rows, SparseRows
from tinymim.targets.relations.sparsify import dequantise


@dataclass(frozen=True)
class _Sampled(StoredRelations):
    """Relations of which a record holds some query rows."""

    config: SketchCodec
    block: int = 1

    @property
    def rows(self) -> int:
        """See `RelationKind`."""
        return self.config.rows


@dataclass(frozen=True)
class Sketch(_Sampled):
    """Per sampled row: the `head_k` largest entries, rounded to 8 bits, and `tail_k` systematic draws.

    A row decodes to the head entries with weight q_j (the rounded value) and the draws with weight
    w = (1 - sum of q over the head) / tail_k each, so it sums to one by construction. It is unbiased:
    E[weight at j] = p_j for every j. In the head, E[q_j] = p_j (`quantise`). Outside, j is drawn N_j times,
    N_j is independent of the rounding (another stream), and with m the mass outside the head

        E[w N_j] = E[w] E[N_j] = (1 - sum of p over the head) / tail_k x tail_k p_j / m = p_j.

    Every row is in the sample with the same probability (`sample_rows`), so the expected mean over the sampled rows
    is the mean over all rows. Rows and draws are independent and the loss is linear in the weights, so expected loss
    and gradient are those of the dense maps. w is slightly negative where the head holds nearly all mass and was
    rounded up; clamping it would be a bias.

    Records are small because rows are recomputed from the view key, draws need no values, and sorted indices are
    stored as gaps, which zstd packs to within 2 % of their entropy (benchmarks/bench_packing.py).
    """

    name: ClassVar[str] = "sketch"
    version: ClassVar[int] = 2

    def draws(self, shapes: Shapes) -> bool:
        """See `TargetKind`: the tail is drawn even where all rows are kept."""
        return True

    def specs(self, shapes: Shapes) -> tuple[ArraySpec, ...]:
        """See `TargetKind`; a row needs head_k + 1 tokens, so that a tail is left to draw from."""
        heads, tokens = self.record_heads(shapes), shapes.tokens
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
        specs, qkv = self.specs(self.shapes(tapped)), self.split(tapped)
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
    """Published top-k: per sampled row the `head_k` largest entries in fp16, and a rule for the remaining mass m.

    **Biased**: the expected gradient differs from that of the dense maps, and no number of steps averages the
    difference out. Use it for comparison, or for rows so peaked that the head holds nearly all mass. `tail` is

    - `renormalise`: the kept entries are scaled up to sum to one;
    - `uniform`: m is spread evenly over the other tokens (Wu et al., TinyViT, ECCV 2022);
    - `ghost`: m is one bucket, compared with the student's mass outside the kept entries
      (Anshumann et al., "Sparse Logit Sampling", ACL 2025).

    The entropy is that of the decoded row, so the loss is the KL of the published method.
    """

    name: ClassVar[str] = "topk"
    version: ClassVar[int] = 2

    @property
    def unbiased(self) -> bool:
        """See `TargetKind`."""
        return False

    def specs(self, shapes: Shapes) -> tuple[ArraySpec, ...]:
        """See `TargetKind`; only `renormalise` may keep whole rows, because it leaves no mass for other tokens."""
        tokens = shapes.tokens
        check_head_k(self.config.head_k, tokens - (self.config.tail != "renormalise"))
        shape = (self.record_heads(shapes), min(self.config.rows, tokens), self.config.head_k)
        fields = {"head_gap": (index_dtype(tokens), shape), "head_value": ("float16", shape)}
        return specs_of(self.config.relations, fields)

    @torch.no_grad()
    def encode(self, tapped: Tapped, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """See `TargetKind`."""
        fields: dict[str, Tensor] = {}
        specs, qkv = self.specs(self.shapes(tapped)), self.split(tapped)
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
