"""Gaussian blur by box blurs, in integers."""

import math

import numpy as np
import numpy.typing as npt

from tinymim.pipeline.operations.pixels import Pixels, strips


def gaussian_blur(pixels: Pixels, sigma: float) -> Pixels:
    """Pillow's Gaussian blur: three box blurs of fractional length per direction (Gwosdek et al., 2011)."""
    if sigma <= 0:
        return pixels
    one = np.float32(1)
    variance = np.float32(sigma) * np.float32(sigma) / np.float32(3)
    length = np.float32(math.sqrt(12.0 * float(variance) + 1.0))
    whole = np.float32(math.floor((float(length) - 1.0) / 2.0))
    part = (2 * whole + one) * (whole * (whole + one) - 3 * variance)
    radius = whole + part / (6 * (variance - (whole + one) * (whole + one)))
    inner = int(np.float32(1 << 24) / (radius * 2 + one))
    edge = ((1 << 24) - (2 * int(radius) + 1) * inner) // 2
    out = pixels
    for axis in (2, 1):
        source, out = out, np.empty_like(pixels)
        for lines in strips(source.shape[3 - axis], source.shape[axis]):
            place = (slice(None), lines) if axis == 2 else (slice(None), slice(None), lines)
            strip = source[place]
            for _ in range(3):
                strip = _box_blur(strip, axis, int(radius), inner, edge)
            out[place] = strip
    return out


def _box_blur(pixels: Pixels, axis: int, radius: int, inner: int, edge: int) -> Pixels:
    """`inner` / 2^24 of 2 radius + 1 pixels and `edge` / 2^24 of their two neighbours; the image's edges repeat."""
    size = pixels.shape[axis]
    places = np.arange(-radius - 1, size + radius + 1).clip(0, size - 1)
    padded = pixels.take(places, axis=axis).astype(np.uint32)

    def window(start: int) -> npt.NDArray[np.uint32]:
        return padded[:, :, start : start + size] if axis == 2 else padded[:, start : start + size]

    total = window(1).copy()
    for start in range(2, 2 * radius + 2):
        total += window(start)
    total *= np.uint32(inner)
    ends = window(0) + window(2 * radius + 2)
    ends *= np.uint32(edge)
    total += ends
    total += np.uint32(1 << 23)
    total >>= np.uint32(24)
    return total.astype(np.uint8)
