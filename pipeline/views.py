"""The view law: box, flip, operations and partner of view v of an image (I1). Caches store the law, not its draws.

The law is RandomResizedCrop as in torchvision (uniform area share, log-uniform aspect ratio, ten tries, central
fallback). Its numbers come from blake2b instead of a library's generator, so no version, worker, rank or batch can
change them.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from pydantic import ValidationError

from tinymim.configs.errors import CacheMismatch
from tinymim.configs.sections.values import ResizeRatio
from tinymim.configs.sections.views import ViewConfig
from tinymim.pipeline.operations.registry import Step, canaries
from tinymim.pipeline.pairs import Pairs, pair_canaries
from tinymim.pipeline.policies import policies_of_views
from tinymim.storage.manifest import check_canaries

_TRIES = 10
_BOX_DRAWS = 32  # more than RandomViews takes, and whole digests


class View(NamedTuple):
    """One crop of one image, in pixels of the decoded image."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


class ViewLaw(Protocol):
    """Maps (sample key, view index, image height, image width) to a view of `size` x `size` pixels."""

    size: int
    interpolation: str
    scaled_decode: bool  # whether large boxes are cut from a reduced image, see `reduction_of`
    pairs: Pairs | None  # the law by which views are mixed; None: they are not

    def __call__(self, key: str, view: int, height: int, width: int) -> View: ...

    def steps(self, key: str, view: int) -> Sequence[Step]:
        """The operations on the pixels of a view, after its flip."""


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


def view_rng(seed: int, key: str, view: int, skip: int = 0) -> Iterator[float]:
    """Yield uniform float64 numbers in [0, 1) for one view, without end, from number `skip`, a multiple of 8."""
    counter = 1 + skip // 8  # counter 0 is the view's identity
    while True:
        raw = _digest(seed, key, view, counter)
        for start in range(0, 64, 8):
            yield (int.from_bytes(raw[start : start + 8], "big") >> 11) * 2.0**-53
        counter += 1


def operation_rng(seed: int, key: str, view: int) -> Iterator[float]:
    """Uniform numbers in [0, 1) for the operations of a view; none of them is the box's."""
    return view_rng(seed, key, view, _BOX_DRAWS)


class RandomViews:
    """Boxes, flips, operations and pairs of `ViewConfig`, the law of both stages and of masked pre-training.

    Attributes:
        canaries: digests of all operations that the law may draw, and of pairs, as a manifest's environment holds them.

    Raises:
        ViewMismatch: an operation or a pair makes other pixels on this machine than it should; names all that do.
    """

    def __init__(self, config: ViewConfig) -> None:
        self.config = config
        self.size = config.size
        self.interpolation: str = config.interpolation
        self.scaled_decode = config.scaled_decode
        self._policies = policies_of_views(config.operations)
        self.canaries = canaries(frozenset[str]().union(*(policy.operations for policy in self._policies)))
        self.pairs = None if config.pairs is None else Pairs(config.pairs, config.seed, config.size)
        if self.pairs is not None:
            self.canaries |= pair_canaries()

    def at(self, size: int) -> "RandomViews":
        """The same law at another size: the same boxes and flips, other pixels."""
        return RandomViews(self.config.model_copy(update={"size": size}))

    def steps(self, key: str, view: int) -> Sequence[Step]:
        if not self._policies:
            return ()
        draws = operation_rng(self.config.seed, key, view)
        return [step for policy in self._policies for step in policy.draw(draws, self.size, self.size)]

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


def law_of(stored: Mapping[str, Any], made_with: Mapping[str, Any], size: int | None = None) -> RandomViews:
    """The law by which the views of a cache were drawn.

    Args:
        stored: the law in the cache's manifest.
        made_with: the environment in the manifest.
        size: one of the cache's sizes; None: that of the manifest.

    Raises:
        CacheMismatch: this version cannot draw its views.
        ViewMismatch: an operation of the law makes other pixels here; names all that do.
    """
    try:
        # Caches from before scaled decoding lack the field, and do not use it.
        law = RandomViews(ViewConfig.model_validate({"scaled_decode": False} | dict(stored)))
        check_canaries(made_with, law.canaries)
        return law if size is None or size == law.size else law.at(size)
    except ValidationError as error:
        raise CacheMismatch(
            "the views of this cache follow a law that this version of tinymim does not have",
            got="; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()),
            hint="use the version of tinymim that made the cache",
        ) from error


class CentreView:
    """The evaluation law: scale the short side to size x resize_ratio, then cut the central square.

    With "squeeze", the whole image becomes the square. Either is one box of the original image, so that the common
    renderer applies.
    """

    interpolation: str = "bicubic"
    scaled_decode: bool = False
    pairs: Pairs | None = None

    def __init__(self, size: int, resize_ratio: ResizeRatio) -> None:
        self.size = size
        self.resize_ratio = resize_ratio

    def steps(self, key: str, view: int) -> Sequence[Step]:
        return ()

    def __call__(self, key: str, view: int, height: int, width: int) -> View:
        if isinstance(self.resize_ratio, str):
            return View(0, 0, height, width, False)
        side = max(1, round(min(height, width) / self.resize_ratio))
        return View((height - side) // 2, (width - side) // 2, side, side, False)
