"""Position table, patches and pixel normalisation against independent formulas; errors of the builders."""

import numpy as np
import pytest
import torch
from torch import nn

from tinymim.configs.errors import RecipeError
from tinymim.configs.sections.models import ModelConfig
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, Normalise, build_vit, patchify, sincos_table


@pytest.mark.parametrize(("dim", "rows", "columns", "prefix"), [(192, 14, 14, 1), (16, 3, 5, 0), (8, 2, 2, 5)])
def test_the_position_table_is_maes(dim: int, rows: int, columns: int, prefix: int) -> None:
    """Entry by entry: the first half encodes the column, the second the row; sines before cosines."""
    table = sincos_table(dim, rows, columns, prefix).numpy()
    assert table.shape == (1, prefix + rows * columns, dim)
    assert not table[0, :prefix].any()
    quarter = dim // 4
    for row in range(rows):
        for column in range(columns):
            for channel in range(dim):
                place = column if channel < dim // 2 else row
                part, i = divmod(channel % (dim // 2), quarter)
                angle = np.float64(place) / np.float64(10000.0) ** (2.0 * i / (dim / 2))
                expected = np.sin(angle) if part == 0 else np.cos(angle)
                assert table[0, prefix + row * columns + column, channel] == pytest.approx(expected, abs=1e-7)


def test_a_width_that_has_no_table_is_refused() -> None:
    with pytest.raises(RecipeError, match="divisible by 4"):
        sincos_table(10, 2, 2, 1)


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


def test_a_built_vit_has_maes_start() -> None:
    vit = build_vit(ModelConfig(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=4))
    assert vit.pos_embed is not None and not vit.pos_embed.requires_grad
    assert torch.equal(vit.pos_embed.data, sincos_table(16, 4, 4, 1))
    bound = (6 / (16 + 48)) ** 0.5  # Xavier uniform of qkv, [48, 16]
    weight = vit.get_parameter("blocks.0.attn.qkv.weight").detach()
    assert 0.9 * bound < float(weight.abs().max()) <= bound
    assert not any(m.bias.any() for m in vit.modules() if isinstance(m, nn.Linear) and m.bias is not None)
    assert vit(torch.zeros(1, 3, 32, 32)).shape == (1, 16)


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
