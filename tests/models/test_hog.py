"""HOG against a pixel-by-pixel reference in float64, and what it must not depend on."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tinymim.models.hog import hog

SOBEL = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=np.float64)


def reference(image: np.ndarray, normalise: bool) -> np.ndarray:
    """FastMIM's target of one image [3, S, S], pixel by pixel: [27, S / 8, S / 8]."""
    side = image.shape[1]
    out = np.zeros((3, 9, side // 8, side // 8))
    for colour, plane in enumerate(image):
        padded = np.pad(plane, 1, mode="reflect")
        for row in range(side):
            for column in range(side):
                window = padded[row : row + 3, column : column + 3]
                x, y = (window * SOBEL).sum(), (window * SOBEL.T).sum()
                number = math.floor(math.atan2(x, y) / math.pi * 9) % 9
                out[colour, number, row // 8, column // 8] += math.sqrt(x * x + y * y)
    if normalise:
        out /= np.maximum(np.sqrt((out**2).sum(1, keepdims=True)), 1e-12)
    return out.reshape(27, side // 8, side // 8)


@pytest.mark.parametrize("normalise", [True, False])
def test_histograms_are_the_references(normalise: bool) -> None:
    # Whole numbers, because reflection makes horizontal gradients of 0 at the border: a bin's edge.
    images = torch.randint(0, 256, (2, 3, 24, 24), generator=torch.Generator().manual_seed(0)).double()
    expected = np.stack([reference(image, normalise) for image in images.numpy()])
    np.testing.assert_allclose(hog(images, normalise).numpy(), expected, rtol=1e-12, atol=1e-12)


def ramp(degrees: float, sign: float = 1.0) -> Tensor:
    """An image [1, 3, 32, 32] whose gradient has one direction."""
    angle = math.radians(degrees)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    return sign * (x * math.cos(angle) + y * math.sin(angle)).expand(1, 3, 32, 32)


@pytest.mark.parametrize("degrees", [0.0, 5.0, 25.0, 55.0, 65.0, 95.0, 115.0, 135.0, 155.0, 175.0])
def test_a_ramp_is_in_one_bin_whichever_way_it_rises(degrees: float) -> None:
    inner = hog(ramp(degrees))[:, :, 1:-1, 1:-1].unflatten(1, (3, 9))  # reflection bends gradients at the border
    assert torch.equal((inner > 0).sum(2), torch.ones(1, 3, 2, 2, dtype=torch.long))
    assert torch.equal(inner, hog(ramp(degrees, -1.0))[:, :, 1:-1, 1:-1].unflatten(1, (3, 9)))


def test_in_the_middle_of_every_bin_all_nine_are_met() -> None:
    found = [int(hog(ramp(20.0 * n))[0, :9, 1, 1].argmax()) for n in range(9)]
    assert sorted(found) == list(range(9))


def test_autocast_changes_nothing() -> None:
    images = 100 * torch.randn(1, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hog(images), hog(images.clone()))
        found = hog(images)
    assert found.dtype == torch.float32
    assert torch.equal(found, hog(images))


def test_constant_images_give_zeros() -> None:
    found = hog(torch.full((1, 3, 16, 16), 6e4))
    assert torch.equal(found, torch.zeros(1, 27, 2, 2))
