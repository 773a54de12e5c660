"""Laws that draw the operations of a view: RandAugment, random erasing, colour jitter, blur and the like.

A policy maps uniform numbers to `Step`s of pipeline/operations/. The laws are those of timm and torchvision. The
numbers come from the hash of pipeline/views.py, so that the steps are a function of (seed, sample key, view index).
Constants that depend on a model in timm, fill colour and noise, are arguments here.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Literal, NamedTuple, Protocol

from tinymim.configs.rand_augment import RandAugmentNotation, parse_rand_augment
from tinymim.configs.sections.views import OperationsConfig
from tinymim.pipeline.operations.arithmetic import exponential, normal_quantiles
from tinymim.pipeline.operations.pixels import Colour, Spread
from tinymim.pipeline.operations.registry import Step

POLICIES_VERSION = 1  # another one where a policy makes other pixels: states of the old one are not resumed


class Constants(NamedTuple):
    """Colours in levels of 255 that policies fill with; written into manifests and reports.

    Attributes:
        fill: colour of gaps.
        mean: mean of noise per channel.
        deviation: standard deviation of noise per channel.
    """

    fill: Colour
    mean: Spread
    deviation: Spread

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float]) -> "Constants":
        """timm's constants for a model with this normalisation of pixels in 0..1."""
        red, green, blue = (min(255, round(255 * value)) for value in mean)
        levels = [tuple(255.0 * value for value in values) for values in (mean, std)]
        return cls((red, green, blue), *levels)  # type: ignore[arg-type]  # three values each


class Policy(Protocol):
    """Draws steps for an image of `height` x `width` pixels."""

    @property
    def operations(self) -> frozenset[str]:
        """Names of all operations that it may draw."""

    def draw(self, draws: Iterator[float], height: int, width: int) -> list[Step]: ...


def _normal(draws: Iterator[float]) -> float:
    quantiles = normal_quantiles()
    return quantiles[int(next(draws) * len(quantiles))]


def _between(draws: Iterator[float], low: float, high: float) -> float:
    return low + (high - low) * next(draws)


def _signed(value: float, draws: Iterator[float]) -> float:
    return -value if next(draws) > 0.5 else value


def _enhanced(share: float, draws: Iterator[float]) -> float:
    return share * 1.8 + 0.1


def _enhanced_more(share: float, draws: Iterator[float]) -> float:
    return max(0.1, 1.0 + _signed(share * 0.9, draws))


# By timm's name: our operation, and its argument from magnitude / 10.
_LEVELS: Final[dict[str, tuple[str, Callable[[float, Iterator[float]], float] | None]]] = {
    "AutoContrast": ("auto_contrast", None),
    "Equalize": ("equalize", None),
    "Invert": ("invert", None),
    "Rotate": ("rotate", lambda share, draws: _signed(share * 30.0, draws)),
    "Posterize": ("posterize", lambda share, draws: min(8, int(share * 4))),
    "PosterizeIncreasing": ("posterize", lambda share, draws: max(0, 4 - int(share * 4))),
    "Solarize": ("solarize", lambda share, draws: min(256, int(share * 256))),
    "SolarizeIncreasing": ("solarize", lambda share, draws: 256 - min(256, int(share * 256))),
    "SolarizeAdd": ("solarize_add", lambda share, draws: min(128, int(share * 110))),
    "Color": ("color", _enhanced),
    "ColorIncreasing": ("color", _enhanced_more),
    "Contrast": ("contrast", _enhanced),
    "ContrastIncreasing": ("contrast", _enhanced_more),
    "Brightness": ("brightness", _enhanced),
    "BrightnessIncreasing": ("brightness", _enhanced_more),
    "Sharpness": ("sharpness", _enhanced),
    "SharpnessIncreasing": ("sharpness", _enhanced_more),
    "ShearX": ("shear_x", lambda share, draws: _signed(share * 0.3, draws)),
    "ShearY": ("shear_y", lambda share, draws: _signed(share * 0.3, draws)),
    "TranslateXRel": ("translate_x", lambda share, draws: _signed(share * 0.45, draws)),
    "TranslateYRel": ("translate_y", lambda share, draws: _signed(share * 0.45, draws)),
    "Desaturate": ("color", lambda share, draws: 1.0 - min(1.0, 0.5 + 0.5 * share)),
    "GaussianBlur": ("gaussian_blur", lambda share, draws: min(2.0, 0.1 + 1.9 * share)),
}
_FILLED: Final = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


@dataclass(frozen=True)
class RandAugment:
    """timm's RandAugment with bicubic resampling.

    Attributes:
        notation: the parsed notation.
        fill: colour of gaps.
    """

    notation: RandAugmentNotation
    fill: Colour

    @property
    def operations(self) -> frozenset[str]:
        return frozenset(_LEVELS[name][0] for name in self.notation.weights)

    def draw(self, draws: Iterator[float], height: int, width: int) -> list[Step]:
        drawn = [self._step(name, draws, height, width) for name in self._names(draws)]
        return [step for step in drawn if step is not None]

    def _names(self, draws: Iterator[float]) -> list[str]:
        left = dict(self.notation.weights)
        names = list[str]()
        for _ in range(self.notation.layers):
            place, sums = next(draws) * math.fsum(left.values()), accumulate(left.values())
            # Rounding may leave no sum above the place of the last name.
            name = next((name for name, below in zip(left, sums, strict=True) if place < below), [*left][-1])
            names.append(name)
            if not self.notation.replace:
                del left[name]
        return names

    def _step(self, name: str, draws: Iterator[float], height: int, width: int) -> Step | None:
        notation = self.notation
        if next(draws) > notation.probability:
            return None
        magnitude: float = notation.magnitude
        if math.isinf(notation.deviation):
            magnitude *= next(draws)
        elif notation.deviation:
            magnitude += notation.deviation * _normal(draws)
        operation, argument = _LEVELS[name]
        if argument is None:
            return Step(operation)
        value = argument(max(0.0, min(magnitude, notation.largest)) / 10, draws)
        value *= {"translate_x": width, "translate_y": height}.get(operation, 1)
        return Step(operation, (value, self.fill) if operation in _FILLED else (value,))


@dataclass(frozen=True)
class RandomErasing:
    """timm's random erasing of one box, 2 % to 33 % of the area, in pixel space.

    Attributes:
        probability: share of the images.
        mode: const, the fill colour; pixel, normal noise.
        constants: fill and noise.
    """

    probability: float
    mode: Literal["const", "pixel"]
    constants: Constants

    @property
    def operations(self) -> frozenset[str]:
        return frozenset({f"erase_{self.mode}"})

    def draw(self, draws: Iterator[float], height: int, width: int) -> list[Step]:
        if next(draws) >= self.probability:
            return []
        for _ in range(10):
            area = height * width * _between(draws, 0.02, 1 / 3)
            aspect = exponential(_between(draws, -1.2039728043259361, 1.2039728043259361))  # log(0.3)
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < h < height and 0 < w < width:
                top, left = int(next(draws) * (height - h + 1)), int(next(draws) * (width - w + 1))
                if self.mode == "const":
                    return [Step("erase_const", (top, left, h, w, self.constants.fill))]
                key = int(next(draws) * 2**53)
                return [Step("erase_pixel", (top, left, h, w, key, *self.constants[1:]))]
        return []


@dataclass(frozen=True)
class ColorJitter:
    """torchvision's ColorJitter: factors from 1 - x to 1 + x, hue from -x to x turns, in random order.

    Attributes:
        probability: share of the images.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float = 0.0
    probability: float = 1.0

    @property
    def operations(self) -> frozenset[str]:
        strengths = {
            "brightness": self.brightness,
            "contrast": self.contrast,
            "color": self.saturation,
            "hue": self.hue,
        }
        return frozenset(name for name, strength in strengths.items() if strength)

    def draw(self, draws: Iterator[float], height: int, width: int) -> list[Step]:
        if next(draws) >= self.probability:
            return []
        left: list[Step] = []
        for name, x in (("brightness", self.brightness), ("contrast", self.contrast), ("color", self.saturation)):
            if x:
                left.append(Step(name, (_between(draws, max(0.0, 1.0 - x), 1.0 + x),)))
        if self.hue:
            left.append(Step("hue", (_between(draws, -self.hue, self.hue),)))
        return [left.pop(int(next(draws) * len(left))) for _ in range(len(left))]


@dataclass(frozen=True)
class GaussianBlur:
    """Blur with a uniform deviation, as MoCo-v3 and DINO do (0.1 to 2 pixels).

    Attributes:
        probability: share of the images.
        sigma: smallest and largest deviation in pixels.
    """

    probability: float
    sigma: tuple[float, float] = (0.1, 2.0)

    @property
    def operations(self) -> frozenset[str]:
        return frozenset({"gaussian_blur"})

    def draw(self, draws: Iterator[float], height: int, width: int) -> list[Step]:
        return [] if next(draws) >= self.probability else [Step("gaussian_blur", (_between(draws, *self.sigma),))]


@dataclass(frozen=True)
class Sometimes:
    """One fixed step for a share of the images: grayscale, or solarize at 128.

    Attributes:
        probability: share of the images.
    """

    probability: float
    step: Step

    @property
    def operations(self) -> frozenset[str]:
        return frozenset({self.step.operation})

    def draw(self, draws: Iterator[float], height: int, width: int) -> list[Step]:
        return [] if next(draws) >= self.probability else [self.step]


def policies_of_views(config: OperationsConfig | None) -> tuple[Policy, ...]:
    """The policies of a view law, in the order in which they are applied."""
    if config is None:
        return ()
    policies: list[Policy] = []
    if config.color_jitter_share and any(config.color_jitter):
        policies.append(ColorJitter(*config.color_jitter, config.color_jitter_share))
    if config.grayscale:
        policies.append(Sometimes(config.grayscale, Step("grayscale")))
    if config.blur:
        policies.append(GaussianBlur(config.blur, config.blur_sigma))
    if config.solarize:
        policies.append(Sometimes(config.solarize, Step("solarize", (128,))))
    if config.rand_augment is not None:
        policies.append(RandAugment(parse_rand_augment(config.rand_augment), config.fill))
    if config.erasing:
        constants = Constants(config.fill, config.noise_mean, config.noise_std)
        policies.append(RandomErasing(config.erasing, config.erasing_mode, constants))
    return tuple(policies)
