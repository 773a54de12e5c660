"""What models/backbone.py says about a model is what the model computes: plain ViTs, BEiT, EVA; the rest is refused."""

from typing import Any

import pytest
import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError
from tinymim.configs.taps import Tap
from tinymim.models import backbone
from tinymim.models.taps import CutTeacher

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}
# name of the timm model, options, (rows, columns), prefix tokens, class token
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, int], int, bool]] = {
    "class token": ("vit_tiny_patch16_224", {}, (4, 4), 1, True),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, (4, 4), 0, False),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}, (4, 4), 5, True),
    "registers only": (
        "vit_tiny_patch16_224",
        {"reg_tokens": 2, "class_token": False, "global_pool": "avg"},
        (4, 4),
        2,
        False,
    ),
    "no row for the prefix": ("vit_tiny_patch16_224", {"reg_tokens": 1, "no_embed_class": True}, (4, 4), 2, True),
    "odd patches": ("vit_tiny_patch16_224", {"img_size": 35, "patch_size": 5}, (7, 7), 1, True),
    "a rest of pixels": ("vit_tiny_patch16_224", {"img_size": 35, "patch_size": 11}, (3, 3), 1, True),
    "not square": ("vit_tiny_patch16_224", {"img_size": (24, 32)}, (3, 4), 1, True),
    "BEiT": ("beit_base_patch16_224", {}, (4, 4), 1, True),
    "EVA": ("eva02_tiny_patch14_224", {"qkv_fused": False}, (4, 4), 1, True),
}


def made(name: str) -> nn.Module:
    timm_name, options, *_ = MODELS[name]
    torch.manual_seed(0)
    return timm.create_model(timm_name, **(SIZES | options)).eval()


def images_for(name: str) -> Tensor:
    size = MODELS[name][1].get("img_size", SIZES["img_size"])
    return torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))


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


@pytest.mark.parametrize("name", ["class token", "no class row"])
@torch.no_grad()
def test_all_patches_in_another_order_are_the_same_tokens(name: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"no_embed_class": True} if name == "no class row" else {}
    vit = timm.create_model("vit_tiny_patch16_224", **SIZES, **options).eval()
    assert isinstance(vit, VisionTransformer)
    images, order = torch.randn(2, 3, 32, 32), torch.stack([torch.randperm(16), torch.randperm(16)])
    whole = vit.forward_features(images)
    with backbone.seeing(vit, order):
        seen = vit.forward_features(images)
    torch.testing.assert_close(seen[:, :1], whole[:, :1])
    torch.testing.assert_close(seen[:, 1:], backbone.take(whole[:, 1:], order))
    with backbone.seeing(vit, order[:, :5]):
        assert vit.forward_features(images).shape == (2, 6, 24)
    assert torch.equal(vit.forward_features(images), whole)


ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    "rotary": ("eva02_tiny_patch14_224", {}),
    "rotary, registers": ("vit_small_patch16_dinov3", {}),
    "rotary per block": ("vit_small_patch16_rope_mixed_224", {}),
}


@pytest.mark.parametrize("name", [*(name for name in MODELS if name != "BEiT"), *ROTARY])
@torch.no_grad()
def test_visible_patches_get_what_a_model_gives_that_attends_to_no_hidden_one(name: str) -> None:
    """The reference: all tokens, in float64, with an attention mask on the hidden patches."""
    if name in ROTARY:
        timm_name, options = ROTARY[name]
        torch.manual_seed(0)
        model: Any = timm.create_model(timm_name, **(SIZES | options)).eval().double()
    else:
        model = made(name).double()
    prefix, (rows, columns) = backbone.prefix_tokens(model), backbone.grid(model)
    images, patches = images_for(name if name in MODELS else "EVA").double(), rows * columns
    kept = torch.stack([torch.randperm(patches)[:4].sort().values for _ in range(2)])
    attended = torch.ones(2, prefix + patches, dtype=torch.bool)
    attended[:, prefix:] = torch.zeros(2, patches, dtype=torch.bool).scatter(1, kept, True)
    whole = model.forward_features(images, attn_mask=attended[:, None, None].expand(-1, -1, prefix + patches, -1))
    with backbone.seeing(model, kept):
        seen = model.forward_features(images)
    assert seen.shape == (2, prefix + 4, 24)
    torch.testing.assert_close(seen[:, :prefix], whole[:, :prefix], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(seen[:, prefix:], backbone.take(whole[:, prefix:], kept), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("timm_name", ["beit_base_patch16_224", "resnet18"])
def test_a_model_that_cannot_leave_patches_out_is_refused(timm_name: str) -> None:
    model = timm.create_model(timm_name, num_classes=0)
    with pytest.raises(RecipeError, match="cannot run on visible patches alone"), backbone.seeing(model, torch.ones(1)):
        pass


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
