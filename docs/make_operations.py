"""Write docs/operations.md and its picture, both made by the operations themselves: python docs/make_operations.py"""

import inspect
from collections.abc import Iterator, Mapping
from itertools import repeat
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from tinymim.pipeline import drawn
from tinymim.pipeline.operations.pixels import Pixels
from tinymim.pipeline.operations.registry import OPERATIONS, Step, apply, canary_digests
from tinymim.pipeline.policies import _LEVELS
from tinymim.tests.pipeline.operations.counterparts import EXACT, FILL, GEOMETRY

HERE: Final = Path(__file__).parent
PAGE, PICTURE = HERE / "operations.md", HERE / "figures" / "operations.png"
HEAD = """\
# Operations: arguments, pictures, golden digests

After this page you know each operation that a view may have, and the digest that proves its bytes. [Views](views.md)
has the laws that draw them.

    python docs/make_operations.py        # writes this page and its picture; a test compares them with the code

![A drawn image of the demo, and the result of each operation](figures/operations.png)

The first picture is image {index} of `tinymim make-shards drawn` with seed {seed}. Each label has the
first argument.

| operation | what it does | argument, from magnitude 0 to 10 | Pillow | digest |
|---|---|---|---|---|
"""
FOOT = """
- **Argument.** RandAugment's, by timm's name of the operation. With ± the sign is random.
- **Pillow.** Largest difference from Pillow's result in levels of 255 that the tests allow. Hue is compared with
  torchvision on Pillow images. Erasing has no counterpart. [Views](views.md#operations-on-views) has the share of the
  values that differ.
- **Digest.** 64 bits of blake2b over the results for fixed pixels and arguments. It is `canary.OPERATION` in the
  manifest of a cache whose law may draw the operation, and is compared at every start.
- **`normal_quantiles`** is the table from which magnitudes and noise take normal numbers.
"""
# Arguments that laws other than RandAugment draw.
OTHERS: Final[Mapping[str, str]] = {
    "erase_const": "a box of 2 % to 33 % of the area",
    "erase_pixel": "a box of 2 % to 33 % of the area",
    "grayscale": "none",
    "hue": "±`color_jitter[3]` turns, at most 0.5",
}
NOISE: Final = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
# Of the pictures, which are 80 pixels wide.
ARGUMENTS: Final[Mapping[str, tuple[object, ...]]] = {
    "brightness": (1.6,),
    "color": (1.9,),
    "contrast": (1.9,),
    "erase_const": (18, 24, 40, 32, FILL),
    "erase_pixel": (18, 24, 40, 32, 0, *NOISE),
    "gaussian_blur": (2.0,),
    "hue": (0.3,),
    "posterize": (2,),
    "rotate": (27.0, FILL),
    "sharpness": (1.9,),
    "shear_x": (0.27, FILL),
    "shear_y": (0.27, FILL),
    "solarize": (128,),
    "solarize_add": (99,),
    "translate_x": (18.0, FILL),
    "translate_y": (18.0, FILL),
}
SEED, INDEX = 0, 9
ZOOM, PITCH_Y, PITCH_X, COLUMNS = 2, 182, 168, 7


def page() -> str:
    """The whole page."""
    digests = canary_digests()
    lines = [
        f"| {name} | {_what(name)} | {'; '.join(_ranges(name)) or OTHERS.get(name, 'none')} | {_tolerance(name)} | "
        f"`{digests[name]}` |\n"
        for name in OPERATIONS
    ]
    last = f"| normal_quantiles | a table, not an operation | - | - | `{digests['normal_quantiles']}` |\n"
    return HEAD.format(seed=SEED, index=INDEX) + "".join([*lines, last]) + FOOT


def _what(name: str) -> str:
    return (inspect.getdoc(OPERATIONS[name]) or "").splitlines()[0].rstrip(".")


def _ranges(name: str) -> Iterator[str]:
    """By each of timm's names, the argument at magnitude 0 and 10."""
    for theirs, (ours, argument) in _LEVELS.items():
        if ours == name and argument is not None:
            ends = [(argument(share, repeat(0.0)), argument(share, repeat(1.0))) for share in (0.0, 1.0)]
            low, high = (
                f"{a:g}" if a == b else f"±{a:g}" if a == -b else f"{min(a, b):g} or {max(a, b):g}" for a, b in ends
            )
            yield f"{theirs} {low} to {high}{' of the side' if name.startswith('translate') else ''}"


def _tolerance(name: str) -> str:
    """The largest difference from Pillow's result that the tests allow."""
    return "0" if name in EXACT else "1" if name in GEOMETRY else "-"


def tiles(source: Pixels) -> dict[str, Pixels]:
    """By label, the image and the result of each operation on it."""
    found = {"image": source}
    for name in OPERATIONS:
        arguments = ARGUMENTS.get(name, ())
        shown = "" if name.startswith("erase") or not arguments else f" {arguments[0]}"
        found[f"{name}{shown}"] = apply(source, [Step(name, arguments)])
    return found


def place(number: int) -> tuple[int, int]:
    """Top and left of a tile in the picture."""
    return number // COLUMNS * PITCH_Y, number % COLUMNS * PITCH_X


def picture(source: Pixels) -> Image.Image:
    """All tiles, in rows, with their labels below."""
    results, side = tiles(source), drawn.IMAGE_SIZE * ZOOM
    top, _ = place(len(results) - 1)
    sheet = Image.new("RGB", (COLUMNS * PITCH_X - 8, top + PITCH_Y), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (label, pixels) in enumerate(results.items()):
        top, left = place(number)
        sheet.paste(
            Image.fromarray(pixels.transpose(1, 2, 0)).resize((side, side), Image.Resampling.NEAREST), (left, top)
        )
        pen.text((left, top + side + 3), label, fill="black", font_size=13)
    return sheet


def shown() -> list[Pixels]:
    """The pixels of all tiles in the committed picture."""
    side = drawn.IMAGE_SIZE * ZOOM
    sheet = np.asarray(Image.open(PICTURE)).transpose(2, 0, 1)
    places = [place(number) for number in range(1 + len(OPERATIONS))]
    return [np.ascontiguousarray(sheet[:, y : y + side : ZOOM, x : x + side : ZOOM]) for y, x in places]


if __name__ == "__main__":
    PAGE.write_text(page())
    image, _ = drawn.draw(SEED, INDEX)
    picture(np.ascontiguousarray(image.transpose(2, 0, 1))).save(PICTURE, optimize=True)
