"""The embedded image set: drawn textures with labels, seeded and unlimited.

An image is one of ten textures (stripes, checks, dots, ...) with random colours, wavelength, rotation, phase and warp,
under uneven light, behind clutter, with noise. The label is the texture. Colour, scale, direction and position carry
no information about it, so raw pixels and a random network do badly, while a network trained to continue structure
(masked image modelling) does well. Image `i` of a set is a function of (seed, i).
"""

import hashlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

CLASSES = ("stripes", "checks", "dots", "rings", "zigzag", "bricks", "triangles", "crosses", "waves", "cells")
IMAGE_SIZE = 80  # pixels per side
_SUPERSAMPLE = 2
_JPEG_QUALITY = 92
# Raise it when any pixel of the set changes: a teacher trained on the set names this version.
VERSION = 1


class _Draws:
    """Uniform numbers in [0, 1) from a blake2b stream, equal on every machine and library version (I1)."""

    def __init__(self, seed: int, index: int) -> None:
        self._prefix = f"drawn/{VERSION}/{seed}/{index}/".encode()
        self._count = 0

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        self._count += 1
        raw = hashlib.blake2b(self._prefix + str(self._count).encode(), digest_size=8).digest()
        return low + (high - low) * ((int.from_bytes(raw, "big") >> 11) * 2.0**-53)

    def colour(self) -> Array:
        return np.array([self(), self(), self()])

    def integers(self, below: int, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
        """Integers in [0, below), below <= 256, from one hash. Their bias, under 10 %, does not matter for noise."""
        raw = hashlib.shake_128(self._prefix + b"noise").digest(int(np.prod(shape)))
        return (np.frombuffer(raw, np.uint8) % below).astype(np.int64).reshape(shape)


def _saw(x: Array) -> Array:
    """The distance to the nearest integer, 0..0.5."""
    return np.abs(x - np.round(x))


def _stripes(u: Array, v: Array, d: _Draws) -> Mask:
    return _saw(u) < d(0.1, 0.17) * 1.5


def _checks(u: Array, v: Array, d: _Draws) -> Mask:
    return np.asarray((np.floor(u * 1.4) + np.floor(v * 1.4)) % 2 == 0)


def _dots(u: Array, v: Array, d: _Draws) -> Mask:
    shifted = u + 0.5 * (np.floor(v) % 2)
    return np.hypot(_frac(shifted) - 0.5, _frac(v) - 0.5) < d(0.26, 0.36)


def _rings(u: Array, v: Array, d: _Draws) -> Mask:
    shifted = u + 0.5 * (np.floor(v) % 2)
    radius = np.hypot(_frac(shifted) - 0.5, _frac(v) - 0.5)
    return np.abs(radius - 0.33) < d(0.08, 0.11)


def _zigzag(u: Array, v: Array, d: _Draws) -> Mask:
    return _saw(u + d(0.9, 1.2) * _saw(v * 0.75)) < 0.23


def _bricks(u: Array, v: Array, d: _Draws) -> Mask:
    row = np.floor(v * 1.2)
    joint = d(0.07, 0.11)
    return (_saw(v * 1.2) < joint) | (_saw(u * 0.65 + 0.5 * (row % 2)) < joint * 0.6)


def _triangles(u: Array, v: Array, d: _Draws) -> Mask:
    row = v * 1.1
    return _frac(row) > 2 * _saw(u * 0.9 + 0.5 * (np.floor(row) % 2))


def _crosses(u: Array, v: Array, d: _Draws) -> Mask:
    shifted = u + 0.5 * (np.floor(v) % 2)
    a, b = np.abs(_frac(shifted) - 0.5), np.abs(_frac(v) - 0.5)
    arm = d(0.09, 0.13)
    return ((a < arm) & (b < 0.36)) | ((b < arm) & (a < 0.36))


def _waves(u: Array, v: Array, d: _Draws) -> Mask:
    return _saw(u + d(0.35, 0.5) * np.sin(2 * np.pi * v * 0.55)) < 0.24


def _cells(u: Array, v: Array, d: _Draws) -> Mask:
    """The borders of a jittered Voronoi lattice, where the distances to the two nearest seeds are close."""
    salt = d(0.0, 1000.0)
    base_u, base_v = np.floor(u), np.floor(v)
    distances = []
    for du in (-1, 0, 1):
        for dv in (-1, 0, 1):
            cu, cv = base_u + du, base_v + dv
            jitter = np.sin(cu * 127.1 + cv * 311.7 + salt) * 43758.5453
            other = np.sin(cu * 269.5 + cv * 183.3 + salt) * 43758.5453
            distances.append(np.hypot(cu + _frac(jitter) - u, cv + _frac(other) - v))
    nearest = np.partition(np.stack(distances), 1, axis=0)
    return np.asarray(nearest[1] - nearest[0] < 0.14)


def _frac(x: Array) -> Array:
    return x - np.floor(x)


_PATTERNS: dict[str, Callable[[Array, Array, _Draws], Mask]] = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "rings": _rings,
    "zigzag": _zigzag,
    "bricks": _bricks,
    "triangles": _triangles,
    "crosses": _crosses,
    "waves": _waves,
    "cells": _cells,
}


def draw(seed: int, index: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Draw image `index` of the set `seed`.

    Returns:
        uint8 pixels [IMAGE_SIZE, IMAGE_SIZE, 3] and the class number (index mod 10).
    """
    d = _Draws(seed, index)
    label = index % len(CLASSES)
    side = IMAGE_SIZE * _SUPERSAMPLE
    y, x = np.meshgrid(np.arange(side) / side - 0.5, np.arange(side) / side - 0.5, indexing="ij")

    angle, repeats = d(0, 2 * np.pi), d(4.5, 9.0)  # texture periods across the image
    warp, phase = d(0.0, 0.05), d(0, 2 * np.pi)
    xw = x + warp * np.sin(2 * np.pi * (y * d(0.7, 1.6)) + phase)
    yw = y + warp * np.sin(2 * np.pi * (x * d(0.7, 1.6)) - phase)
    u = repeats * (np.cos(angle) * xw + np.sin(angle) * yw) + d(0, 10)
    v = repeats * (-np.sin(angle) * xw + np.cos(angle) * yw) + d(0, 10)
    mask = _PATTERNS[CLASSES[label]](u, v, d)

    ink, paper = _two_colours(d)
    pixels = paper + mask[..., None] * (ink - paper)
    for _ in range(int(d(1, 4))):
        pixels = _clutter(pixels, x, y, d)
    light = 1.0 + d(-0.5, 0.5) * x + d(-0.5, 0.5) * y
    pixels = pixels * light[..., None]

    small = pixels.reshape(IMAGE_SIZE, _SUPERSAMPLE, IMAGE_SIZE, _SUPERSAMPLE, 3).mean(axis=(1, 3))
    noise = d.integers(25, small.shape) - 12
    return np.clip(np.rint(small * 255.0) + noise, 0, 255).astype(np.uint8), label


def _two_colours(d: _Draws) -> tuple[Array, Array]:
    """Two clearly different colours; either may be the darker one."""
    for _ in range(100):
        ink, paper = d.colour(), d.colour()
        if np.abs(ink - paper).sum() > 0.75:
            break
    return ink, paper


def _clutter(pixels: Array, x: Array, y: Array, d: _Draws) -> Array:
    """Draw one flat ellipse or bar of random colour over the picture."""
    cx, cy, angle = d(-0.5, 0.5), d(-0.5, 0.5), d(0, np.pi)
    a, b = d(0.05, 0.2), d(0.04, 0.12)
    s = np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)
    t = -np.sin(angle) * (x - cx) + np.cos(angle) * (y - cy)
    inside = (s / a) ** 2 + (t / b) ** 2 < 1 if d() < 0.5 else (np.abs(s) < a) & (np.abs(t) < b)
    return np.where(inside[..., None], d.colour(), pixels)


def samples(seed: int, first: int, count: int) -> list[tuple[str, bytes, int]]:
    """Draw `count` samples from image `first` on: key, JPEG bytes, class number."""
    found = []
    for index in range(first, first + count):
        pixels, label = draw(seed, index)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=_JPEG_QUALITY)
        found.append((f"{CLASSES[label]}/{index:06d}", buffer.getvalue(), label))
    return found
