"""All operations by name, and the canaries that prove their bytes. docs/views.md.

Each follows Pillow's result, which timm uses: exactly for tables and blends, to one level of 255 where Pillow resamples
in double precision. Only three kinds of arithmetic occur: integers, single IEEE operations of numpy (an elementwise sum
or product is rounded alone, so no compiler can fuse two of them), and SHAKE-128 for noise. No library's random
generator, matrix product, reduction of floats, or transcendental function takes part.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from tinymim.pipeline.operations.arithmetic import normal_quantiles
from tinymim.pipeline.operations.blends import brightness, color, contrast, grayscale, sharpness
from tinymim.pipeline.operations.blur import gaussian_blur
from tinymim.pipeline.operations.erasing import erase_const, erase_pixel
from tinymim.pipeline.operations.geometry import rotate, shear_x, shear_y, translate_x, translate_y
from tinymim.pipeline.operations.hue import hue
from tinymim.pipeline.operations.pixels import Pixels
from tinymim.pipeline.operations.tables import auto_contrast, equalize, invert, posterize, solarize, solarize_add
from tinymim.storage.manifest import check_canaries

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


class Step(NamedTuple):
    """One operation of `OPERATIONS` and its arguments behind the pixels."""

    operation: str
    arguments: tuple[Any, ...] = ()


def apply(pixels: Pixels, steps: Sequence[Step]) -> Pixels:
    """The result of `steps`, in order. `pixels` stays as it is; without steps it is the result itself."""
    for operation, arguments in steps:
        pixels = OPERATIONS[operation](pixels, *arguments)
    return pixels


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
