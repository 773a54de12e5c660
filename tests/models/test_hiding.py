"""A model that sees some patches alone gives what attention to no hidden patch gives; what cannot do so is refused."""

from typing import Any

import pytest
import timm
import torch
from timm.models import VisionTransformer

from tinymim.configs.errors import RecipeError
from tinymim.models import backbone, hiding
from tinymim.tests.models.plain_vits import MODELS, SIZES, images_for, made


@pytest.mark.parametrize("name", ["class token", "no class row"])
@torch.no_grad()
def test_all_patches_in_another_order_are_the_same_tokens(name: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"no_embed_class": True} if name == "no class row" else {}
    vit = timm.create_model("vit_tiny_patch16_224", **SIZES, **options).eval()
    assert isinstance(vit, VisionTransformer)
    images, order = torch.randn(2, 3, 32, 32), torch.stack([torch.randperm(16), torch.randperm(16)])
    whole = vit.forward_features(images)
    with hiding.seeing(vit, order):
        seen = vit.forward_features(images)
    torch.testing.assert_close(seen[:, :1], whole[:, :1])
    torch.testing.assert_close(seen[:, 1:], hiding.take(whole[:, 1:], order))
    with hiding.seeing(vit, order[:, :5]):
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
    with hiding.seeing(model, kept):
        seen = model.forward_features(images)
    assert seen.shape == (2, prefix + 4, 24)
    torch.testing.assert_close(seen[:, :prefix], whole[:, :prefix], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(seen[:, prefix:], hiding.take(whole[:, prefix:], kept), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("timm_name", ["beit_base_patch16_224", "resnet18"])
def test_a_model_that_cannot_leave_patches_out_is_refused(timm_name: str) -> None:
    model = timm.create_model(timm_name, num_classes=0)
    with pytest.raises(RecipeError, match="cannot run on visible patches alone"), hiding.seeing(model, torch.ones(1)):
        pass
