"""Every operation has its golden bytes, and nothing of the machine changes them."""

import importlib
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tinymim.configs.errors import ViewMismatch
from tinymim.pipeline.operations import registry
from tinymim.pipeline.operations.blends import color
from tinymim.pipeline.operations.geometry import rotate, shear_x
from tinymim.pipeline.operations.pixels import Pixels
from tinymim.pipeline.operations.registry import CANARIES, OPERATIONS, Step, apply, canaries, canary_digests
from tinymim.pipeline.operations.tables import solarize
from tinymim.tests.pipeline.operations.counterparts import FILL, PICTURES, planes, turned

CASES = [(function.__name__, several[0]) for function, several in registry._CANARY_ARGUMENTS.items()]


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
        np.testing.assert_array_equal(color(pixels, 1.9), planes(ImageEnhance.Color(image).enhance(1.9)))
        apart = rotate(pixels, 180.0, FILL).astype(int) - planes(turned(image, 180.0, FILL))
        assert not apart.any()


def test_steps_are_applied_in_order() -> None:
    pixels = planes(PICTURES[1])
    steps = [Step("solarize", (100,)), Step("shear_x", (0.2, FILL))]
    wanted = shear_x(solarize(pixels, 100), 0.2, FILL)
    np.testing.assert_array_equal(apply(pixels, steps), wanted)
    assert apply(pixels, []) is pixels


def test_every_operation_has_a_canary() -> None:
    assert set(CANARIES) == {*OPERATIONS, "normal_quantiles"}
    canaries()


def test_a_canary_names_the_operation_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(pixels: Pixels, *arguments: Any) -> Pixels:
        return OPERATIONS["invert"](pixels)

    monkeypatch.setattr(registry, "OPERATIONS", {**OPERATIONS, "rotate": other, "hue": other})
    with pytest.raises(ViewMismatch, match="other pixels here: hue, rotate") as raised:
        canaries()
    assert raised.value.expected == f"{CANARIES['hue']}, {CANARIES['rotate']}"
    monkeypatch.undo()
    assert canaries({"invert"}) == {f"canary.{name}": CANARIES[name] for name in ("invert", "normal_quantiles")}
    assert not canaries(())


def test_the_page_and_its_picture_are_made_by_the_operations() -> None:
    docs = runpy.run_path(str(Path(__file__).parents[3] / "docs" / "make_operations.py"))
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
from tinymim.pipeline.operations.registry import canaries
assert not any(__cpu_features__[name] for name in __cpu_dispatch__)
canaries()
"""
    settings = {**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(found)}
    subprocess.run([sys.executable, "-c", script], env=settings, check=True)
