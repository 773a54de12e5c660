"""Tables of positions and of position biases for another grid or window.

Shapes: H head, R row of a table, S side of its square, D side of the new one.
"""

import math

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from tinymim.models import backbone

_SIGNED, _UNSIGNED = "relative_position_bias_table", "attention_biases"
_BEIT_ROWS = 3  # behind BEiT's square: class token to patches, patches to it, and to itself


def fit_tables(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Resample the tables of other sizes to the model's; a table of another form stays, and will not fit.

    Absolute positions: bicubic. Biases by signed offset [R, H] (Swin, BEiT): geometric, as `spread_matrix` has it.
    Biases by absolute offset [H, R] (TinyViT): bicubic, as published.
    """
    wanted, found = model.state_dict(), dict(tensors)
    for name, table in tensors.items():
        target = wanted.get(name)
        if target is None or target.shape == table.shape or not table.is_floating_point() or table.ndim != target.ndim:
            continue
        if name == backbone.POSITIONS and table.ndim == 3 and backbone.is_plain(model):
            found[name] = _absolute(table, target, backbone.grid(model))
        elif name.endswith(_SIGNED) and table.ndim == 2 and table.shape[1] == target.shape[1]:
            found[name] = _signed(table, len(target))
        elif name.endswith(_UNSIGNED) and table.ndim == 2 and len(table) == len(target):
            found[name] = _unsigned(table, target.shape[1])
    return found


def _absolute(table: Tensor, target: Tensor, grid: tuple[int, int]) -> Tensor:
    if table.shape[1] == target.shape[1] or (table.shape[0], table.shape[2]) != (1, target.shape[2]):
        return table
    prefix = target.shape[1] - grid[0] * grid[1]
    # Some tables, as DeiT III's, have no row for the class token: it is as if that row were zero.
    # A distilled DeiT has a row more than a ViT, behind that of the class token.
    for own, missing in ((prefix, 0), (1, prefix - 1), (0, prefix)):
        patches = table.shape[1] - own
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            fitted = resample_abs_pos_embed(table.float(), list(grid), num_prefix_tokens=own)
            zeros = fitted.new_zeros(1, missing, fitted.shape[2])
            return torch.cat([fitted[:, :own], zeros, fitted[:, own:]], dim=1)
    return table


def _signed(table: Tensor, rows: int) -> Tensor:
    side, new = _side(len(table)), _side(rows)
    if side is None or new is None or side[1] != new[1]:
        return table
    square = table[: side[0] ** 2].double().T.unflatten(1, (side[0], side[0]))
    matrix = spread_matrix(side[0], new[0])
    resized = (matrix @ square @ matrix.T).flatten(1).T.to(table.dtype)
    return torch.cat([resized, table[side[0] ** 2 :]])


def _side(rows: int) -> tuple[int, int] | None:
    """The odd side of the square of offsets in a table, and the rows behind it."""
    for extra in (0, _BEIT_ROWS):
        side = math.isqrt(max(0, rows - extra))
        if side % 2 and side**2 == rows - extra:
            return side, extra
    return None


def _unsigned(table: Tensor, rows: int) -> Tensor:
    side, new = math.isqrt(table.shape[1]), math.isqrt(rows)
    if side**2 != table.shape[1] or new**2 != rows:
        return table
    square = table.float().unflatten(1, (side, side))[None]
    return nn.functional.interpolate(square, size=(new, new), mode="bicubic")[0].flatten(1).to(table.dtype)


def spread_matrix(side: int, new: int) -> Tensor:
    """float64 [D, S]: values at S offsets to D whole offsets, by a cubic spline between `offsets` (linear for S <= 3).

    Source: SimMIM's and BEiT's fine-tuning, which use SciPy's retired interp2d; this is its tensor product.
    """
    known, asked = offsets(side, new // 2), torch.arange(-(new // 2), new // 2 + 1, dtype=torch.float64)
    if side == 1:
        return torch.ones(new, 1, dtype=torch.float64)
    piece = torch.searchsorted(known, asked.clamp(known[0], known[-1]), right=True).clamp(1, side - 1) - 1
    step = known.diff()
    width = step[piece]
    right = (asked - known[piece]) / width
    left = 1 - right
    values = torch.eye(side, dtype=torch.float64)
    found = left[:, None] * values[piece] + right[:, None] * values[piece + 1]
    if side <= 3:
        return found
    bends = _second_derivatives(step)
    cubic = ((left**3 - left)[:, None] * bends[piece] + (right**3 - right)[:, None] * bends[piece + 1]) / 6
    return found + width[:, None] ** 2 * cubic


def offsets(side: int, reach: int) -> Tensor:
    """The places of S source offsets among the new ones: 0 and ±(1 + q + q^2 + ...), with the last at ±`reach`.

    Near offsets keep their place and far ones spread. q is found for any ratio; the published search stops at q = 2 and
    then clamps in silence. With a single step, S = 3, or a reach of 1, there is no q, and the steps are even.
    """
    steps = side // 2
    if steps < 2 or reach == 1:
        half = [reach * number / steps for number in range(1, steps + 1)]
    else:
        low, high = 1e-9, float(max(2, reach))
        for _ in range(200):
            ratio = (low + high) / 2
            low, high = (ratio, high) if sum(ratio**k for k in range(steps)) < reach else (low, ratio)
        half = [sum(high**k for k in range(number)) for number in range(1, steps + 1)]
        assert math.isclose(half[-1], reach, rel_tol=1e-9), f"{side} offsets do not reach {reach}"
        half[-1] = float(reach)
    return torch.tensor([*(-each for each in reversed(half)), 0.0, *half], dtype=torch.float64)


def _second_derivatives(step: Tensor) -> Tensor:
    """[S, S]: values to the second derivatives of their not-a-knot cubic spline; `step` [S - 1] between the places."""
    side = len(step) + 1
    system, given = torch.zeros(2, side, side, dtype=torch.float64)
    for row in range(1, side - 1):
        before, after = step[row - 1], step[row]
        system[row, row - 1 : row + 2] = torch.stack([before, 2 * (before + after), after])
        given[row, row - 1 : row + 2] = 6 * torch.stack([1 / before, -1 / before - 1 / after, 1 / after])
    system[0, :3] = torch.stack([step[1], -(step[0] + step[1]), step[0]])
    system[-1, -3:] = torch.stack([step[-1], -(step[-2] + step[-1]), step[-2]])
    found: Tensor = torch.linalg.solve(system, given)
    return found
