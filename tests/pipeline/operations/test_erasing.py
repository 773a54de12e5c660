"""Erasing changes its box only; its noise is normal."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tinymim.pipeline.operations.erasing import erase_const, erase_pixel
from tinymim.tests.pipeline.operations.counterparts import FILL


def test_erasing_changes_its_box_only_and_its_noise_is_normal() -> None:
    pixels = np.full((3, 200, 300), 9, np.uint8)
    mean, deviation = (123.7, 116.3, 103.5), (20.0, 30.0, 40.0)
    found = erase_pixel(pixels, 10, 20, 150, 200, 7, mean, deviation)
    box = found[:, 10:160, 20:220].astype(float)
    rest = found.copy()
    rest[:, 10:160, 20:220] = 9
    assert (rest == 9).all()
    np.testing.assert_allclose(box.mean(axis=(1, 2)), mean, atol=1.0)
    np.testing.assert_allclose(box.std(axis=(1, 2)), deviation, rtol=0.02)
    flat = box.reshape(3, -1)
    assert np.abs(np.corrcoef(np.vstack([flat, flat[:, ::-1]])) - np.eye(6))[:3, :3].max() < 0.02
    other = erase_pixel(pixels, 10, 20, 150, 200, 8, mean, deviation)
    assert (other != found).mean() > 0.4
    const = erase_const(pixels, 1, 2, 3, 4, FILL)
    assert const[:, 1:4, 2:6].reshape(3, -1).T.tolist() == [list(FILL)] * 12 and (const != 9).sum() == 36


def shares(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.bincount(values.reshape(-1), minlength=256) / values.size


def test_noise_is_clipped_where_normal_noise_leaves_the_range() -> None:
    found = erase_pixel(np.zeros((3, 250, 250), np.uint8), 0, 0, 250, 250, 1, (0.0, 255.0, 128.0), (60.0,) * 3)
    low, high, middle = map(shares, found)
    assert low[0] == pytest.approx(0.5, abs=0.02) and high[255] == pytest.approx(0.5, abs=0.02)
    assert middle[0] == pytest.approx(0.016, abs=0.004) and middle[255] == pytest.approx(0.017, abs=0.004)
