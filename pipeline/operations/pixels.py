"""Pixels, and the strips and buffers in which operations process them.

Images are processed in strips of rows, in buffers that stay: strips fit the processor's cache, and memory that is fresh
from the system costs more than the arithmetic on it.

Shapes: pixels are uint8 [3, H, W] (RGB).
"""

import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Spread = tuple[float, float, float]

_STRIP = 16384  # pixels of a strip: 192 KiB as int32 [3, ...]


def strips(height: int, width: int) -> Iterator[slice]:
    """The rows of an image in slices, each of one row or more."""
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


buffer = _Buffers()
