"""What models/backbone.py says about a model is what the model computes: plain ViTs, BEiT, EVA; the rest is refused."""

import pytest
import timm
import torch
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError
from tinymim.configs.taps import Tap
from tinymim.models import backbone
from tinymim.models.taps import CutTeacher
from tinymim.tests.models.plain_vits import MODELS, images_for, made


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_sizes_are_those_of_the_tokens(name: str) -> None:
    model, images = made(name), images_for(name)
    _, options, grid, prefix, class_token = MODELS[name]
    assert (backbone.grid(model), backbone.prefix_tokens(model)) == (grid, prefix)
    assert backbone.has_class_token(model) == class_token
    assert backbone.widths(model) == (24, 24, 24) and backbone.heads(model) == 3
    assert backbone.strides(model) == (options.get("patch_size", 8),) * 3
    for place in (None, 1, 3):
        assert backbone.tokens_at(model, images, place).shape == (2, prefix + grid[0] * grid[1], 24)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_tokens_at_a_place_are_what_its_block_gives_and_nothing_is_run_behind(name: str) -> None:
    model, images = made(name), images_for(name)
    layers, seen = backbone.blocks(model), list[Tensor]()
    handle = layers[1].register_forward_hook(lambda _module, _args, out: seen.append(out))
    model.forward_features(images)  # type: ignore[operator]
    handle.remove()
    layers[2].register_forward_hook(lambda *_: pytest.fail("a later block was run"))
    assert torch.equal(backbone.tokens_at(model, images, 2), seen[0])


@pytest.mark.parametrize(("name", "rows"), [("class token", 1), ("no row for the prefix", 0), ("registers", 5)])
def test_the_position_table_has_rows_for_the_prefix_and_every_patch(name: str, rows: int) -> None:
    held = backbone.positions(made(name))
    assert held is not None and held.prefix == rows and held.table.shape == (1, rows + 16, 24)


def test_a_model_of_relative_positions_has_no_table() -> None:
    assert backbone.positions(made("BEiT")) is None


@torch.no_grad()
def test_a_projection_is_found_where_there_is_one() -> None:
    for name in ("class token", "BEiT"):
        layer = backbone.attention(made(name), 2)
        weight, bias = backbone.qkv_projection(layer)
        assert weight.shape == (72, 24) and bias is not None and bias.shape == (72,)
    with pytest.raises(RecipeError, match="no single qkv layer"):
        backbone.qkv_projection(backbone.attention(made("EVA"), 2))
    tap = Tap("qkv", 2)
    q, k, v, x = CutTeacher(made("EVA"), [tap])(images_for("EVA"))[tap]  # relations are there all the same
    assert q.shape == k.shape == v.shape == (2, 3, 17, 8) and x.shape == (2, 17, 24)


def test_what_a_model_lacks_is_refused() -> None:
    resnet, images = timm.create_model("resnet18", num_classes=0).eval(), torch.zeros(1, 3, 32, 32)
    assert backbone.heads(resnet) is None and not backbone.has_class_token(resnet)
    with pytest.raises(RecipeError, match="no attention blocks"):
        backbone.blocks(resnet)
    with pytest.raises(RecipeError, match="stage is outside"):
        backbone.tokens_at(resnet, images, 6)
    for place in (0, 4):
        with pytest.raises(RecipeError, match="block is outside the model"):
            backbone.tokens_at(made("class token"), images, place)
    with pytest.raises(RecipeError, match="widths"):
        backbone.widths(nn.Linear(2, 2))
