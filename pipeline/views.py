"""The view law: the box and flip of view v of an image, and their form in a cache (I1).

The law is RandomResizedCrop as in torchvision (uniform area share, log-uniform aspect ratio, ten tries, central
fallback). Its numbers come from blake2b instead of a library's generator, so no version, worker, rank or batch can
change them.

A law that draws more adds fields to `View`, and arrays to `VIEW_ARRAYS`, `to_arrays` and `from_arrays`. No other file
names these arrays except storage/layout.py, which lists the arrays of every unit.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tinymim.configs.errors import ViewMismatch
from tinymim.configs.sections import ViewConfig

VIEW_ARRAYS: Final = ("box", "flip")  # the drawn values
DIGEST: Final = "digest"  # uint64 digest of the rendered pixels of a view (I2)
_TRIES = 10


class View(NamedTuple):
    """One crop of one image, in pixels of the decoded image."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def to_arrays(views: Sequence[View]) -> dict[str, npt.NDArray[Any]]:
    """The stored form of B views: `box` int32 [B, 4] (top, left, height, width) and `flip` uint8 [B]."""
    return {
        "box": np.array([view[:4] for view in views], dtype=np.int32).reshape(-1, 4),
        "flip": np.array([view.flip for view in views], dtype=np.uint8),
    }


def from_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> Iterator[View]:
    """The views from the arrays of `to_arrays`, in order."""
    columns = (*arrays["box"].T.tolist(), arrays["flip"].astype(bool).tolist())
    return map(View._make, zip(*columns, strict=True))


class ViewLaw(Protocol):
    """Maps (sample key, view index, image height, image width) to a view of `size` x `size` pixels."""

    size: int
    interpolation: str
    scaled_decode: bool  # whether large boxes are cut from a reduced image, see `reduction_of`

    def __call__(self, key: str, view: int, height: int, width: int) -> View: ...


def reduction_of(view: View, size: int) -> int:
    """The largest reduction of 8, 4, 2 that keeps both sides of the box at least `size` pixels long; else 1."""
    short = min(view.height, view.width)
    return next((reduction for reduction in (8, 4, 2) if short >= reduction * size), 1)


def reduced(view: View, reduction: int) -> View:
    """The box in an image decoded at 1/`reduction`. Each edge is rounded to the nearest pixel edge, halves up.

    A side of at least reduction x size pixels stays at least `size` long, and the box stays inside the image.
    """
    if reduction == 1:
        return view
    half = reduction // 2
    top, left = (view.top + half) // reduction, (view.left + half) // reduction
    bottom = (view.top + view.height + half) // reduction
    right = (view.left + view.width + half) // reduction
    return View(top, left, bottom - top, right - left, view.flip)


def view_key(seed: int, key: str, view: int) -> int:
    """The 64-bit identity of a view as a signed integer. It seeds every draw about the view, also in the codec."""
    return int.from_bytes(_digest(seed, key, view, 0)[:8], "big", signed=True)


def _digest(seed: int, key: str, view: int, counter: int) -> bytes:
    # The key comes last, since it is the only field that may contain a slash.
    return hashlib.blake2b(f"{seed}/{view}/{counter}/{key}".encode(), digest_size=64, person=b"tinymim/view").digest()


def view_rng(seed: int, key: str, view: int) -> Iterator[float]:
    """Yield uniform float64 numbers in [0, 1) for one view, without end."""
    counter = 1  # counter 0 is the view's identity
    while True:
        raw = _digest(seed, key, view, counter)
        for start in range(0, 64, 8):
            yield (int.from_bytes(raw[start : start + 8], "big") >> 11) * 2.0**-53
        counter += 1


class RandomViews:
    """RandomResizedCrop and flip of `ViewConfig`, the law of both stages and of masked pre-training."""

    def __init__(self, config: ViewConfig) -> None:
        self.config = config
        self.size = config.size
        self.interpolation: str = config.interpolation
        self.scaled_decode = config.scaled_decode

    def __call__(self, key: str, view: int, height: int, width: int) -> View:
        draws = view_rng(self.config.seed, key, view)
        flip = next(draws) < self.config.flip
        (scale_low, scale_high), (ratio_low, ratio_high) = self.config.scale, self.config.ratio
        log_low, log_high = math.log(ratio_low), math.log(ratio_high)
        for _ in range(_TRIES):
            area = height * width * (scale_low + (scale_high - scale_low) * next(draws))
            ratio = math.exp(log_low + (log_high - log_low) * next(draws))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top, left = int(next(draws) * (height - h + 1)), int(next(draws) * (width - w + 1))
                return View(top, left, h, w, flip)
        h, w = _largest_within(height, width, ratio_low, ratio_high)
        return View((height - h) // 2, (width - w) // 2, h, w, flip)


def _largest_within(height: int, width: int, ratio_low: float, ratio_high: float) -> tuple[int, int]:
    """Height and width of the largest box whose width / height lies within the limits."""
    ratio = width / height
    if ratio < ratio_low:
        return max(1, min(height, round(width / ratio_low))), width
    if ratio > ratio_high:
        return height, max(1, min(width, round(height * ratio_high)))
    return height, width


class CentreView:
    """The evaluation law: scale the short side to size x resize_ratio, then cut the central square.

    It is expressed as one box of the original image, so that the common renderer applies.
    """

    interpolation: str = "bicubic"
    scaled_decode: bool = False

    def __init__(self, size: int, resize_ratio: float) -> None:
        self.size = size
        self.resize_ratio = resize_ratio

    def __call__(self, key: str, view: int, height: int, width: int) -> View:
        side = max(1, round(min(height, width) / self.resize_ratio))
        return View((height - side) // 2, (width - side) // 2, side, side, False)


class StoredViews:
    """The law of a cache, which looks views up instead of drawing them.

    It must be called once per item, in the order of the items. Items of unreadable images may be skipped.

    Args:
        law: the manifest's view law.
        keys: the sample keys of the B items.
        arrays: the arrays of `VIEW_ARRAYS`, first axis B.
    """

    def __init__(self, law: Mapping[str, Any], keys: Sequence[str], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        self.size: int = law["size"]
        self.interpolation: str = law["interpolation"]
        self.scaled_decode: bool = law.get("scaled_decode", False)  # older caches do not use it
        self._views = zip(keys, from_arrays(arrays), strict=True)

    def __call__(self, key: str, view: int, height: int, width: int) -> View:
        stored = next(stored for name, stored in self._views if name == key)
        if stored.top + stored.height > height or stored.left + stored.width > width:
            raise ViewMismatch(
                f"image '{key}', view {view}: the stored box lies outside the image",
                got=f"{width} x {height} pixels",
                expected=f"at least {stored.left + stored.width} x {stored.top + stored.height}",
                hint="the image was replaced since the cache was made",
            )
        return stored
