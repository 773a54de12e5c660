"""What Pillow, timm and torchvision have in the place of each operation, and pictures to compare on."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from timm.data import auto_augment
from torchvision.transforms.functional import adjust_hue

from tinymim.pipeline.operations.pixels import Pixels

FILL = (124, 116, 104)
Theirs = Callable[..., Image.Image]


def picture(height: int, width: int, grain: int = 8, seed: int = 0) -> Image.Image:
    """Soft shapes over the whole range of values; `grain` 1 is noise."""
    rng = np.random.default_rng(seed)
    shape = (max(1, height // grain), max(1, width // grain), 3)
    small = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


PICTURES = [
    picture(224, 224),
    picture(64, 40),
    picture(33, 57, 1),
    Image.new("RGB", (20, 20), (3, 200, 77)),
    Image.fromarray(np.repeat(np.arange(3, 90, dtype=np.uint8)[None, :, None], 9, axis=0).repeat(3, axis=2)),
]


def planes(image: Image.Image) -> Pixels:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def affine(*matrix: float) -> Theirs:
    return lambda image: image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=FILL
    )


def turned(image: Image.Image, degrees: float, fill: tuple[int, int, int]) -> Image.Image:
    return image.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=fill)


def enhanced(kind: type[Any]) -> Theirs:
    def enhance(image: Image.Image, factor: float) -> Image.Image:
        result: Image.Image = kind(image).enhance(factor)
        return result

    return enhance


FACTORS = [(0.0,), (0.1,), (0.37,), (0.83317,), (0.999,), (1.0,), (1.3,), (1.9,)]
# Arguments, and the same by Pillow, timm or torchvision: equal to the last bit.
EXACT: dict[str, tuple[Sequence[tuple[Any, ...]], Theirs]] = {
    "auto_contrast": ([()], ImageOps.autocontrast),
    "brightness": (FACTORS, enhanced(ImageEnhance.Brightness)),
    "color": (FACTORS, enhanced(ImageEnhance.Color)),
    "contrast": (FACTORS, enhanced(ImageEnhance.Contrast)),
    "equalize": ([()], ImageOps.equalize),
    "gaussian_blur": (
        [(0.1,), (0.3,), (1.0,), (1.7,), (2.0,), (5.0,)],
        lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)),
    ),
    "grayscale": ([()], lambda image: image.convert("L").convert("RGB")),
    "hue": ([(-0.5,), (-0.07,), (0.0,), (0.03,), (0.2,), (0.5,)], adjust_hue),
    "invert": ([()], ImageOps.invert),
    "posterize": ([(bits,) for bits in range(1, 9)], ImageOps.posterize),
    "sharpness": (FACTORS, enhanced(ImageEnhance.Sharpness)),
    "solarize": ([(0,), (1,), (100,), (255,), (256,)], ImageOps.solarize),
    "solarize_add": ([(0,), (1,), (99,), (128,)], auto_augment.solarize_add),
}
GEOMETRY: dict[str, tuple[Sequence[float], Callable[[float], Theirs]]] = {
    "rotate": (
        [0.0, 2.1, 27.3, -13.0, 30.0, 45.0, 90.0, 180.0],
        lambda degrees: lambda image: turned(image, degrees, FILL),
    ),
    "shear_x": ([0.0, 0.3, -0.27, 0.1], lambda factor: affine(1, factor, 0, 0, 1, 0)),
    "shear_y": ([0.0, 0.3, -0.27, 0.1], lambda factor: affine(1, 0, 0, factor, 1, 0)),
    "translate_x": ([0.0, 3.0, -15.3, 17.7], lambda distance: affine(1, 0, distance, 0, 1, 0)),
    "translate_y": ([0.0, 3.0, -15.3, 17.7], lambda distance: affine(1, 0, 0, 0, 1, distance)),
}
