"""The sketch of some query rows without the relation map: one fused kernel on a GPU, small chunks elsewhere.

Only the wanted rows are computed, and at most `_CHUNK_BYTES` of them are in memory at once (the kernel keeps them in
registers). Logits, softmax and entropy are fp32 (fp64 for fp64 inputs) whatever the autocast dtype. Sums along a row,
from which tokens are drawn, are fp64.

Shapes: B view, H head, Q query row, K kept entry, T token, D head width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from tinymim.configs.codecs.relations import Relation
from tinymim.targets.counter import uniforms
from tinymim.targets.relations.draws import stream_of
from tinymim.targets.relations.kernels.triton_works import triton_works
from tinymim.targets.relations.qkv import QKV, relation_probs
from tinymim.targets.relations.sparsify import quantise, systematic_draws, top_entries

# Rows of probabilities in memory at once, as float32. On a CPU, they and their fp64 sums fit into its cache.
_CHUNK_BYTES: Final = {"cpu": 2 << 20}
_CHUNK_BYTES_ELSEWHERE: Final = 256 << 20

MAX_FUSED_TOKENS: Final = 1024
_FUSED_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class RowSketch:
    """The sketch of Q rows of every view and head."""

    head_index: Int64[Tensor, "B H Q head_k"]  # the largest entries' tokens, ascending
    head_code: Int64[Tensor, "B H Q head_k"]  # their probabilities, rounded without bias (`sparsify.quantise`)
    tail_index: Int64[Tensor, "B H Q tail_k"]  # tokens drawn from the rest, ascending, with repetition
    entropy: Float32[Tensor, " B"]  # nats, mean over H and Q


def sketch_rows(
    qkv: QKV,
    relation: Relation,
    rows: Int64[Tensor, "B H Q"] | None,
    view_keys: Int64[Tensor, " B"],
    head_k: int,
    tail_k: int,
) -> RowSketch:
    """The `head_k` largest entries and `tail_k` systematic draws of every wanted row, and the mean entropy.

    The result is that of `sparsify.top_entries`, `quantise` and `systematic_draws` on `qkv.relation_probs`, with the
    numbers of `counter.uniforms`; on a CPU it is bit-equal for any batch. A GPU's exponentials may differ in the last
    bit, and with them one draw in some thousands. Among equal entries, a GPU takes the first into the head, while
    `torch.topk` promises no order.

    Args:
        qkv: the block's projections, of any float dtype and strides; only the wanted rows are copied.
        relation: the two sides, and the streams of randomness.
        rows: int64 [B, H, Q] query rows; None for all T in order.
        view_keys: int64 [B], on the device of `qkv`.
        head_k: number of largest entries to keep, fewer than T; may be 0.
        tail_k: draws a row.
    """
    if fused(qkv, relation):
        # Imported here, because triton is not installed everywhere.
        from tinymim.targets.relations.kernels.encode_triton import sketch_rows_triton

        return RowSketch(*sketch_rows_triton(qkv, relation, rows, view_keys, head_k, tail_k))
    return sketch_rows_torch(qkv, relation, rows, view_keys, head_k, tail_k)


def fused(qkv: QKV, relation: Relation) -> bool:
    """Whether `sketch_rows` runs the Triton kernel: GPU tensors of up to 32 bits, rows that fit into one block."""
    a, b = qkv.pair(relation)
    dtypes_fit = a.dtype == b.dtype and a.dtype in _FUSED_DTYPES
    return a.is_cuda and dtypes_fit and a.shape[2] <= MAX_FUSED_TOKENS and triton_works()


def sketch_rows_torch(
    qkv: QKV,
    relation: Relation,
    rows: Int64[Tensor, "B H Q"] | None,
    view_keys: Int64[Tensor, " B"],
    head_k: int,
    tail_k: int,
) -> RowSketch:
    """`sketch_rows` in torch operations on a few views at a time."""
    batch, heads, tokens, _ = qkv.q.shape
    queries = tokens if rows is None else rows.shape[2]
    u_head = uniforms(view_keys, stream_of("rounding", relation), (heads, queries, head_k))
    u_tail = uniforms(view_keys, stream_of("tail", relation), (heads, queries))
    head_index = view_keys.new_empty(batch, heads, queries, head_k)
    head_code = torch.empty_like(head_index)
    tail_index = view_keys.new_empty(batch, heads, queries, tail_k)
    row_entropy = []
    for views, probs in probs_in_chunks(qkv, relation, rows):
        index, head = top_entries(probs, head_k)
        head_index[views] = index
        if head_k:
            head_code[views] = quantise(head, u_head[views])
        tail_index[views] = systematic_draws(probs, index, u_tail[views], tail_k)
        row_entropy.append(torch.special.entr(probs).sum(-1))
    return RowSketch(head_index, head_code, tail_index, _mean_of_views(row_entropy))


def top_rows(
    qkv: QKV, relation: Relation, rows: Int64[Tensor, "B H Q"] | None, head_k: int
) -> tuple[Int64[Tensor, "B H Q K"], Float[Tensor, "B H Q K"]]:
    """`sparsify.top_entries` of the wanted rows, in the chunks of `sketch_rows_torch`.

    Returns:
        Ascending int64 tokens and float32 (float64 for float64 inputs) values, each [B, H, Q, head_k].
    """
    kept = [top_entries(probs, head_k) for _, probs in probs_in_chunks(qkv, relation, rows)]
    index, value = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return index, value


def probs_in_chunks(
    qkv: QKV, relation: Relation, rows: Int64[Tensor, "B H Q"] | None
) -> Iterator[tuple[slice, Float[Tensor, "b H Q T"]]]:
    """`relation_probs` in chunks of at most `_CHUNK_BYTES`, but at least one view; an empty batch gives one chunk."""
    batch, heads, tokens, _ = qkv.q.shape
    queries = tokens if rows is None else rows.shape[2]
    budget = _CHUNK_BYTES.get(qkv.q.device.type, _CHUNK_BYTES_ELSEWHERE)
    step = max(1, budget // (4 * heads * queries * tokens))
    for start in range(0, max(batch, 1), step):
        views = slice(start, start + step)
        part = QKV(qkv.q[views], qkv.k[views], qkv.v[views])
        yield views, relation_probs(part, relation, None if rows is None else rows[views])


def _mean_of_views(row_entropy: list[Float[Tensor, "b H Q"]]) -> Float32[Tensor, " B"]:
    """One mean over all chunks: the order of a sum, and so its last bit, may depend on the shape."""
    mean: Tensor = torch.cat(row_entropy).mean((1, 2)).float()
    return mean
