"""timm's notation of RandAugment, such as rand-m9-mstd0.5-inc1, read without timm."""

import math
import re
from typing import Final, NamedTuple

_PLAIN = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast"),
    *("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
_GROW = {"Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"}  # `inc` takes another variant
_INCREASING = tuple(f"{name}Increasing" if name in _GROW else name for name in _PLAIN)
# timm's sets of operations by name, with weights where not all are equally likely.
_SETS: Final[dict[str, dict[str, float]]] = {
    "weights": {
        "Rotate": 3.0,
        "ShearX": 2.0,
        "ShearY": 2.0,
        "TranslateXRel": 1.0,
        "TranslateYRel": 1.0,
        "ColorIncreasing": 0.25,
        "SharpnessIncreasing": 0.25,
        "AutoContrast": 0.25,
        "SolarizeIncreasing": 0.05,
        "SolarizeAdd": 0.05,
        "ContrastIncreasing": 0.05,
        "BrightnessIncreasing": 0.05,
        "Equalize": 0.05,
        "PosterizeIncreasing": 0.05,
        "Invert": 0.05,
    },
    "3aw": {
        "SolarizeIncreasing": 6.0,
        "Desaturate": 6.0,
        "GaussianBlur": 6.0,
        "Rotate": 3.0,
        "ShearX": 2.0,
        "ShearY": 2.0,
        "PosterizeIncreasing": 1.0,
        "AutoContrast": 1.0,
        "ColorIncreasing": 1.0,
        "SharpnessIncreasing": 1.0,
        "ContrastIncreasing": 1.0,
        "BrightnessIncreasing": 1.0,
        "Equalize": 1.0,
        "Invert": 1.0,
    },
    "3a": dict.fromkeys(("SolarizeIncreasing", "Desaturate", "GaussianBlur"), 1.0),
}
_WHOLE = {"m": "magnitude", "n": "layers", "inc": "increasing", "mmax": "largest"}
_REAL = {"p": "probability", "mstd": "deviation"}


class RandAugmentNotation(NamedTuple):
    """What the notation states.

    Attributes:
        weights: the operations by timm's names, with their weights.
        replace: whether one operation may be drawn twice for an image; only where all weights are equal.
        magnitude: middle of the magnitude's law.
        deviation: standard deviation of the magnitude; inf: uniform from 0 to `magnitude`.
        largest: upper bound of the magnitude.
        layers: operations drawn per image.
        probability: share of the drawn operations that are applied.
    """

    weights: dict[str, float]
    replace: bool
    magnitude: int
    deviation: float
    largest: int
    layers: int
    probability: float


def parse_rand_augment(text: str) -> RandAugmentNotation:
    """Read the notation. Raises ValueError that names what is unknown; timm ignores some of it."""
    start, *sections = text.split("-")
    if start != "rand":
        raise ValueError(f"got '{text}'; expected a policy such as rand-m9-mstd0.5-inc1, or null")
    values: dict[str, float] = {}
    chosen: str | None = None
    for section in sections:
        found = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", section)
        name, number = found.groups() if found else ("", "")
        if section.startswith("t") and section[1:] in _SETS and chosen is None:
            chosen = section[1:]
        elif name in _WHOLE and number.isdigit() and _WHOLE[name] not in values:
            values[_WHOLE[name]] = int(number)
        elif name in _REAL and _REAL[name] not in values:
            values[_REAL[name]] = float(number)
        else:
            known = ", ".join([*(f"{key}N" for key in _WHOLE), *(f"{key}X" for key in _REAL)])
            raise ValueError(
                f"'{text}': section '{section}' is unknown, incomplete or repeated; "
                f"expected {known} (N whole, X a number), or {', '.join(f't{name}' for name in _SETS)}"
            )
    default = _INCREASING if values.get("increasing") else _PLAIN
    weights = _SETS[chosen] if chosen else dict.fromkeys(default, 1.0)
    replace, layers = chosen in (None, "3a"), int(values.get("layers", 2))
    if not replace and layers > len(weights):
        raise ValueError(f"'{text}': n{layers} operations without repetition, of t{chosen}'s {len(weights)}")
    if values.get("probability", 0) > 1:
        raise ValueError(f"'{text}': p is a probability, at most 1")
    deviation = values.get("deviation", 0.0)
    return RandAugmentNotation(
        weights=weights,
        replace=replace,
        magnitude=int(values.get("magnitude", 10)),
        deviation=math.inf if deviation > 100 else deviation,
        largest=int(values.get("largest", 0)) or 10,
        layers=layers,
        probability=values.get("probability", 0.5),
    )


def checked_rand_augment(text: str | None) -> str | None:
    """Return `text` if it is null or timm's notation. Raises ValueError."""
    if text is not None:
        parse_rand_augment(text)
    return text
