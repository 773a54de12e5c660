"""Counter-based randomness (I1): a number is a function of (view key, stream, counter) and of nothing else.

The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014; finaliser: Stafford's variant 13) in wrapping int64 operations: CPU and CUDA give identical bits. A view
key is a 64-bit hash of (seed, sample key, view index); its bits are read as a signed integer.

All of it is part of the sketch codec's version: a change here changes which rows a stored record is about.

Shapes: B view, H head, Q query row, T token.
"""

import math
from typing import Final, Literal

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from tinymim.configs.codecs import Relation

Purpose = Literal["rows", "rounding", "tail"]

PURPOSES: Final[dict[Purpose, int]] = {"rows": 0, "rounding": 1, "tail": 2}
RELATIONS: Final[dict[Relation, int]] = {"qk": 0, "vv": 1, "qq": 2, "kk": 3}


def _signed(bits: int) -> int:
    """The int64 with the bits of a 64-bit unsigned constant."""
    return bits - (1 << 64) if bits >= 1 << 63 else bits


_GAMMA: Final = _signed(0x9E3779B97F4A7C15)
_MIX_1: Final = _signed(0xBF58476D1CE4E5B9)
_MIX_2: Final = _signed(0x94D049BB133111EB)


def stream_of(purpose: Purpose, relation: Relation) -> int:
    """The stream for one purpose and relation: 16 x purpose + relation, from the tables above."""
    return 16 * PURPOSES[purpose] + RELATIONS[relation]


def uniforms(keys: Int64[Tensor, " B"], stream: int, shape: tuple[int, ...]) -> Float64[Tensor, "B ..."]:
    """Uniform numbers in [0, 1), multiples of 2^-53.

    Args:
        keys: int64 [B], one key a view.
        stream: which independent sequence of the key, see `stream_of`.
        shape: shape of the numbers of one view; number i in row-major order is number i of the sequence.

    Returns:
        float64 [B, *shape] on the device of `keys`.
    """
    assert keys.dtype == torch.int64, f"view keys are int64, got {keys.dtype}"
    # Two rounds of mixing: the streams of a key stay apart, and so do keys as regular as 0, 1, 2, ...
    state = _mix(_mix(keys + _GAMMA) + _signed((stream + 1) * _GAMMA % (1 << 64)))
    counter = torch.arange(1, math.prod(shape) + 1, device=keys.device) * _GAMMA
    bits = _mix(state[:, None] + counter)
    return (_shift_right(bits, 11).double() * 2.0**-53).reshape(len(keys), *shape)


def sample_rows(
    keys: Int64[Tensor, " B"], relation: Relation, heads: int, tokens: int, rows: int
) -> Int64[Tensor, "B H Q"]:
    """The query rows that a record is about: per view and head a stratified sample, spread over the image.

    The T tokens, on a ring, are cut into Q runs of T/Q (rounded) and one token is drawn from each; then the ring
    is turned by a uniform number of tokens. A token lies in run j with probability s_j / T (s_j the length of
    the run, over the turns) and is then drawn with 1 / s_j: each is in the sample with probability
    sum over j of 1 / T = Q / T, exactly, so means over the rows are unbiased. Neighbouring rows say nearly the
    same, so a spread sample has less variance than a simple random one (docs/decisions/006-sketch.md).

    Args:
        keys: int64 [B], one key a view.
        relation: each relation has its own sample.
        heads, tokens: H and T of the teacher; each head has its own sample.
        rows: how many rows; `tokens` or more gives all of them.

    Returns:
        int64 [B, H, Q], Q = min(rows, tokens), distinct and ascending along Q.
    """
    if rows >= tokens:
        return torch.arange(tokens, device=keys.device).expand(len(keys), heads, tokens)
    uniform = uniforms(keys, stream_of("rows", relation), (heads, rows + 1))
    edges = torch.arange(rows + 1, device=keys.device) * tokens // rows
    inside = (uniform[..., :rows] * edges.diff()).long()
    turn = (uniform[..., rows:] * tokens).long()
    return ((edges[:-1] + inside + turn) % tokens).sort(dim=-1).values


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's finaliser, int64 to int64."""
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift: torch's shift of int64 keeps the sign, the mask removes it."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
