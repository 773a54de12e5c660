"""Patches and pixel normalisation against independent formulas; errors of the builders."""

import numpy as np
import pytest
import torch
from torch import nn

from tinymim.configs.errors import RecipeError
from tinymim.configs.sections.models import ModelConfig
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, Normalise, build_vit, patchify


def test_patches_are_in_raster_order_channels_last() -> None:
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for b in range(2):
        for patch in range(6):
            top, left = 2 * (patch // 3), 2 * (patch % 3)
            expected = [int(images[b, c, top + y, left + x]) for y in range(2) for x in range(2) for c in range(3)]
            assert patches[b, patch].tolist() == expected


def test_patches_can_be_put_together_again() -> None:
    images = torch.randn(2, 3, 8, 12)
    grid = patchify(images, 4).reshape(2, 2, 3, 4, 4, 3)
    assert torch.equal(grid.permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 8, 12), images)


def test_patches_are_those_that_the_patch_embedding_sees() -> None:
    vit = build_vit(ModelConfig(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2))
    images = torch.randn(2, 3, 16, 16)
    weight = vit.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)  # channels last
    by_hand = nn.functional.linear(patchify(images, 8), weight, vit.patch_embed.proj.bias)
    torch.testing.assert_close(vit.patch_embed(images), by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [None, ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))])
def test_normalised_pixels(given: tuple[tuple[float, float, float], tuple[float, float, float]] | None) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    out = Normalise(*(given or (None, None)))(pixels)
    mean, std = given or (IMAGENET_MEAN, IMAGENET_STD)
    reference = (pixels.numpy().astype(np.float64) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "vit_tinny_patch16_224"}, "vit_tinny"),
        ({"name": "resnet18"}, "resnet18"),
        ({"num_heads": 5}, "num_heads"),  # of the width by name, 192
        ({"name": ""}, "cannot build"),
        ({"name": "local-dir:/nowhere"}, "Config file not found"),
        ({"name": "a:b"}, "no source prefix"),
        (
            {"img_size": 225},
            r"not a multiple of the patch(.|\n)*225, patches of 16 x 16(.|\n)*img_size=224",
        ),
        ({"img_size": 8}, r"patches of 16 x 16(.|\n)*img_size=16"),
    ],
)
def test_models_that_cannot_be_built_are_named(fields: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        build_vit(ModelConfig.model_validate(fields))
