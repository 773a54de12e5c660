"""`sketch_rows` as one fused Triton kernel, which computes, softmaxes and sketches rows of logits on the chip.

This module is imported only where it runs, because triton is not installed everywhere.

Shapes: B view, H head, Q query row, K kept entry, T token, D head width; in the kernel R rows of one block.
"""

import math
from functools import cache
from typing import Any, Final

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from tinymim.configs.codecs.relations import Relation
from tinymim.targets.relations.draws import stream_of
from tinymim.targets.relations.qkv import QKV
from tinymim.targets.relations.sparsify import LOG_GRID

# SplitMix64 as in targets/counter.py, in wrapping int64 arithmetic; the tests compare the bits with `uniforms`.
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
_MIX_2 = tl.constexpr(0x94D049BB133111EB - (1 << 64))
_BITS_53 = tl.constexpr((1 << 53) - 1)

_BLOCK_Q: Final = 16  # the minimum of tl.dot; 16 rows x 1024 tokens still fit into the registers of 16 warps
_KEYS_BYTES: Final = 32 << 10  # shared memory for one block of keys, T x part of D


def sketch_rows_triton(
    qkv: QKV,
    relation: Relation,
    rows: Int64[Tensor, "B H Q"] | None,
    view_keys: Int64[Tensor, " B"],
    head_k: int,
    tail_k: int,
) -> tuple[Int64[Tensor, "B H Q K"], Int64[Tensor, "B H Q K"], Int64[Tensor, "B H Q K"], Float32[Tensor, " B"]]:
    """The fields of `encode.RowSketch`; arguments as for `encode.sketch_rows`, T up to `encode.MAX_FUSED_TOKENS`."""
    a, b = qkv.pair(relation)
    batch, heads, tokens, width = a.shape
    queries = tokens if rows is None else rows.shape[2]
    head_index = view_keys.new_empty(batch, heads, queries, head_k)
    head_code = torch.empty_like(head_index)
    tail_index = view_keys.new_empty(batch, heads, queries, tail_k)
    row_entropy = a.new_empty(batch, heads, queries, dtype=torch.float32)
    programs = batch * heads * triton.cdiv(queries, _BLOCK_Q)
    if programs:  # a grid of no programs is an error
        with torch.cuda.device_of(a):
            _sketch_kernel[(programs,)](
                a,
                b,
                view_keys if rows is None else rows.contiguous(),
                view_keys.contiguous(),
                _grid(a.device),
                head_index,
                head_code,
                tail_index,
                row_entropy,
                *a.stride(),
                *b.stride(),
                heads,
                queries,
                tokens,
                1.0 / math.sqrt(width),
                _stream_offset(stream_of("rounding", relation)),
                _stream_offset(stream_of("tail", relation)),
                HAS_ROWS=rows is not None,
                WIDTH=width,
                HEAD_K=head_k,
                TAIL_K=tail_k,
                **launch_options(tokens, width, a.element_size()),
            )
    mean: Tensor = row_entropy.mean((1, 2))
    return head_index, head_code, tail_index, mean


def launch_options(tokens: int, width: int, element_bytes: int) -> dict[str, Any]:
    """Block sizes and compiler options for rows of T tokens and heads of width D."""
    block_t = max(16, triton.next_power_of_2(tokens))
    return {
        "BLOCK_Q": _BLOCK_Q,
        "BLOCK_T": block_t,
        "BLOCK_D": max(16, min(triton.next_power_of_2(width), _KEYS_BYTES // (block_t * element_bytes))),
        "num_warps": min(max(block_t // 32, 4), 16),
        "num_stages": 1,  # D is one block or two, so there is nothing to prefetch, and the keys need the memory
        "enable_fp_fusion": False,  # rounds products as torch does; Triton 3.9 warns about the default
    }


def _stream_offset(stream: int) -> int:
    """The number that a stream adds to a mixed key, as a signed int64."""
    bits = (stream + 1) * 0x9E3779B97F4A7C15 % (1 << 64)
    return bits - (1 << 64) if bits >= 1 << 63 else bits


@cache
def _grid(device: torch.device) -> Float64[Tensor, " 256"]:
    """The rounding grid, copied to a device once: a copy in every call would wait for the device."""
    return LOG_GRID.to(device, torch.float64)


@triton.jit
def _mix(z: tl.tensor) -> tl.tensor:
    """SplitMix64's finaliser; >> of int64 keeps the sign, and the mask removes it."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _MIX_1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def _uniform(state: tl.tensor, counter: tl.tensor) -> tl.tensor:
    """Number `counter` (int64, from 1) of a stream: float64 in [0, 1), a multiple of 2^-53."""
    bits = _mix(state + counter * _GAMMA)
    return ((bits >> 11) & _BITS_53).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _round_to_grid(value: tl.tensor, uniform: tl.tensor, grid_ptr: tl.tensor) -> tl.tensor:
    """`sparsify.quantise`: the codes of float32 [R] in [0, 1]. The logarithm is a guess, which the grid corrects."""
    guess = (tl.log2(tl.maximum(value, 7.62939453125e-06)) + 16.0) * 15.875 + 1.0  # 2^-17: log2 stays finite
    low = tl.minimum(tl.maximum(guess.to(tl.int32), 0), 254)
    p = value.to(tl.float64)
    low = tl.maximum(low - (tl.load(grid_ptr + low) > p).to(tl.int32), 0)
    low = tl.minimum(low + (tl.load(grid_ptr + low + 1) <= p).to(tl.int32), 254)
    floor = tl.load(grid_ptr + low)
    up = (p - floor) / (tl.load(grid_ptr + low + 1) - floor)
    return low + (uniform < up).to(tl.int32)


@triton.jit
def _sketch_kernel(
    a_ptr: tl.tensor,  # [B, H, T, D], any strides: the rows' side
    b_ptr: tl.tensor,  # [B, H, T, D], any strides: the columns' side
    rows_ptr: tl.tensor,  # int64 [B, H, Q]; not read without HAS_ROWS
    keys_ptr: tl.tensor,  # int64 [B]
    grid_ptr: tl.tensor,  # float64 [256]
    head_index_ptr: tl.tensor,  # int64 [B, H, Q, HEAD_K]
    head_code_ptr: tl.tensor,  # int64 [B, H, Q, HEAD_K]
    tail_index_ptr: tl.tensor,  # int64 [B, H, Q, TAIL_K]
    entropy_ptr: tl.tensor,  # float32 [B, H, Q]
    a_stride_b: tl.tensor,
    a_stride_h: tl.tensor,
    a_stride_t: tl.tensor,
    a_stride_d: tl.tensor,
    b_stride_b: tl.tensor,
    b_stride_h: tl.tensor,
    b_stride_t: tl.tensor,
    b_stride_d: tl.tensor,
    heads: tl.tensor,
    queries: tl.tensor,
    tokens: tl.tensor,
    scale: tl.tensor,
    rounding_offset: tl.tensor,
    tail_offset: tl.tensor,
    HAS_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # D
    HEAD_K: tl.constexpr,
    TAIL_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One program: BLOCK_Q query rows of one view and head against all T tokens."""
    blocks = tl.cdiv(queries, BLOCK_Q)
    view_head = tl.program_id(0) // blocks
    # int64 from here on: B x H x Q x K and B x T x H x D pass 2^31.
    view = (view_head // heads).to(tl.int64)
    head = (view_head % heads).to(tl.int64)
    query = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    wanted = query < queries
    line = view_head.to(tl.int64) * queries + query
    row = query
    if HAS_ROWS:
        row = tl.load(rows_ptr + line, mask=wanted, other=0)

    # ---------------------------------------------------------------- logits, fp32 for any dtype of a and b
    token = tl.arange(0, BLOCK_T)
    inside = token < tokens
    a_rows = a_ptr + view * a_stride_b + head * a_stride_h + row[:, None] * a_stride_t
    b_rows = b_ptr + view * b_stride_b + head * b_stride_h + token.to(tl.int64)[None, :] * b_stride_t
    logits = tl.zeros([BLOCK_Q, BLOCK_T], dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a = tl.load(a_rows + d[None, :] * a_stride_d, mask=wanted[:, None] & (d < WIDTH)[None, :], other=0.0)
        b = tl.load(b_rows + d[:, None] * b_stride_d, mask=inside[None, :] & (d < WIDTH)[:, None], other=0.0)
        logits = tl.dot(a, b, acc=logits, input_precision="ieee")  # the default would round fp32 to tf32
    logits = tl.where(inside[None, :], logits * scale, float("-inf"))

    # ---------------------------------------------------------------- softmax and entropy
    top = tl.max(logits, axis=1)
    exponential = tl.exp(logits - top[:, None])
    total = tl.sum(exponential, axis=1)
    probs = exponential / total[:, None]
    # -sum p log p = log total + sum p (top - logit). No term is negative, so nothing cancels in peaked rows.
    below_top = tl.where(probs > 0, top[:, None] - logits, 0.0)
    tl.store(entropy_ptr + line, tl.log(total) + tl.sum(probs * below_top, axis=1), mask=wanted)

    key_state = _mix(tl.load(keys_ptr + view) + _GAMMA)
    number = head * queries + query  # counter of the row within its view

    # ---------------------------------------------------------------- head: the first of equal entries
    rest = tl.where(inside[None, :], probs, -1.0)  # -1: in the head, or no token
    if HEAD_K > 0:
        for _ in range(HEAD_K):
            is_top = rest == tl.max(rest, axis=1)[:, None]
            first = tl.min(tl.where(is_top, token[None, :], BLOCK_T), axis=1)
            rest = tl.where(token[None, :] == first[:, None], -1.0, rest)
        rounding_state = _mix(key_state + rounding_offset)
        last = tl.full([BLOCK_Q], -1, dtype=tl.int32)
        for i in range(HEAD_K):
            in_head = (rest < 0) & (token[None, :] > last[:, None])
            last = tl.min(tl.where(in_head, token[None, :], BLOCK_T), axis=1)
            value = tl.sum(tl.where(token[None, :] == last[:, None], probs, 0.0), axis=1)
            code = _round_to_grid(value, _uniform(rounding_state, number * HEAD_K + i + 1), grid_ptr)
            tl.store(head_index_ptr + line * HEAD_K + i, last.to(tl.int64), mask=wanted)
            tl.store(head_code_ptr + line * HEAD_K + i, code.to(tl.int64), mask=wanted)

    # ---------------------------------------------------------------- tail
    # A parallel scan may fail to ascend in the last bit. So entries of zero are marked, the mass is the largest sum,
    # and a point below the mass always finds a non-zero entry.
    cumulative = tl.cumsum(tl.maximum(rest, 0.0).to(tl.float64), axis=1)
    cumulative = tl.where(rest > 0, cumulative, -1.0)
    mass = tl.maximum(tl.max(cumulative, axis=1), 0.0)
    below_mass = (mass.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)  # nextafter; unused for mass 0
    free = tl.min(tl.where(rest >= 0, token[None, :], BLOCK_T), axis=1)
    uniform = _uniform(_mix(key_state + tail_offset), number + 1)
    for i in range(TAIL_K):
        point = tl.minimum((uniform + i) / TAIL_K * mass, below_mass)
        drawn = tl.min(tl.where(cumulative > point[:, None], token[None, :], BLOCK_T), axis=1)
        drawn = tl.where(mass > 0, drawn, free)
        tl.store(tail_index_ptr + line * TAIL_K + i, drawn.to(tl.int64), mask=wanted)
