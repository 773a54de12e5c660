"""Operations that map each value through a table: integers and IEEE products, Pillow's results."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tinymim.pipeline.operations.pixels import Pixels

LEVELS: Final = np.arange(256)


def through(pixels: Pixels, table: npt.NDArray[Any]) -> Pixels:
    """Every value through a table of 256 values, which are clipped and cut to integers."""
    found = bytearray(pixels).translate(table.clip(0, 255).astype(np.uint8).tobytes())
    return np.frombuffer(found, np.uint8).reshape(pixels.shape)


def _by_channel(pixels: Pixels, table_of: Callable[[list[int]], npt.NDArray[Any] | None]) -> Pixels:
    """Every channel through the table that its histogram gives; None: unchanged."""
    tables = [table_of(np.bincount(plane.reshape(-1), minlength=256).tolist()) for plane in pixels]
    found = [plane if table is None else through(plane, table) for plane, table in zip(pixels, tables, strict=True)]
    return np.stack(found)


def invert(pixels: Pixels) -> Pixels:
    """Replace each value by 255 minus it."""
    return 255 - pixels


def posterize(pixels: Pixels, bits: int) -> Pixels:
    """Keep the upper `bits` bits, 0..8."""
    return pixels & np.uint8(256 - (1 << (8 - bits)))


def solarize(pixels: Pixels, threshold: int) -> Pixels:
    """Invert values of `threshold` and above."""
    return through(pixels, np.where(threshold <= LEVELS, 255 - LEVELS, LEVELS))


def solarize_add(pixels: Pixels, addend: int) -> Pixels:
    """Add to values below 128."""
    return through(pixels, np.where(LEVELS < 128, LEVELS + addend, LEVELS))


def auto_contrast(pixels: Pixels) -> Pixels:
    """Stretch each channel to 0..255."""

    def table(histogram: list[int]) -> npt.NDArray[Any] | None:
        used = [level for level, count in enumerate(histogram) if count]
        low, high = used[0], used[-1]
        if low == high:
            return None
        scale = 255.0 / (high - low)
        return (LEVELS * scale + -low * scale).astype(np.int64)  # cut towards zero

    return _by_channel(pixels, table)


def equalize(pixels: Pixels) -> Pixels:
    """Make each channel's histogram flat."""

    def table(histogram: list[int]) -> npt.NDArray[Any] | None:
        used = [count for count in histogram if count]
        step = (sum(used) - used[-1]) // 255
        if len(used) == 1 or not step:
            return None
        below = np.cumsum([0, *histogram[:-1]])
        return (step // 2 + below) // step

    return _by_channel(pixels, table)
