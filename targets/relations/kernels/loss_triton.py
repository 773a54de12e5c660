"""`tinymim.targets.relations.kernels.loss` in Triton: two kernels without atomics, so equal inputs give equal bits.

`_rows_kernel` sweeps over the tokens once per tile of query rows, as FlashAttention does (Dao et al., 2022) with b in
the place of the values: it keeps the running maximum, the sum of exponentials and o = sum_j s_j b_j, from which

    da_r = (W o - sum_j t_j b_j) / sqrt(D),   ce = W logsumexp(x) - a_r . (sum_j t_j b_j) / sqrt(D);

the few b_j of the target are gathered. `_columns_kernel` sweeps over the query rows once per tile of tokens, with the
saved log-sum-exp, and sums db_j = sum over rows of (W s_j - t_j) a_r / sqrt(D).

Half-precision a and b are multiplied in tensor cores and summed in fp32, so their products are exact. A product of
fp32 s with a half-precision side is computed as two, of the upper and the lower half of the digits of s.

Shapes: B view, H head, Q query row, K kept entry, T token, D head width.
"""

import math
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinymim.targets.relations.rows import Tail


@dataclass(frozen=True)
class Tiles:
    """Per kernel: query rows and tokens of a tile, and its number of warps."""

    rows: tuple[int, int, int]
    columns: tuple[int, int, int]


# Compiled for compute capability 8.0 and 9.0 in half precision, with K = 8, D up to 64 and no tail, no register is
# spilled (a few with a ghost tail at D = 64); larger tiles spill. Not yet timed on a GPU.
# fp32 products without tensor cores need many more registers.
_HALF: Final = Tiles(rows=(32, 64, 4), columns=(32, 32, 4))
_FLOAT: Final = Tiles(rows=(32, 32, 4), columns=(16, 32, 8))
_INTERPRETED: Final = Tiles(rows=(64, 64, 4), columns=(64, 64, 4))  # the interpreter's cost is the number of tiles
_TAILS: Final[dict[Tail, int]] = {"none": 0, "uniform": 1, "ghost": 2}
_NONE: Final = tl.constexpr(0)
_UNIFORM: Final = tl.constexpr(1)
_GHOST: Final = tl.constexpr(2)


def relation_cross_entropy_triton(
    a: Tensor, b: Tensor, rows: Tensor | None, index: Tensor, weight: Tensor, tail: Tail, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`relation_cross_entropy` for bf16, fp16 and fp32, on CUDA or, under TRITON_INTERPRET=1, on a CPU."""
    B, H, T, D = a.shape
    Q, K = index.shape[2:]
    # Cross entropy; then maximum and log-sum-exp relative to it, of all tokens and of those that were not kept. They
    # are stored apart, because their sum would lose digits of the log-sum-exp where logits are large.
    per_row = a.new_empty((5, B, H, Q), dtype=torch.float32)
    shape = a.shape if with_grad else (0,)
    da = a.new_empty(shape, dtype=torch.float32) if rows is None else a.new_zeros(shape, dtype=torch.float32)
    db = a.new_empty(shape, dtype=torch.float32)
    if B * H == 0:
        return per_row[0].sum(-1), da, db
    operands = (
        a,
        b,
        a if rows is None else rows.contiguous(),
        index.contiguous(),
        weight.float().contiguous(),
        *per_row,
    )
    sizes = (*a.stride(), *b.stride(), H, Q, T, D, 1 / math.sqrt(D))
    # Triton's interpreter reads the bits of bfloat16 as integers in products.
    split = a.dtype == b.dtype and (a.dtype == torch.float16 or (a.dtype == torch.bfloat16 and a.is_cuda))
    constants = {
        "K": K,
        "TAIL": _TAILS[tail],
        "HAS_ROWS": rows is not None,
        "SPLIT": split,
        "BLOCK_D": max(triton.next_power_of_2(D), 16),
        "enable_fp_fusion": True,  # explicit, because Triton 3.9 warns about the default
    }
    tiles = (_HALF if split else _FLOAT) if a.is_cuda else _INTERPRETED
    with torch.cuda.device_of(a):
        block_q, block_t, warps = tiles.rows
        _rows_kernel[(B * H, triton.cdiv(Q, block_q))](
            *operands, da, *sizes, WITH_GRAD=with_grad, BLOCK_Q=block_q, BLOCK_T=block_t, num_warps=warps, **constants
        )
        if with_grad:
            block_q, block_t, warps = tiles.columns
            _columns_kernel[(B * H, triton.cdiv(T, block_t))](
                *operands, db, *sizes, BLOCK_Q=block_q, BLOCK_T=block_t, num_warps=warps, **constants
            )
    return per_row[0].mean(-1), da, db


@triton.jit
def _rows_kernel(
    a: tl.tensor,
    b: tl.tensor,
    rows: tl.tensor,
    index: tl.tensor,
    weight: tl.tensor,
    ce: tl.tensor,
    top_all: tl.tensor,
    log_all: tl.tensor,
    top_others: tl.tensor,
    log_others: tl.tensor,
    da: tl.tensor,
    a_view: tl.tensor,
    a_head: tl.tensor,
    a_token: tl.tensor,
    a_width: tl.tensor,
    b_view: tl.tensor,
    b_head: tl.tensor,
    b_token: tl.tensor,
    b_width: tl.tensor,
    H: tl.tensor,
    Q: tl.constexpr,  # a loop bound: Triton 3.6 interprets none that is a tensor
    T: tl.constexpr,
    D: tl.tensor,
    scale: tl.tensor,
    K: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WITH_GRAD: tl.constexpr,
) -> None:
    """Per view, head and tile of query rows: cross entropy, log-sum-exp, da."""
    pair = tl.program_id(0).to(tl.int64)  # offsets of all views together exceed int32
    a += pair // H * a_view + pair % H * a_head
    b += pair // H * b_view + pair % H * b_head
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    row = _row_numbers(rows, pair, q, Q, HAS_ROWS)
    a_rows = _tile(a, row, q < Q, d, D, a_token, a_width, SPLIT)
    at = pair * Q + q

    top, total, mean_b, sum_b = _sweep(
        a_rows, b, b_token, b_width, index, weight, at, q < Q, T, D, scale, K, TAIL, SPLIT, BLOCK_T, BLOCK_D, WITH_GRAD
    )

    # ---- the kept tokens
    a_rows = a_rows.to(tl.float32)
    mass = tl.zeros((BLOCK_Q,), tl.float32)
    target_b = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    kept_b = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    rest_top, rest = top, tl.log(total)
    rest_b = mean_b / total[:, None]
    for k in range(K):
        w = tl.load(weight + at * K + k, mask=q < Q, other=0.0)
        j = tl.load(index + at * K + k, mask=q < Q, other=0)
        one = _tile(b, j, q < Q, d, D, b_token, b_width, SPLIT).to(tl.float32)
        mass += w
        target_b += w[:, None] * one
        kept_b += one
        if TAIL == _GHOST:
            top, total, mean_b, p = _online(tl.sum(a_rows * one, axis=1)[:, None] * scale, top, total, mean_b)
            mean_b += p * one
    everything = top + tl.log(total)
    mean_b = mean_b / total[:, None]

    # ---- loss and gradient
    left = 1.0 - mass
    value = everything
    if TAIL == _NONE:
        value = mass * everything
        mean_b = mass[:, None] * mean_b
    if TAIL == _UNIFORM:
        target_b += (left / (T - K))[:, None] * (sum_b[None, :] - kept_b)
    value -= tl.sum(a_rows * target_b, axis=1) * scale
    if TAIL == _GHOST:
        value -= left * (rest_top + rest)
        target_b += left[:, None] * rest_b
    tl.store(ce + at, value, mask=q < Q)
    if WITH_GRAD:
        tl.store(top_all + at, top, mask=q < Q)
        tl.store(log_all + at, tl.log(total), mask=q < Q)
        if TAIL == _GHOST:
            tl.store(top_others + at, rest_top, mask=q < Q)
            tl.store(log_others + at, rest, mask=q < Q)
        place = da + (pair * T + row)[:, None] * D + d[None, :]
        tl.store(place, (mean_b - target_b) * (scale / Q), mask=(q < Q)[:, None] & (d < D)[None, :])


@triton.jit
def _columns_kernel(
    a: tl.tensor,
    b: tl.tensor,
    rows: tl.tensor,
    index: tl.tensor,
    weight: tl.tensor,
    ce: tl.tensor,
    top_all: tl.tensor,
    log_all: tl.tensor,
    top_others: tl.tensor,
    log_others: tl.tensor,
    db: tl.tensor,
    a_view: tl.tensor,
    a_head: tl.tensor,
    a_token: tl.tensor,
    a_width: tl.tensor,
    b_view: tl.tensor,
    b_head: tl.tensor,
    b_token: tl.tensor,
    b_width: tl.tensor,
    H: tl.tensor,
    Q: tl.constexpr,  # a loop bound: Triton 3.6 interprets none that is a tensor
    T: tl.constexpr,
    D: tl.tensor,
    scale: tl.tensor,
    K: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Per view, head and tile of tokens: db."""
    pair = tl.program_id(0).to(tl.int64)
    a += pair // H * a_view + pair % H * a_head
    b += pair // H * b_view + pair % H * b_head
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    columns = _tile(b, token, token < T, d, D, b_token, b_width, SPLIT)

    sum_a = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, Q, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        at = pair * Q + q
        # Rows beyond Q are zeros and add nothing, for any dx.
        a_rows = _tile(a, _row_numbers(rows, pair, q, Q, HAS_ROWS), q < Q, d, D, a_token, a_width, SPLIT)
        x = _logits(a_rows, columns, token, T, scale)
        top = tl.load(top_all + at, mask=q < Q, other=0.0)[:, None]
        dx = tl.exp(x - top - tl.load(log_all + at, mask=q < Q, other=0.0)[:, None])
        target, kept, mass = _targets(index, weight, at, q < Q, token, K)
        left = (1.0 - mass)[:, None]
        if TAIL == _NONE:
            dx = mass[:, None] * dx
        if TAIL == _UNIFORM:
            dx -= tl.where(kept, 0.0, left / (T - K))
        if TAIL == _GHOST:
            top = tl.load(top_others + at, mask=q < Q, other=0.0)[:, None]
            rest = x - top - tl.load(log_others + at, mask=q < Q, other=0.0)[:, None]
            dx -= left * tl.exp(tl.where(kept, float("-inf"), rest))
        sum_a += _dot(tl.trans(dx - target), a_rows, SPLIT)
    place = db + (pair * T + token)[:, None] * D + d[None, :]
    tl.store(place, sum_a * (scale / Q), mask=(token < T)[:, None] & (d < D)[None, :])


@triton.jit
def _sweep(
    a_rows: tl.tensor,
    b: tl.tensor,
    b_token: tl.tensor,
    b_width: tl.tensor,
    index: tl.tensor,
    weight: tl.tensor,
    at: tl.tensor,
    real: tl.tensor,
    T: tl.constexpr,
    D: tl.tensor,
    scale: tl.tensor,
    K: tl.constexpr,
    TAIL: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WITH_GRAD: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Maximum, sum of e^(x - maximum), sum of that times b, and sum of b; over all tokens (ghost: those not kept)."""
    top = tl.full((at.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((at.shape[0],), tl.float32)
    mean_b = tl.zeros((at.shape[0], BLOCK_D), tl.float32)
    sum_b = tl.zeros((BLOCK_D,), tl.float32)
    d = tl.arange(0, BLOCK_D)
    for start in range(0, T, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        columns = _tile(b, token, token < T, d, D, b_token, b_width, SPLIT)
        x = _logits(a_rows, columns, token, T, scale)
        if TAIL == _GHOST:
            _, kept, _ = _targets(index, weight, at, real, token, K)
            x = tl.where(kept, float("-inf"), x)
        top, total, mean_b, p = _online(x, top, total, mean_b)
        if WITH_GRAD:
            mean_b += _dot(p, columns, SPLIT)
        if TAIL == _UNIFORM:
            sum_b += tl.sum(columns.to(tl.float32), axis=0)
    return top, total, mean_b, sum_b


@triton.jit
def _row_numbers(rows: tl.tensor, pair: tl.tensor, q: tl.tensor, Q: tl.tensor, HAS_ROWS: tl.constexpr) -> tl.tensor:
    """The token of each query row."""
    if HAS_ROWS:
        return tl.load(rows + pair * Q + q, mask=q < Q, other=0)
    else:  # Triton compiles one branch of a constant `if`, but always the code after it
        return q.to(tl.int64)


@triton.jit
def _tile(
    x: tl.tensor,
    token: tl.tensor,
    real: tl.tensor,
    d: tl.tensor,
    D: tl.tensor,
    by_token: tl.tensor,
    by_width: tl.tensor,
    SPLIT: tl.constexpr,
) -> tl.tensor:
    """Tokens of one view and head, zero where not `real`; in fp32 unless products are split."""
    place = x + token[:, None] * by_token + d[None, :] * by_width
    values = tl.load(place, mask=real[:, None] & (d < D)[None, :], other=0.0)
    if not SPLIT:
        values = values.to(tl.float32)
    return values


@triton.jit
def _logits(a_rows: tl.tensor, columns: tl.tensor, token: tl.tensor, T: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Logits of a tile, fp32, minus infinity beyond the last token."""
    x = tl.dot(a_rows, tl.trans(columns), input_precision="ieee")
    return tl.where((token < T)[None, :], x * scale, float("-inf"))


@triton.jit
def _dot(x: tl.tensor, y: tl.tensor, SPLIT: tl.constexpr) -> tl.tensor:
    """x y for fp32 x. For half-precision y, x is the sum of two half-precision numbers, which keeps 16 bits or more."""
    if SPLIT:
        upper = x.to(y.dtype)
        lower = (x - upper.to(tl.float32)).to(y.dtype)
        product = tl.dot(upper, y) + tl.dot(lower, y)
    else:
        product = tl.dot(x, y, input_precision="ieee")
    return product


@triton.jit
def _online(x: tl.tensor, top: tl.tensor, total: tl.tensor, mean_b: tl.tensor) -> tuple[tl.tensor, ...]:
    """One step of the online softmax: the new maximum, and the sums and exp(x) relative to it."""
    new_top = tl.maximum(top, tl.max(x, axis=1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # avoids inf - inf where a ghost's tile keeps all tokens
    p = tl.exp(x - base[:, None])
    fade = tl.exp(top - base)
    return new_top, total * fade + tl.sum(p, axis=1), mean_b * fade[:, None], p


@triton.jit
def _targets(
    index: tl.tensor, weight: tl.tensor, at: tl.tensor, real: tl.tensor, token: tl.tensor, K: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """The kept weights of a tile written out, which tokens are kept, and the mass of each row."""
    target = tl.zeros((at.shape[0], token.shape[0]), tl.float32)
    kept = target != 0.0
    mass = tl.zeros((at.shape[0],), tl.float32)
    for k in range(K):
        w = tl.load(weight + at * K + k, mask=real, other=0.0)
        hit = tl.load(index + at * K + k, mask=real, other=-1)[:, None] == token[None, :]
        target += tl.where(hit, w[:, None], 0.0)
        kept = kept | hit
        mass += w
    return target, kept, mass
