"""One small instance of every family of models in docs/backbones.md, with random weights."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tinymim.configs.sections.models import ModelConfig
from tinymim.models.vit import build_model


@dataclass(frozen=True)
class Family:
    """A timm name, its image size, and arguments that make it small."""

    name: str
    img_size: int = 64
    args: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)

    def config(self) -> ModelConfig:
        """The section of a recipe."""
        fields = {"name": self.name, "img_size": self.img_size, "args": self.args, **self.sizes}
        return ModelConfig.model_validate(fields)


_VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3}
_DEPTHS, _WIDTHS = [1, 1, 1, 1], [8, 16, 24, 32]
_SWIN = {"depths": _DEPTHS, "num_heads": [1, 2, 2, 2], "window_size": 2}
FAMILIES: dict[str, Family] = {
    "vit": Family("vit_tiny_patch16_224", sizes=_VIT),
    "deit": Family("deit_tiny_distilled_patch16_224", sizes=_VIT),
    "beit": Family("beit_base_patch16_224", sizes=_VIT),
    "eva": Family("eva02_tiny_patch14_224", 56, sizes=_VIT),
    "dinov2": Family("vit_small_patch14_reg4_dinov2", 56, sizes=_VIT),
    "dinov3": Family("vit_small_patch16_dinov3", sizes=_VIT),
    "aimv2": Family("aimv2_large_patch14_224", 56, sizes=_VIT),
    "siglip": Family("vit_base_patch16_siglip_224", sizes=_VIT),
    "samvit": Family("samvit_base_patch16", sizes=_VIT),
    "swin": Family("swin_tiny_patch4_window7_224", args=_SWIN, sizes={"embed_dim": 12}),
    "swinv2": Family("swinv2_tiny_window8_256", args=_SWIN, sizes={"embed_dim": 12}),
    "tiny_vit": Family(
        "tiny_vit_5m_224",
        args={"embed_dims": _WIDTHS, "depths": _DEPTHS, "num_heads": [1, 1, 1, 1], "window_sizes": [2, 2, 4, 2]},
    ),
    "hiera": Family("hiera_tiny_224", args={"stages": _DEPTHS}, sizes={"embed_dim": 12, "num_heads": 1}),
    "pvt_v2": Family("pvt_v2_b0", args={"depths": _DEPTHS, "embed_dims": _WIDTHS, "num_heads": [1, 2, 3, 4]}),
    "maxvit": Family("maxvit_rmlp_pico_rw_256", args={"embed_dim": [32, 32, 32, 32], "depths": _DEPTHS}),
    "convnextv2": Family("convnextv2_atto", args={"depths": _DEPTHS, "dims": _WIDTHS}),
    "resnet": Family("resnet18", args={"layers": _DEPTHS, "channels": _WIDTHS}),
    "repvit": Family("repvit_m0_9", args={"embed_dim": _WIDTHS, "depth": _DEPTHS}),
    "mobilenetv4": Family("mobilenetv4_conv_small"),
}


def made(family: str, **extra: Any) -> nn.Module:
    """The model at timm's initialisation of seed 0, in eval mode."""
    torch.manual_seed(0)
    return build_model(FAMILIES[family].config(), **extra).eval()
