"""Random erasing: a box of one colour, or of noise from SHAKE-128."""

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tinymim.pipeline.operations.arithmetic import NORMAL_BITS, normal_quantiles
from tinymim.pipeline.operations.pixels import Colour, Pixels, Spread


@lru_cache(maxsize=8)
def _noise_tables(mean: Spread, deviation: Spread) -> npt.NDArray[np.uint8]:
    """uint8 [3, 4096]."""
    quantiles = np.array(normal_quantiles())
    values = np.array(mean)[:, None] + np.array(deviation)[:, None] * quantiles
    tables: npt.NDArray[np.uint8] = np.rint(values).clip(0, 255).astype(np.uint8)
    return tables


def erase_const(pixels: Pixels, top: int, left: int, height: int, width: int, fill: Colour) -> Pixels:
    """Replace a box by a colour."""
    out = pixels.copy()
    out[:, top : top + height, left : left + width] = np.array(fill, np.uint8)[:, None, None]
    return out


def erase_pixel(
    pixels: Pixels, top: int, left: int, height: int, width: int, key: int, mean: Spread, deviation: Spread
) -> Pixels:
    """Replace a box by normal noise of this mean and deviation per channel, in levels, rounded and clipped.

    Args:
        pixels: uint8 [3, H, W].
        top, left, height, width: the box.
        key: seed of the noise, 0 <= key < 2^64.
        mean: of the noise, per channel.
        deviation: of the noise, per channel.
    """
    out = pixels.copy()
    raw = hashlib.shake_128(b"tinymim/erase" + key.to_bytes(8, "big")).digest(6 * height * width)
    places = np.frombuffer(raw, "<u2").reshape(3, height, width) >> (16 - NORMAL_BITS)
    for channel, table in enumerate(_noise_tables(mean, deviation)):
        out[channel, top : top + height, left : left + width] = table.take(places[channel])
    return out
