"""Two ViTs for class distillation that timm lacks, registered under names of their own.

Importing this module is enough for `timm.create_model` to build them, also outside tinymim.

Shapes: B image, T token, C width, K class.
"""

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tinymim.models import backbone

_TINY: dict[str, Any] = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}


class HiddenDistilled(VisionTransformerDistilled):
    """A distilled DeiT with a hidden layer before its heads, as TinyMIM's T* (Ren et al., CVPR 2023).

    Class and distillation token go through one layer, Linear and GELU, after the final norm. Its parameters and those
    of the encoder are the 5.8 M of the paper, which does not count the heads.

    Args:
        hidden: width of the layer.
    """

    head: Any
    head_dist: Any

    def __init__(self, *args: Any, hidden: int = 1280, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]  # timm's has no types
        self.hidden, self.hidden_act = nn.Linear(backbone.final_width(self), hidden), nn.GELU()
        trunc_normal_(self.hidden.weight, std=0.02)
        nn.init.zeros_(self.hidden.bias)
        self.head_hidden_size = hidden
        self.reset_classifier(self.num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model new heads of `num_classes` classes, or none."""
        self.num_classes = num_classes
        self.head, self.head_dist = (_head(self.hidden.out_features, num_classes) for _ in range(2))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Logits [B, K] for tokens [B, T, C], or those of both heads in distilled training."""
        read = self.hidden_act(self.hidden(x[:, :2]))
        return _answers(self, read[:, 0], read[:, 1], pre_logits)


class PooledDistilled(VisionTransformer):
    """A ViT whose class token is the distillation token, and whose other head reads the mean of the patches.

    MAE-Lite's class distillation with `pool: mean` (Wang et al., ICML 2023). The norm after the pooling, `fc_norm`,
    serves both.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distilled_training = False
        self.reset_classifier(self.num_classes)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Have the model answer with both heads in training."""
        self.distilled_training = enable

    def get_classifier(self) -> Any:
        """Both heads."""
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model new heads of `num_classes` classes, or none."""
        super().reset_classifier(num_classes, global_pool)
        self.head_dist = _head(backbone.final_width(self), num_classes)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """As `HiddenDistilled.forward_head`."""
        return _answers(self, self.fc_norm(self.pool(x)), self.fc_norm(x[:, 0]), pre_logits)


def _head(width: int, num_classes: int) -> nn.Module:
    return nn.Linear(width, num_classes) if num_classes > 0 else nn.Identity()


def _answers(model: Any, labels: Tensor, teacher: Tensor, pre_logits: bool) -> Tensor | tuple[Tensor, Tensor]:
    """From what the heads read [B, C]: its mean, both logits in distilled training, else the mean of them."""
    labels, teacher = model.head_drop(labels), model.head_drop(teacher)
    if pre_logits:
        return (labels + teacher) / 2
    both = model.head(labels), model.head_dist(teacher)
    return both if model.distilled_training and model.training else torch.stack(both).mean(0)


default_cfgs = generate_default_cfgs(
    {
        f"{name}_tiny_patch16_224": {
            "url": "", "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": None, "crop_pct": 0.9,
            "interpolation": "bicubic", "fixed_input_size": True, "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD, "first_conv": "patch_embed.proj", "classifier": ("head", "head_dist"),
        }
        for name in ("tinymim_star", "mae_lite_distilled")
    }
)  # fmt: skip


@register_model
def tinymim_star_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> HiddenDistilled:
    """TinyMIM's T*."""
    made = build_model_with_cfg(HiddenDistilled, "tinymim_star_tiny_patch16_224", pretrained, **_TINY | kwargs)
    assert isinstance(made, HiddenDistilled)
    return made


@register_model
def mae_lite_distilled_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> PooledDistilled:
    """MAE-Lite's ViT-T in class distillation with `pool: mean`."""
    made = build_model_with_cfg(PooledDistilled, "mae_lite_distilled_tiny_patch16_224", pretrained, **_TINY | kwargs)
    assert isinstance(made, PooledDistilled)
    return made
