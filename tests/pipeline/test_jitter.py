"""The batched jitter is torchvision's ColorJitter within rounding, and a function of its generator."""

import itertools

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tinymim.configs.sections.augment import JitterConfig
from tinymim.pipeline.jitter import apply_jitter, jitter

_OPERATIONS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)


def images(count: int = 12) -> Tensor:
    return torch.randint(0, 256, (count, 3, 17, 17), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def test_equals_torchvision_in_every_order() -> None:
    pixels = images(6)
    factors = 0.6 + 0.8 * torch.rand(6, 3, generator=torch.Generator().manual_seed(1))
    ours = apply_jitter(pixels.float(), factors, torch.arange(6)) / 255
    for sample, order in enumerate(itertools.permutations(range(3))):
        theirs = pixels[sample].float() / 255
        for operation in order:
            theirs = _OPERATIONS[operation](theirs, float(factors[sample, operation]))
        torch.testing.assert_close(ours[sample], theirs, rtol=0, atol=2e-4)


def test_a_function_of_the_generator() -> None:
    def run(seed: int) -> Tensor:
        return jitter(images(), JitterConfig(), torch.Generator().manual_seed(seed))

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_factors_stay_within_their_strength() -> None:
    grey = torch.full((4000, 3, 2, 2), 100, dtype=torch.uint8)
    config = JitterConfig(brightness=0.4, contrast=0, saturation=0)
    bright = jitter(grey, config, torch.Generator().manual_seed(0))[:, 0, 0, 0] / 100
    assert 0.6 <= float(bright.min()) < 0.605 and 1.395 < float(bright.max()) <= 1.4
    assert float(bright.mean()) == pytest.approx(1.0, abs=0.02)


def test_no_strength_changes_nothing() -> None:
    config = JitterConfig(brightness=0, contrast=0, saturation=0)
    assert torch.equal(jitter(images(), config, torch.Generator()), images().float())


def test_a_sample_gets_the_same_jitter_in_any_part_of_its_batch() -> None:
    def run(pixels: Tensor, places: Tensor | None = None) -> Tensor:
        return jitter(pixels, JitterConfig(), torch.Generator().manual_seed(5), places, len(images()))

    whole = run(images())
    for places in (torch.arange(0, 12, 2), torch.arange(1, 12, 2), torch.tensor([11]), torch.tensor([7, 3, 4])):
        assert torch.equal(run(images()[places], places), whole[places])
    others = images().clone()
    others[1:] = 0
    assert torch.equal(run(others)[0], whole[0])  # independent of the other images


def test_the_drawn_law_is_torchvisions() -> None:
    """Factors uniform in 1 ± strength, as ColorJitter draws them."""
    grey = torch.full((6000, 3, 1, 1), 100, dtype=torch.uint8)
    bright = jitter(grey, JitterConfig(contrast=0, saturation=0), torch.Generator().manual_seed(2))[:, 0, 0, 0] / 100
    found = torch.histc(bright, 8, 0.6, 1.4) / len(bright)
    assert float((found - 1 / 8).abs().max()) < 0.02
