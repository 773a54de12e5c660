"""Masks on the patch grid: which patches of a view are hidden, a function of (seed, sample key, view index) (I1).

Units of u x u patches are hidden whole: u = 1 is MAE's random mask (He et al., CVPR 2022), u > 1 the blocks of SimMIM
and FastMIM (32 pixels there, so u = 2 for patches of 16). A mask is an order of the patches. The first ones are
visible, so every view of a batch has the same number of them.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinymim.configs.sections.masks import MaskConfig

MASKS_VERSION = 1  # another one where a mask hides other patches: states of the old one are not resumed


def mask_order(seed: int, key: str, view: int, rows: int, columns: int, unit: int = 1) -> npt.NDArray[np.int64]:
    """The place of every patch in the order in which patches stay visible.

    Args:
        seed, key, view: what the mask is a function of.
        rows, columns: the patch grid; multiples of `unit`.
        unit: side of a unit in patches.

    Returns:
        int64 [rows * columns] in raster order, a permutation. Patches of a unit are neighbours in it.
    """
    order: npt.NDArray[np.int64] = mask_orders(seed, [(key, view)], rows, columns, unit)[0].numpy()
    return order


def mask_orders(seed: int, named: Iterable[tuple[str, int]], rows: int, columns: int, unit: int = 1) -> Tensor:
    """`mask_order` of B views, given as (sample key, view index): int64 [B, rows * columns]."""
    across, units = columns // unit, rows * columns // unit**2
    raw = b"".join(
        hashlib.shake_128(f"tinymim/mask/{seed}/{view}/{key}".encode()).digest(8 * units) for key, view in named
    )
    draws = np.frombuffer(raw, ">u8").reshape(-1, units).astype(np.uint64)  # sorted faster than foreign bytes
    places = np.empty(draws.shape, np.int64)
    np.put_along_axis(places, draws.argsort(axis=1, kind="stable"), np.arange(units)[None], axis=1)
    y, x = np.divmod(np.arange(rows * columns), columns)
    return torch.from_numpy(places[:, y // unit * across + x // unit] * unit**2 + y % unit * unit + x % unit)


def visible_patches(
    mask: MaskConfig | None, named: Iterable[tuple[str, int]], grid: tuple[int, int], device: torch.device
) -> Tensor | None:
    """The visible patches of B views, int64 [B, M]: raster-order numbers, ascending.

    Args:
        mask: the law of masks.
        named: the views, one or more, as (sample key, view index).
        grid: rows and columns of patches.
        device: where the result is wanted; a GPU is not waited for.

    Returns:
        None without a mask.

    Raises:
        RecipeError: the mask does not fit the grid.
    """
    if mask is None:
        return None
    orders = mask_orders(mask.seed, named, *grid, mask.unit)
    visible = mask.num_visible(*grid)
    found = (orders < visible).nonzero()[:, 1].view(-1, visible)
    # Memory that is not pinned is copied before `to` returns.
    return (found.pin_memory() if device.type == "cuda" else found).to(device, non_blocking=True)
