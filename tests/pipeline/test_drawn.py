"""The embedded image set may not change without its version."""

import hashlib
import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tinymim.pipeline import drawn

# (seed, index): blake2b-64 of the pixels, VERSION 1. A change makes the shipped teacher useless: raise VERSION.
GOLDEN = {
    (0, 0): "9549fe227df446fa",
    (0, 1): "ec2e36d4726c30ae",
    (0, 2): "5b9b3984f3606290",
    (0, 3): "28d9d6c018897fff",
    (0, 4): "f25fbdcce51cc494",
    (0, 5): "d8d20cb2e1b93ea3",
    (0, 6): "cbd10f02c9e5a705",
    (0, 7): "52e97be63bcd1f41",
    (0, 8): "6cb951c1a0d3d037",
    (0, 9): "78bbd6e532e9e626",
    (7, 12345): "a279216cb617fae5",
}


def _digest(seed: int, index: int) -> str:
    return hashlib.blake2b(drawn.draw(seed, index)[0].tobytes(), digest_size=8).hexdigest()


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_pixels(case: tuple[int, int]) -> None:
    assert _digest(*case) == GOLDEN[case]


def test_an_image_is_a_function_of_seed_and_index() -> None:
    assert _digest(0, 3) == _digest(0, 3)
    assert len({_digest(0, 3), _digest(1, 3), _digest(0, 13)}) == 3


def test_pixels_and_labels() -> None:
    for index in range(12):
        pixels, label = drawn.draw(0, index)
        assert pixels.shape == (drawn.IMAGE_SIZE, drawn.IMAGE_SIZE, 3) and pixels.dtype == np.uint8
        assert pixels.std() > 10  # the image is not flat
        assert label == index % len(drawn.CLASSES)


def test_samples_are_balanced_keyed_jpegs() -> None:
    samples = drawn.samples(0, 5, 20)
    assert set(Counter(label for _, _, label in samples).values()) == {2}
    assert len({key for key, _, _ in samples}) == 20
    for offset, (key, data, label) in enumerate(samples):
        assert key == f"{drawn.CLASSES[label]}/{5 + offset:06d}"
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "JPEG" and image.size == (drawn.IMAGE_SIZE, drawn.IMAGE_SIZE)


def test_a_part_of_the_set_is_the_same_as_the_whole() -> None:
    assert list(drawn.samples(0, 0, 6))[4:] == list(drawn.samples(0, 4, 2))
