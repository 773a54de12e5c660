"""The turn of the hue, through Pillow's HSV of 8 bits."""

import numpy as np
import numpy.typing as npt

from tinymim.pipeline.operations.pixels import Pixels, strips


def hue(pixels: Pixels, turns: float) -> Pixels:
    """Turn the hue by a share of the circle, -0.5..0.5, through Pillow's HSV of 8 bits."""
    out = np.empty_like(pixels)
    offset = int(turns * 255) % 256
    for rows in strips(*pixels.shape[1:]):
        strip = pixels[:, rows]
        h, s, value = _hsv(strip)
        h = (h + offset) & 255
        sector = h * 6 // 255
        f, fs = (each.astype(np.float32).astype(np.float64) for each in (h * 6.0 / 255.0 - sector, s / 255.0))
        p = np.floor(value * (1.0 - fs) + 0.5)
        q = np.floor(value * (1.0 - fs * f) + 0.5)
        t = np.floor(value * (1.0 - fs * (1.0 - f)) + 0.5)
        six = sector % 6
        out[0, rows] = np.choose(six, [value, q, p, p, t, value])
        out[1, rows] = np.choose(six, [t, value, value, q, p, p])
        out[2, rows] = np.choose(six, [p, p, t, value, value, q])
    return out


def _hsv(pixels: Pixels) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Hue, saturation and value, each 0..255."""
    red, green, blue = (plane.astype(np.int64) for plane in pixels)
    high = np.maximum(np.maximum(red, green), blue)
    chroma = high - np.minimum(np.minimum(red, green), blue)
    span = np.maximum(chroma, 1).astype(np.float32)
    r, g, b = (((high - plane).astype(np.float32) / span).astype(np.float64) for plane in (red, green, blue))
    h = np.where(red == high, b - g, np.where(green == high, 2.0 + r - b, 4.0 + g - r))
    h = np.fmod(h.astype(np.float32).astype(np.float64) / 6.0 + 1.0, 1.0).astype(np.float32)
    s = chroma.astype(np.float32) / np.maximum(high, 1).astype(np.float32)
    h, s = ((each.astype(np.float64) * 255.0).astype(np.int64) for each in (h, s))
    return np.where(chroma == 0, 0, h), s, high
