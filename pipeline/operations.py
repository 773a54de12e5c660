"""Augmentations of uint8 pixels with the same bytes on every machine. docs/views.md.

Each follows Pillow's result, which timm uses: exactly for tables and blends, to one level of 255 where Pillow resamples
in double precision. Only three kinds of arithmetic occur: integers, single IEEE operations of numpy (an elementwise sum
or product is rounded alone, so no compiler can fuse two of them), and SHAKE-128 for noise. No library's random
generator, matrix product, reduction of floats, or transcendental function takes part.

Images are processed in strips of rows, in buffers that stay: strips fit the processor's cache, and memory that is fresh
from the system costs more than the arithmetic on it.

Shapes: pixels are uint8 [3, H, W] (RGB).
"""

import hashlib
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from tinymim.storage.manifest import check_canaries

Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Spread = tuple[float, float, float]

_STRIP = 16384  # pixels of a strip: 192 KiB as int32 [3, ...]
_NORMAL_BITS = 12


class Step(NamedTuple):
    """One operation of `OPERATIONS` and its arguments behind the pixels."""

    operation: str
    arguments: tuple[Any, ...] = ()


def apply(pixels: Pixels, steps: Sequence[Step]) -> Pixels:
    """The result of `steps`, in order. `pixels` stays as it is; without steps it is the result itself."""
    for operation, arguments in steps:
        pixels = OPERATIONS[operation](pixels, *arguments)
    return pixels


def _strips(height: int, width: int) -> Iterator[slice]:
    rows = max(1, _STRIP // width)
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


class _Buffers(threading.local):
    """Arrays for intermediate results, by place. An array is valid until its place is used again by this thread."""

    def __init__(self) -> None:
        self._raw: dict[int, npt.NDArray[np.uint8]] = {}

    def __call__(self, place: int, kind: type[np.generic], *shape: int) -> npt.NDArray[Any]:
        size = math.prod(shape) * np.dtype(kind).itemsize
        if place not in self._raw or len(self._raw[place]) < size:
            self._raw[place] = np.empty(size, np.uint8)
        return self._raw[place][:size].view(kind).reshape(shape)


_buffer = _Buffers()


# ---------------------------------------------------------------- tables: integers and IEEE products, Pillow's results


def _through(pixels: Pixels, table: npt.NDArray[Any]) -> Pixels:
    """Every value through a table of 256 values, which are clipped and cut to integers."""
    found = bytearray(pixels).translate(table.clip(0, 255).astype(np.uint8).tobytes())
    return np.frombuffer(found, np.uint8).reshape(pixels.shape)


def _by_channel(pixels: Pixels, table_of: Callable[[list[int]], npt.NDArray[Any] | None]) -> Pixels:
    """Every channel through the table that its histogram gives; None: unchanged."""
    tables = [table_of(np.bincount(plane.reshape(-1), minlength=256).tolist()) for plane in pixels]
    found = [plane if table is None else _through(plane, table) for plane, table in zip(pixels, tables, strict=True)]
    return np.stack(found)


_LEVELS: Final = np.arange(256)


def invert(pixels: Pixels) -> Pixels:
    """Replace each value by 255 minus it."""
    return 255 - pixels


def posterize(pixels: Pixels, bits: int) -> Pixels:
    """Keep the upper `bits` bits, 0..8."""
    return pixels & np.uint8(256 - (1 << (8 - bits)))


def solarize(pixels: Pixels, threshold: int) -> Pixels:
    """Invert values of `threshold` and above."""
    return _through(pixels, np.where(threshold <= _LEVELS, 255 - _LEVELS, _LEVELS))


def solarize_add(pixels: Pixels, addend: int) -> Pixels:
    """Add to values below 128."""
    return _through(pixels, np.where(_LEVELS < 128, _LEVELS + addend, _LEVELS))


def auto_contrast(pixels: Pixels) -> Pixels:
    """Stretch each channel to 0..255."""

    def table(histogram: list[int]) -> npt.NDArray[Any] | None:
        used = [level for level, count in enumerate(histogram) if count]
        low, high = used[0], used[-1]
        if low == high:
            return None
        scale = 255.0 / (high - low)
        return (_LEVELS * scale + -low * scale).astype(np.int64)  # cut towards zero

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


def brightness(pixels: Pixels, factor: float) -> Pixels:
    """Blend with black; 1 is the image itself."""
    return _through(pixels, _blend(np.zeros(256, np.float32), _LEVELS.astype(np.float32), factor))


def contrast(pixels: Pixels, factor: float) -> Pixels:
    """Blend with the mean grey; 1 is the image itself."""
    total = sum(int(_grey(pixels[:, rows]).sum(dtype=np.int64)) for rows in _strips(*pixels.shape[1:]))
    mean = int(total / pixels[0].size + 0.5)
    return _through(pixels, _blend(np.full(256, mean, np.float32), _LEVELS.astype(np.float32), factor))


# ---------------------------------------------------------------- blends, hue, blur


def _grey(pixels: Pixels) -> npt.NDArray[np.uint32]:
    """Pillow's luma, in 0..255. Buffers 0, 1."""
    total, part = (_buffer(place, np.uint32, *pixels.shape[1:]) for place in range(2))
    total[:] = 0x8000
    for plane, weight in zip(pixels, (19595, 38470, 7471), strict=True):
        np.multiply(plane, weight, out=part, dtype=np.uint32)
        total += part
    total >>= 16
    return total


def _blend(other: npt.NDArray[np.float32], own: npt.NDArray[np.float32], factor: float) -> npt.NDArray[np.float32]:
    """other + factor * (own - other), clipped, each operation rounded to float32 as in Pillow; overwrites `own`."""
    own -= other
    own *= np.float32(factor)
    own += other
    return np.clip(own, 0, 255, out=own)


def color(pixels: Pixels, factor: float) -> Pixels:
    """Blend with the grey image; 1 is the image itself."""
    out = np.empty_like(pixels)
    for rows in _strips(*pixels.shape[1:]):
        strip = pixels[:, rows]
        grey, own = _buffer(2, np.float32, *strip.shape[1:]), _buffer(3, np.float32, *strip.shape)
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
    for rows in _strips(max(0, height - 2), width):
        count, inner = rows.stop - rows.start, max(0, width - 2)
        strip, wide = _buffer(0, np.uint16, 3, count + 2, width), _buffer(1, np.uint16, 3, count + 2, inner)
        smooth, part = (_buffer(place, np.uint16, 3, count, inner) for place in (2, 3))
        other, own = (_buffer(place, np.float32, 3, count, inner) for place in (4, 5))
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


def hue(pixels: Pixels, turns: float) -> Pixels:
    """Turn the hue by a share of the circle, -0.5..0.5, through Pillow's HSV of 8 bits."""
    out = np.empty_like(pixels)
    offset = int(turns * 255) % 256
    for rows in _strips(*pixels.shape[1:]):
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
        for lines in _strips(source.shape[3 - axis], source.shape[axis]):
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


# ---------------------------------------------------------------- geometry: integers with cubic weights, a = -1


def _cubic(fraction: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.int64]:
    """Weights [4, ...] of the pixels at -1, 0, 1, 2 for fractions of 2^-bits, as multiples of 2^-bits; sum 2^bits."""
    d = fraction / (1 << bits)
    first, third, fourth = d * (d * (2.0 - d) - 1.0), d * (d * (1.0 - d) + 1.0), d * d * (d - 1.0)
    weights = [np.rint(weight * (1 << bits)).astype(np.int64) for weight in (first, third, fourth)]
    return np.stack([weights[0], (1 << bits) - sum(weights), weights[1], weights[2]])


def _shifted(pixels: Pixels, shifts: npt.NDArray[np.floating[Any]], axis: int, fill: Colour) -> Pixels:
    """Move each line along `axis` (2: rows, 1: columns) by a shift in pixels, given where a result is read from."""
    _, height, width = pixels.shape
    size = pixels.shape[axis]
    fixed = np.rint(shifts * 65536.0).astype(np.int64)
    taps = _cubic(fixed & 0xFFFF, 16).astype(np.int32)
    flat, colours = np.ascontiguousarray(pixels).reshape(3, -1), np.array(fill, np.uint8)[:, None, None]
    out = np.empty_like(pixels)
    for rows in _strips(height, width):
        count = rows.stop - rows.start
        y, x = np.arange(rows.start, rows.stop)[:, None], np.arange(width)
        if axis == 2:  # three more columns, or three more rows, hold the neighbours
            shift, weights, along, across = fixed[rows, None], taps[:, rows, None], np.arange(-1, width + 2), y * width
            shape, pitch, step = (count, width + 3), width + 3, 1
        else:
            shift, weights, along, across = fixed, taps[:, None], np.arange(rows.start - 1, rows.stop + 2)[:, None], x
            shape, pitch, step = (count + 3, width), width, width
        places, narrow = _buffer(0, np.int64, *shape), _buffer(1, np.uint8, 3, *shape)
        np.add(along, shift >> 16, out=places)
        np.clip(places, 0, size - 1, out=places)
        if axis == 1:
            places *= width
        places += across
        flat.take(places, axis=1, mode="clip", out=narrow)
        # Rows lie end to end here, so that the loops of numpy are long; what crosses an end is not read.
        source, tap = _buffer(2, np.int32, 3, narrow[0].size), _buffer(3, np.int32, count, pitch)
        source[:] = narrow.reshape(3, -1)
        total, part = (_buffer(place, np.int32, 3, count * pitch) for place in (4, 5))
        stop = source.shape[1] - 3 * step
        for k in range(4):
            tap[:] = weights[k]
            window = source[:, k * step : k * step + stop]
            np.multiply(window, tap.reshape(-1)[:stop], out=(part if k else total)[:, :stop])
            if k:
                total += part
        total >>= 16
        np.clip(total, 0, 255, out=total)
        out[:, rows] = total.reshape(3, count, pitch)[:, :, :width]
        read, outside = _buffer(0, np.int64, count, width), _buffer(6, np.bool, count, width)
        np.add(((x if axis == 2 else y) << 16) + 0x8000, shift, out=read)
        np.greater_equal(read.view(np.uint64), np.uint64(size << 16), out=outside)  # negative places, too
        np.copyto(out[:, rows], colours, where=outside)
    return out


def shear_x(pixels: Pixels, factor: float, fill: Colour) -> Pixels:
    """Row y is read from x + factor * (y + 1/2)."""
    return _shifted(pixels, factor * (np.arange(pixels.shape[1]) + 0.5), 2, fill)


def shear_y(pixels: Pixels, factor: float, fill: Colour) -> Pixels:
    """Column x is read from y + factor * (x + 1/2)."""
    return _shifted(pixels, factor * (np.arange(pixels.shape[2]) + 0.5), 1, fill)


def translate_x(pixels: Pixels, distance: float, fill: Colour) -> Pixels:
    """Read from x + distance, in pixels."""
    return _shifted(pixels, np.full(pixels.shape[1], distance), 2, fill)


def translate_y(pixels: Pixels, distance: float, fill: Colour) -> Pixels:
    """Read from y + distance, in pixels."""
    return _shifted(pixels, np.full(pixels.shape[2], distance), 1, fill)


_FIELD: Final = 21  # bits of a channel's sum over a row of four pixels, within +-2^20
_FIELDS: Final = sum(1 << (_FIELD * channel + _FIELD - 1) for channel in range(3))  # lifts all three above 0


@lru_cache(maxsize=1)
def _cubic_tables() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    table = _cubic(np.arange(2048), 11)
    return table, table.astype(np.int32)


def rotate(pixels: Pixels, degrees: float, fill: Colour) -> Pixels:
    """Turn about the centre, counter-clockwise."""
    _, height, width = pixels.shape
    sine, cosine = (round(value * 2**32) for value in sine_cosine(degrees))
    lines, columns = (np.arange(-2, size + 2).clip(0, size - 1) for size in (height, width))
    # The three channels of a pixel share an int64, so that one gather and one product serve all.
    source = _buffer(0, np.int64, (height + 4) * (width + 4))
    source[:] = 0
    for plane in pixels.take(lines, axis=1).take(columns, axis=2).reshape(3, -1)[::-1]:
        source <<= _FIELD
        source += plane
    pitch, (wide, narrow), colours = width + 4, _cubic_tables(), np.array(fill, np.uint8)[:, None, None]
    columns = 2 * np.arange(width) + 1 - width
    out = np.empty_like(pixels)
    for rows in _strips(height, width):
        shape = (rows.stop - rows.start, width)
        x, y, corner, place, line, product = (_buffer(1 + k, np.int64, *shape) for k in range(6))
        taps_x, taps_y = _buffer(7, np.int64, 4, *shape), _buffer(8, np.int32, 4, *shape)
        totals, field = _buffer(9, np.uint32, 3, *shape), _buffer(10, np.uint32, *shape)
        outside, part = (_buffer(11 + k, np.bool, *shape) for k in range(2))
        lines = (2 * np.arange(rows.start, rows.stop) + 1 - height)[:, None]
        np.subtract(columns * cosine + (width << 32), lines * sine, out=x)  # in 2^-33 pixels
        np.add(columns * sine + (height << 32), lines * cosine, out=y)
        np.greater_equal(x.view(np.uint64), np.uint64(width << 33), out=outside)  # negative places, too
        outside |= np.greater_equal(y.view(np.uint64), np.uint64(height << 33), out=part)
        for places, target in ((y, corner), (x, place)):
            places -= 1 << 32
            np.right_shift(places, 33, out=target)
            places >>= 22
            places &= 2047
        corner *= pitch
        corner += place
        corner += pitch + 1  # outside the image it may be anywhere: the fill hides what is taken there
        wide.take(x, axis=1, mode="clip", out=taps_x)
        narrow.take(y, axis=1, mode="clip", out=taps_y)
        # The lift of 2^20 is in each total 2^11 times, since weights sum to 2^11: 2^31, which this takes away mod 2^32.
        totals[:] = 1 << 31
        for row, weight in enumerate(taps_y.view(np.uint32)):
            for column, tap in enumerate(taps_x):
                held = product if column else line
                source[row * pitch + column :].take(corner, mode="clip", out=held)
                held *= tap
                if column:
                    line += product
            line += _FIELDS
            for channel, total in enumerate(totals):
                np.copyto(field, line, casting="unsafe")  # the lower 32 bits
                if channel < 2:
                    field &= np.uint32((1 << _FIELD) - 1)
                    line >>= _FIELD
                field *= weight
                total += field
        found = totals.view(np.int32)
        found >>= 22
        np.clip(found, 0, 255, out=found)
        out[:, rows] = found
        np.copyto(out[:, rows], colours, where=outside)
    return out


def sine_cosine(degrees: float) -> tuple[float, float]:
    """By their series, since the last bit may differ between math libraries."""
    x = math.fmod(degrees, 360.0) * (math.pi / 180.0)
    terms = _terms(x, 60)
    signed = [-term if power % 4 > 1 else term for power, term in enumerate(terms)]
    return math.fsum(signed[1::2]), math.fsum(signed[::2])  # `sum` rounds differently since Python 3.12


def exponential(x: float) -> float:
    """e to the power of x, |x| < 4, by its series."""
    return math.fsum(_terms(x, 60))


def _terms(x: float, count: int) -> list[float]:
    """x^n / n!"""
    terms = [1.0]
    for power in range(1, count):
        terms.append(terms[-1] * x / power)
    return terms


# ---------------------------------------------------------------- erasing


@lru_cache(maxsize=1)
def normal_quantiles() -> tuple[float, ...]:
    """The middles of 4096 equal shares of the normal law, as multiples of 2^-16."""
    shares = 1 << _NORMAL_BITS
    return tuple(round(NormalDist().inv_cdf((k + 0.5) / shares) * 65536) / 65536 for k in range(shares))


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
    places = np.frombuffer(raw, "<u2").reshape(3, height, width) >> (16 - _NORMAL_BITS)
    for channel, table in enumerate(_noise_tables(mean, deviation)):
        out[channel, top : top + height, left : left + width] = table.take(places[channel])
    return out


# ---------------------------------------------------------------- all of them, and their canaries

_CANARY_ARGUMENTS: Final[Mapping[Callable[..., Pixels], Sequence[tuple[Any, ...]]]] = {
    auto_contrast: [()],
    brightness: [(0.37,), (1.9,)],
    color: [(0.37,), (1.9,)],
    contrast: [(0.37,), (1.9,)],
    equalize: [()],
    erase_const: [(3, 5, 20, 17, (124, 116, 104))],
    erase_pixel: [(3, 5, 20, 17, 2**53 - 1, (123.7, 116.3, 103.5), (58.4, 57.1, 57.4))],
    gaussian_blur: [(0.1,), (1.7,), (5.0,)],
    grayscale: [()],
    hue: [(-0.2,), (0.07,)],
    invert: [()],
    posterize: [(0,), (3,)],
    rotate: [(27.3, (124, 116, 104)), (-13.0, (0, 0, 0))],
    sharpness: [(0.37,), (1.9,)],
    shear_x: [(0.27, (124, 116, 104)), (-0.1, (0, 0, 0))],
    shear_y: [(0.27, (124, 116, 104)), (-0.1, (0, 0, 0))],
    solarize: [(100,)],
    solarize_add: [(99,)],
    translate_x: [(7.3, (124, 116, 104)), (-11.8, (0, 0, 0))],
    translate_y: [(7.3, (124, 116, 104)), (-11.8, (0, 0, 0))],
}
OPERATIONS: Final[Mapping[str, Callable[..., Pixels]]] = {function.__name__: function for function in _CANARY_ARGUMENTS}
CANARIES: Final[Mapping[str, str]] = {
    "auto_contrast": "c8d99c48ff9d2eca",
    "brightness": "bd7bb4aeb2a35a42",
    "color": "2eac392a6a1bea70",
    "contrast": "c4d7ccd8f3a86e1c",
    "equalize": "6f8435ee1c948974",
    "erase_const": "9b384a584b9f6d06",
    "erase_pixel": "c5ebda8a7f725be7",
    "gaussian_blur": "6d626be3e630264d",
    "grayscale": "cd0a29ae9ee8eee1",
    "hue": "fc813b2b465f6bfc",
    "invert": "1702fde4d6c4ad89",
    "posterize": "b60384deff673942",
    "rotate": "2904c89e16bb2e06",
    "sharpness": "3208bb9e77e60bf0",
    "shear_x": "44b067335e96efe3",
    "shear_y": "5cb66c3d38395939",
    "solarize": "7f0900e571a9c6a0",
    "solarize_add": "00085613267e2a9a",
    "translate_x": "170788e8459dd2cd",
    "translate_y": "ec80745a4346b1f7",
    "normal_quantiles": "a82813b1a0a99f25",
}


def canary_digests(names: Collection[str] = CANARIES.keys()) -> dict[str, str]:
    """By name, 64 bits of blake2b over an operation's results for fixed pixels and arguments, or over the table."""
    ramp = np.arange(3 * 40 * 48, dtype=np.int64)
    picture = (ramp * ramp * 31 + ramp * 17) % 251 * 4 // 5 + ramp % 48
    pixels = picture.astype(np.uint8).reshape(3, 40, 48)
    found = {}
    for function, several in _CANARY_ARGUMENTS.items():
        name = function.__name__
        if name in names:
            results = b"".join(OPERATIONS[name](pixels, *arguments).tobytes() for arguments in several)
            found[name] = hashlib.blake2b(results, digest_size=8).hexdigest()
    if "normal_quantiles" in names:
        table = np.array(normal_quantiles()).astype("<f8").tobytes()
        found["normal_quantiles"] = hashlib.blake2b(table, digest_size=8).hexdigest()
    return found


def canaries(names: Collection[str] = CANARIES.keys()) -> dict[str, str]:
    """Digests of operations as a manifest's environment holds them, after comparing them with `CANARIES`.

    Args:
        names: operations, with or without the table of normal numbers that some laws read.

    Raises:
        ViewMismatch: an operation differs; names all that do.
    """
    digests = canary_digests({*names, "normal_quantiles"} if names else ())
    found = {f"canary.{name}": digest for name, digest in digests.items()}
    check_canaries({f"canary.{name}": CANARIES[name] for name in digests}, found)
    return found
