"""Counter-based randomness (I1): a number is a function of (view key, stream, counter) alone.

The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014; finaliser: Stafford's variant 13) in wrapping int64 operations: CPU and CUDA give identical bits. A view
key is a 64-bit hash of (seed, sample key, view index); its bits are read as a signed integer.

This file is part of the codecs' versions: a change here changes the meaning of stored records.

Shapes: B view.
"""

import math
from typing import Final

import torch
from jaxtyping import Float64, Int64
from torch import Tensor


def _signed(bits: int) -> int:
    """The int64 with the bits of a 64-bit unsigned constant."""
    return bits - (1 << 64) if bits >= 1 << 63 else bits


_GAMMA: Final = _signed(0x9E3779B97F4A7C15)
_MIX_1: Final = _signed(0xBF58476D1CE4E5B9)
_MIX_2: Final = _signed(0x94D049BB133111EB)


def uniforms(keys: Int64[Tensor, " B"], stream: int, shape: tuple[int, ...]) -> Float64[Tensor, "B ..."]:
    """Uniform numbers in [0, 1), multiples of 2^-53.

    Args:
        keys: int64 [B], one key a view.
        stream: number of an independent sequence of the key; each kind numbers its own.
        shape: shape of one view's numbers; number i in row-major order is number i of the sequence.

    Returns:
        float64 [B, *shape] on the device of `keys`.
    """
    assert keys.dtype == torch.int64, f"view keys are int64, got {keys.dtype}"
    # Two rounds of mixing keep the streams of a key apart, and also keys as regular as 0, 1, 2, ...
    state = _mix(_mix(keys + _GAMMA) + _signed((stream + 1) * _GAMMA % (1 << 64)))
    counter = torch.arange(1, math.prod(shape) + 1, device=keys.device) * _GAMMA
    bits = _mix(state[:, None] + counter)
    return (_shift_right(bits, 11).double() * 2.0**-53).reshape(len(keys), *shape)


def spread(
    keys: Int64[Tensor, " B"], stream: int, shape: tuple[int, ...], tokens: int, count: int
) -> Int64[Tensor, "B ... Q"]:
    """Samples of `count` out of `tokens` tokens, spread over them; every token is as likely.

    The T tokens, on a ring, are cut into Q runs of T/Q (rounded) and one token is drawn from each. Then the ring
    is turned by a uniform number of tokens. A token lies in run j with probability s_j / T (s_j is the length of
    the run, over the turns) and is then drawn with probability 1 / s_j. Each token is therefore in the sample with
    probability sum over j of 1 / T = Q / T, exactly.

    Args:
        keys: int64 [B], one key a view.
        stream: as in `uniforms`.
        shape: shape of one view's samples, each drawn on its own; () for one sample.
        tokens, count: T and Q < T.

    Returns:
        int64 [B, *shape, Q], distinct and ascending along Q.
    """
    uniform = uniforms(keys, stream, (*shape, count + 1))
    edges = torch.arange(count + 1, device=keys.device) * tokens // count
    inside = (uniform[..., :count] * edges.diff()).long()
    turn = (uniform[..., count:] * tokens).long()
    return ((edges[:-1] + inside + turn) % tokens).sort(dim=-1).values


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's finaliser, int64 to int64."""
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift: torch's shift of int64 keeps the sign, the mask removes it."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
