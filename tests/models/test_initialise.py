"""The initial state of a plain ViT against independent formulas."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tinymim.configs.errors import RecipeError
from tinymim.configs.sections.models import ModelConfig
from tinymim.models.initialise import initialise_linear, sincos_table
from tinymim.models.vit import build_model, build_vit


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


def test_a_built_vit_has_maes_start() -> None:
    vit = build_vit(ModelConfig(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=4))
    assert vit.pos_embed is not None and not vit.pos_embed.requires_grad
    assert torch.equal(vit.pos_embed.data, sincos_table(16, 4, 4, 1))
    bound = (6 / (16 + 48)) ** 0.5  # Xavier uniform of qkv, [48, 16]
    weight = vit.get_parameter("blocks.0.attn.qkv.weight").detach()
    assert 0.9 * bound < float(weight.abs().max()) <= bound
    assert not any(m.bias.any() for m in vit.modules() if isinstance(m, nn.Linear) and m.bias is not None)
    assert vit(torch.zeros(1, 3, 32, 32)).shape == (1, 16)


def test_linear_layers_alone_are_replaced() -> None:
    sizes: dict[str, Any] = {"window_size": 2, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    config = ModelConfig(name="swin_tiny_patch4_window7_224", img_size=64, args=sizes)
    swin = build_model(config)
    before = {name: value.clone() for name, value in swin.state_dict().items()}
    initialise_linear(swin)
    linear = {name for name, module in swin.named_modules() if isinstance(module, nn.Linear)}
    for name, value in swin.state_dict().items():
        owner, kind = name.rsplit(".", 1)
        if owner not in linear:
            assert torch.equal(value, before[name])
        elif kind == "weight":
            bound = (6 / sum(value.shape)) ** 0.5
            assert 0.9 * bound < float(value.abs().max()) <= bound
        else:
            assert not value.any()
