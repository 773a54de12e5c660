"""Small plain ViTs with every arrangement of prefix tokens, positions and attention that the backbone distinguishes."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

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
