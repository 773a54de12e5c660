"""The two unbiased pieces of the sketch: stochastic rounding on a log grid, and systematic draws.

Shapes: B view, H head, Q query row, K kept entry, T token; "..." is any shape.
"""

from functools import cache
from typing import Final

import torch
from jaxtyping import Float, Float32, Float64, Int64, Shaped
from torch import Tensor

# Part of cache format version 1. Code 0 is 0; codes 1..255 run from 2^-16 to 1 in equal ratios of 2^(16/254), 4.5 %.
# The values are Python floats, rounded to fp32 once, so encoder and decoder agree to the bit on every device.
LOG_GRID: Final[Tensor] = torch.tensor([0.0] + [2.0 ** (-16 + 16 * i / 254) for i in range(255)], dtype=torch.float32)


def quantise(probs: Float[Tensor, "..."], uniform: Float64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """Round probabilities to the log grid so that the *expectation* is exact: E[dequantise(code)] = p.

    With grid neighbours lo <= p < hi, the code of hi is taken with probability (p - lo) / (hi - lo), hence
    E = lo + (hi - lo) (p - lo) / (hi - lo) = p. The rounding is linear in p, because an unbiased rounding of log p
    has E > p (Jensen).

    Args:
        probs: values in [0, 1].
        uniform: float64 in [0, 1), same shape.

    Returns:
        int64 codes 0..255, same shape.
    """
    grid = LOG_GRID.to(probs.device, torch.float64)
    p = probs.double()
    low = (torch.searchsorted(grid, p, right=True) - 1).clamp(0, len(grid) - 2)
    up = (p - grid[low]) / (grid[low + 1] - grid[low])
    return low + (uniform < up)


def dequantise(code: Shaped[Tensor, "..."]) -> Float32[Tensor, "..."]:
    """The grid value of each code: float32, same shape."""
    return _grid(code.device)[code.long()]


@cache
def _grid(device: torch.device) -> Tensor:
    """The grid on a device, copied once: every copy waits for a GPU."""
    return LOG_GRID.to(device)


def top_entries(
    probs: Float[Tensor, "B H Q T"], count: int
) -> tuple[Int64[Tensor, "B H Q K"], Float[Tensor, "B H Q K"]]:
    """Token indices (ascending) and values of the `count` largest entries of every row; count may be 0."""
    index = probs.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    return index, probs.gather(-1, index)


def systematic_draws(
    probs: Float[Tensor, "B H Q T"],
    head_index: Int64[Tensor, "B H Q K"],
    uniform: Float64[Tensor, "B H Q"],
    count: int,
) -> Int64[Tensor, "B H Q K"]:
    """Draw `count` tokens of every row, outside its head, in proportion to their probability.

    Systematic sampling (Madow 1949): with m the mass outside the head and c_j its cumulative sum, the points
    x_i = m (u + i) / count, i = 0..count-1, each pick the j with c_{j-1} <= x_i < c_j. x_i is uniform over
    the i-th of `count` equal parts of [0, m), so j is picked N_j times with E[N_j] = sum over i of
    |[c_{j-1}, c_j) in part i| / |part i| = count p_j / m. N_j differs from that by less than 1, which
    independent draws do not promise.

    An entry of the head or of probability 0 has an empty interval and is never drawn. For a row without mass
    outside its head, the first token outside is drawn (its weight is 0 in expectation).

    Args:
        probs: rows that sum to one.
        head_index: int64 tokens to leave out, distinct and ascending, fewer than T.
        uniform: float64 in [0, 1), one number u a row.
        count: draws a row.

    Returns:
        int64 [B, H, Q, count] token indices, ascending, with repetition.
    """
    # `cumsum(dtype=float64)` of fp32 rows converts them one by one: six times slower than two separate operations.
    cumulative = probs.double()
    if head_index.shape[-1]:
        cumulative = cumulative.scatter(-1, head_index, 0.0)
    cumulative = cumulative.cumsum(-1)
    total = cumulative[..., -1:]
    points = (uniform[..., None] + torch.arange(count, device=probs.device)) / count * total
    # (u + i) / count may round to 1. The largest point inside [0, m) picks the last non-empty entry.
    points = points.minimum(total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, points, right=True)
    # Head indices ascend, so those equal to their position form the run 0, 1, ...; its length is the first free token.
    free = (head_index == torch.arange(head_index.shape[-1], device=probs.device)).sum(-1, keepdim=True)
    return torch.where(total > 0, drawn, free)
