"""Operations that blend an image with black, a grey or a smooth one, each rounded as in Pillow."""

import numpy as np
import numpy.typing as npt

from tinymim.pipeline.operations.pixels import Pixels, buffer, strips
from tinymim.pipeline.operations.tables import LEVELS, through


def _blend(other: npt.NDArray[np.float32], own: npt.NDArray[np.float32], factor: float) -> npt.NDArray[np.float32]:
    """other + factor * (own - other), clipped, each operation rounded to float32 as in Pillow; overwrites `own`."""
    own -= other
    own *= np.float32(factor)
    own += other
    return np.clip(own, 0, 255, out=own)


def _grey(pixels: Pixels) -> npt.NDArray[np.uint32]:
    """Pillow's luma, in 0..255. Buffers 0, 1."""
    total, part = (buffer(place, np.uint32, *pixels.shape[1:]) for place in range(2))
    total[:] = 0x8000
    for plane, weight in zip(pixels, (19595, 38470, 7471), strict=True):
        np.multiply(plane, weight, out=part, dtype=np.uint32)
        total += part
    total >>= 16
    return total


def brightness(pixels: Pixels, factor: float) -> Pixels:
    """Blend with black; 1 is the image itself."""
    return through(pixels, _blend(np.zeros(256, np.float32), LEVELS.astype(np.float32), factor))


def contrast(pixels: Pixels, factor: float) -> Pixels:
    """Blend with the mean grey; 1 is the image itself."""
    total = sum(int(_grey(pixels[:, rows]).sum(dtype=np.int64)) for rows in strips(*pixels.shape[1:]))
    mean = int(total / pixels[0].size + 0.5)
    return through(pixels, _blend(np.full(256, mean, np.float32), LEVELS.astype(np.float32), factor))


def color(pixels: Pixels, factor: float) -> Pixels:
    """Blend with the grey image; 1 is the image itself."""
    out = np.empty_like(pixels)
    for rows in strips(*pixels.shape[1:]):
        strip = pixels[:, rows]
        grey, own = buffer(2, np.float32, *strip.shape[1:]), buffer(3, np.float32, *strip.shape)
        grey[:], own[:] = _grey(strip), strip
        out[:, rows] = _blend(grey, own, factor)
    return out


def grayscale(pixels: Pixels) -> Pixels:
    """Give all channels Pillow's luma."""
    return color(pixels, 0.0)


def sharpness(pixels: Pixels, factor: float) -> Pixels:
    """Blend with the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13; 1 is the image itself. The border stays."""
    out = pixels.copy()
    _, height, width = pixels.shape
    for rows in strips(max(0, height - 2), width):
        count, inner = rows.stop - rows.start, max(0, width - 2)
        strip, wide = buffer(0, np.uint16, 3, count + 2, width), buffer(1, np.uint16, 3, count + 2, inner)
        smooth, part = (buffer(place, np.uint16, 3, count, inner) for place in (2, 3))
        other, own = (buffer(place, np.float32, 3, count, inner) for place in (4, 5))
        strip[:] = pixels[:, rows.start : rows.stop + 2]
        np.add(strip[:, :, :-2], strip[:, :, 1:-1], out=wide)
        wide += strip[:, :, 2:]
        np.add(wide[:, :-2], wide[:, 1:-1], out=smooth)
        smooth += wide[:, 2:]
        np.left_shift(strip[:, 1:-1, 1:-1], 2, out=part)
        smooth += part
        smooth <<= 1
        smooth += 13
        smooth //= 26  # rounded: 13 is odd, so there are no ties
        other[:], own[:] = smooth, strip[:, 1:-1, 1:-1]
        out[:, rows.start + 1 : rows.stop + 1, 1:-1] = _blend(other, own, factor)
    return out
