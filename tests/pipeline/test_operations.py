"""Every operation against Pillow or torchvision, its golden bytes, and that nothing of the machine changes them."""

import importlib
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from timm.data import auto_augment
from torchvision.transforms.functional import adjust_hue

from tinymim.configs.errors import ViewMismatch
from tinymim.pipeline import operations
from tinymim.pipeline.operations import (
    CANARIES,
    OPERATIONS,
    Pixels,
    Step,
    apply,
    canaries,
    canary_digests,
    exponential,
    normal_quantiles,
    sine_cosine,
)

FILL = (124, 116, 104)
CASES = [(function.__name__, several[0]) for function, several in operations._CANARY_ARGUMENTS.items()]
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


@pytest.mark.parametrize("name", EXACT)
def test_tables_blends_and_blurs_are_pillows_to_the_last_bit(name: str) -> None:
    several, theirs = EXACT[name]
    for image in PICTURES:
        for arguments in several:
            ours = OPERATIONS[name](planes(image), *arguments)
            np.testing.assert_array_equal(ours, planes(theirs(image, *arguments)), err_msg=f"{arguments}")


def test_a_posterize_that_keeps_no_bit_is_black() -> None:
    """timm asks for it at magnitude 10 with inc1; Pillow 13 refuses it."""
    assert not operations.posterize(planes(PICTURES[0]), 0).any()


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


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_is_pillows_to_one_level(name: str) -> None:
    """Pillow cuts a double where we cut a multiple of 2^-16 (2^-22 for rotations)."""
    several, theirs = GEOMETRY[name]
    for image in PICTURES:
        for argument in several:
            ours = OPERATIONS[name](planes(image), argument, FILL).astype(int)
            apart = np.abs(ours - planes(theirs(argument)(image)).astype(int))
            assert apart.max() <= 1 and (apart > 0).mean() < (0.06 if name == "rotate" else 0.01), argument
            if argument == 0:
                np.testing.assert_array_equal(ours, planes(image))


def test_inputs_stay_and_results_do_not_depend_on_earlier_calls() -> None:
    """Intermediate results lie in buffers that stay."""
    small, large = planes(PICTURES[1]), planes(PICTURES[0])
    for name, arguments in CASES:
        before = small.copy()
        first = OPERATIONS[name](small, *arguments)
        kept = first.copy()
        OPERATIONS[name](large, *arguments)
        np.testing.assert_array_equal(OPERATIONS[name](small, *arguments), first)
        np.testing.assert_array_equal(first, kept)
        np.testing.assert_array_equal(small, before)
        view = np.flip(small, axis=2)  # neither contiguous nor in order
        np.testing.assert_array_equal(OPERATIONS[name](view, *arguments), OPERATIONS[name](view.copy(), *arguments))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2), (3, 9001)])
def test_odd_shapes_keep_their_shape(shape: tuple[int, int]) -> None:
    """The last one is wider than a strip."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
    for name, arguments in CASES:
        if not name.startswith("erase"):
            assert OPERATIONS[name](pixels, *arguments).shape == pixels.shape
    if shape[1] == 9001:
        image = Image.fromarray(pixels.transpose(1, 2, 0))
        np.testing.assert_array_equal(operations.color(pixels, 1.9), planes(ImageEnhance.Color(image).enhance(1.9)))
        apart = operations.rotate(pixels, 180.0, FILL).astype(int) - planes(turned(image, 180.0, FILL))
        assert not apart.any()


def test_steps_are_applied_in_order() -> None:
    pixels = planes(PICTURES[1])
    steps = [Step("solarize", (100,)), Step("shear_x", (0.2, FILL))]
    wanted = operations.shear_x(operations.solarize(pixels, 100), 0.2, FILL)
    np.testing.assert_array_equal(apply(pixels, steps), wanted)
    assert apply(pixels, []) is pixels


# ---------------------------------------------------------------- erasing


def test_erasing_changes_its_box_only_and_its_noise_is_normal() -> None:
    pixels = np.full((3, 200, 300), 9, np.uint8)
    mean, deviation = (123.7, 116.3, 103.5), (20.0, 30.0, 40.0)
    found = operations.erase_pixel(pixels, 10, 20, 150, 200, 7, mean, deviation)
    box = found[:, 10:160, 20:220].astype(float)
    rest = found.copy()
    rest[:, 10:160, 20:220] = 9
    assert (rest == 9).all()
    np.testing.assert_allclose(box.mean(axis=(1, 2)), mean, atol=1.0)
    np.testing.assert_allclose(box.std(axis=(1, 2)), deviation, rtol=0.02)
    flat = box.reshape(3, -1)
    assert np.abs(np.corrcoef(np.vstack([flat, flat[:, ::-1]])) - np.eye(6))[:3, :3].max() < 0.02
    other = operations.erase_pixel(pixels, 10, 20, 150, 200, 8, mean, deviation)
    assert (other != found).mean() > 0.4
    const = operations.erase_const(pixels, 1, 2, 3, 4, FILL)
    assert const[:, 1:4, 2:6].reshape(3, -1).T.tolist() == [list(FILL)] * 12 and (const != 9).sum() == 36


# ---------------------------------------------------------------- our own arithmetic


def test_series_and_normal_table() -> None:
    for degrees in (0.0, 13.0, -30.0, 90.0, 179.0, 400.0, -1000.5):
        np.testing.assert_allclose(
            sine_cosine(degrees), (math.sin(math.radians(degrees)), math.cos(math.radians(degrees))), atol=1e-14
        )
    for x in (-1.2, 0.0, 0.3, 1.2):
        assert exponential(x) == pytest.approx(math.exp(x), rel=1e-15)
    table = np.array(normal_quantiles())
    assert len(table) == 4096 and abs(table.mean()) < 1e-6 and table.std() == pytest.approx(1.0, abs=2e-3)
    assert (np.diff(table) > 0).all() and table[0] == -table[-1]


# ---------------------------------------------------------------- canaries


def test_every_operation_has_a_canary() -> None:
    assert set(CANARIES) == {*OPERATIONS, "normal_quantiles"}
    canaries()


def test_a_canary_names_the_operation_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(pixels: Pixels, *arguments: Any) -> Pixels:
        return OPERATIONS["invert"](pixels)

    monkeypatch.setattr(operations, "OPERATIONS", {**OPERATIONS, "rotate": other, "hue": other})
    with pytest.raises(ViewMismatch, match="other pixels here: hue, rotate") as raised:
        canaries()
    assert raised.value.expected == f"{CANARIES['hue']}, {CANARIES['rotate']}"
    monkeypatch.undo()
    assert canaries({"invert"}) == {f"canary.{name}": CANARIES[name] for name in ("invert", "normal_quantiles")}
    assert not canaries(())


def test_the_page_and_its_picture_are_made_by_the_operations() -> None:
    docs = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "make_operations.py"))
    assert docs["PAGE"].read_text() == docs["page"](), "run: python docs/make_operations.py"
    shown = docs["shown"]()
    for found, (label, pixels) in zip(shown, docs["tiles"](shown[0]).items(), strict=True):
        np.testing.assert_array_equal(found, pixels, err_msg=label)


def test_threads_make_the_same_bytes() -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: canary_digests(), range(24))) == [dict(CANARIES)] * 24


def test_older_processors_make_the_same_bytes() -> None:
    """numpy without the instructions that it selects at run time, such as AVX2 and AVX-512."""
    core = importlib.import_module("numpy._core._multiarray_umath")
    found = [name for name in core.__cpu_dispatch__ if core.__cpu_features__[name]]
    script = """
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
from tinymim.pipeline.operations import canaries
assert not any(__cpu_features__[name] for name in __cpu_dispatch__)
canaries()
"""
    settings = {**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(found)}
    subprocess.run([sys.executable, "-c", script], env=settings, check=True)


def shares(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.bincount(values.reshape(-1), minlength=256) / values.size


def test_noise_is_clipped_where_normal_noise_leaves_the_range() -> None:
    found = operations.erase_pixel(
        np.zeros((3, 250, 250), np.uint8), 0, 0, 250, 250, 1, (0.0, 255.0, 128.0), (60.0,) * 3
    )
    low, high, middle = map(shares, found)
    assert low[0] == pytest.approx(0.5, abs=0.02) and high[255] == pytest.approx(0.5, abs=0.02)
    assert middle[0] == pytest.approx(0.016, abs=0.004) and middle[255] == pytest.approx(0.017, abs=0.004)
