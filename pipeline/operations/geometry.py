"""Shear, translation and rotation: integers with cubic weights, a = -1."""

from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tinymim.pipeline.operations.arithmetic import sine_cosine
from tinymim.pipeline.operations.pixels import Colour, Pixels, buffer, strips

_FIELD: Final = 21  # bits of a channel's sum over a row of four pixels, within +-2^20
_FIELDS: Final = sum(1 << (_FIELD * channel + _FIELD - 1) for channel in range(3))  # lifts all three above 0


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
    for rows in strips(height, width):
        count = rows.stop - rows.start
        y, x = np.arange(rows.start, rows.stop)[:, None], np.arange(width)
        if axis == 2:  # three more columns, or three more rows, hold the neighbours
            shift, weights, along, across = fixed[rows, None], taps[:, rows, None], np.arange(-1, width + 2), y * width
            shape, pitch, step = (count, width + 3), width + 3, 1
        else:
            shift, weights, along, across = fixed, taps[:, None], np.arange(rows.start - 1, rows.stop + 2)[:, None], x
            shape, pitch, step = (count + 3, width), width, width
        places, narrow = buffer(0, np.int64, *shape), buffer(1, np.uint8, 3, *shape)
        np.add(along, shift >> 16, out=places)
        np.clip(places, 0, size - 1, out=places)
        if axis == 1:
            places *= width
        places += across
        flat.take(places, axis=1, mode="clip", out=narrow)
        # Rows lie end to end here, so that the loops of numpy are long; what crosses an end is not read.
        source, tap = buffer(2, np.int32, 3, narrow[0].size), buffer(3, np.int32, count, pitch)
        source[:] = narrow.reshape(3, -1)
        total, part = (buffer(place, np.int32, 3, count * pitch) for place in (4, 5))
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
        read, outside = buffer(0, np.int64, count, width), buffer(6, np.bool, count, width)
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
    source = buffer(0, np.int64, (height + 4) * (width + 4))
    source[:] = 0
    for plane in pixels.take(lines, axis=1).take(columns, axis=2).reshape(3, -1)[::-1]:
        source <<= _FIELD
        source += plane
    pitch, (wide, narrow), colours = width + 4, _cubic_tables(), np.array(fill, np.uint8)[:, None, None]
    columns = 2 * np.arange(width) + 1 - width
    out = np.empty_like(pixels)
    for rows in strips(height, width):
        shape = (rows.stop - rows.start, width)
        x, y, corner, place, line, product = (buffer(1 + k, np.int64, *shape) for k in range(6))
        taps_x, taps_y = buffer(7, np.int64, 4, *shape), buffer(8, np.int32, 4, *shape)
        totals, field = buffer(9, np.uint32, 3, *shape), buffer(10, np.uint32, *shape)
        outside, part = (buffer(11 + k, np.bool, *shape) for k in range(2))
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
