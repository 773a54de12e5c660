"""Plain ViTs over timm: build by name, normalise pixels, cut into patches."""

import contextlib
import re
from typing import Any

import timm
import torch
from timm.models import Eva, VisionTransformer
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError, first_line
from tinymim.configs.sections import ModelConfig
from tinymim.models import backbone, custom
from tinymim.models.hub import without_retries

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def build_model(
    config: ModelConfig, pretrained: bool = False, drop_path: float = 0.0, num_classes: int | None = 0, **extra: Any
) -> nn.Module:
    """The timm model of a recipe; it has a classifier head only with `num_classes`, and timm's own with None.

    With `factory`, it is that factory's module, and no other argument counts.

    Raises:
        RecipeError: timm has no model of this name, or refuses the sizes; or `custom.build` fails.
    """
    if config.factory is not None:
        return custom.build(config)
    overrides = size_overrides(config)
    from_hub = not pretrained and config.name.lower().startswith(("hf-hub:", "hf_hub:"))  # its sizes are there
    try:
        with without_retries() if from_hub else contextlib.nullcontext() as unreachable:
            model: nn.Module = timm.create_model(
                config.name,
                pretrained=pretrained,
                num_classes=num_classes,
                img_size=config.img_size,
                drop_path_rate=drop_path,
                **overrides,
                **extra,
            )
    except (RuntimeError, TypeError, AssertionError, ValueError, OSError, LookupError, ZeroDivisionError) as error:
        if pretrained:  # `weights.build_pretrained` explains what a hub can do
            raise
        close = timm.list_models(f"*{re.sub('[^a-z0-9_]', '?', config.name.split('.')[0][:10])}*")[:5]
        raise RecipeError(
            f"timm cannot build '{config.name}'",
            got=unreachable or first_line(error),
            hint=f"names like it: {', '.join(close) or 'none'}",
        ) from error
    patch = backbone.patch(model)
    if patch is not None and any(config.img_size % side for side in patch):
        raise RecipeError(
            f"img_size is not a multiple of the patch of '{config.name}': border pixels would be left out",
            got=f"img_size {config.img_size}, patches of {patch[0]} x {patch[1]}",
            hint=f"img_size={max(1, config.img_size // patch[0]) * patch[0]}, or set patch_size",
        )
    return model


def size_overrides(config: ModelConfig) -> dict[str, Any]:
    """The sizes of a recipe that replace those of the named architecture, without the image size."""
    sizes = {
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
    }
    return {name: value for name, value in sizes.items() if value is not None}


def build_timm_student(config: ModelConfig, drop_path: float = 0.0) -> backbone.PlainViT:
    """As `build_vit`, or a plain ViT with rotary positions alone, such as timm's DINOv3, initialised likewise."""
    model = build_model(config)
    if not isinstance(model, Eva) or backbone.positions(model) is not None:
        return _initialised(config, model, drop_path)
    backbone.initialise_like_mae(model, None)
    if drop_path:
        backbone.set_drop_path(model, drop_path)
    return model


def build_vit(config: ModelConfig, drop_path: float = 0.0, **extra: Any) -> VisionTransformer:
    """As `build_model`, for students and masked pre-training, which need timm's plain VisionTransformer.

    The position embedding is MAE's fixed 2-D sine-cosine table; linear layers are Xavier-initialised (He et al., 2022).
    `drop_path` is as in `backbone.set_drop_path`.

    Raises:
        RecipeError: as `build_model`, or the model is not a plain ViT.
    """
    return _initialised(config, build_model(config, **extra), drop_path)


def _initialised(config: ModelConfig, model: nn.Module, drop_path: float) -> VisionTransformer:
    held = backbone.positions(model) if isinstance(model, VisionTransformer) else None
    if not isinstance(model, VisionTransformer) or held is None:
        raise RecipeError(
            f"'{config.name}' is not a plain ViT with a position embedding",
            got=type(model).__name__,
            expected="a VisionTransformer such as vit_tiny_patch16_224",
        )
    table = sincos_table(backbone.widths(model)[-1], *backbone.grid(model), prefix=held.prefix)
    backbone.initialise_like_mae(model, table)
    if drop_path:
        backbone.set_drop_path(model, drop_path)
    return model


def sincos_table(dim: int, rows: int, columns: int, prefix: int) -> Tensor:
    """MAE's fixed 2-D position table, float32 [1, prefix + rows x columns, dim]; prefix rows are zero.

    The first half of the channels encodes the column, the second the row (the order of MAE's and TinyMIM's tables),
    each as sin, cos of position / 10000^(2i / (dim / 2)). Raises RecipeError unless 4 divides `dim`.
    """
    if dim % 4:
        raise RecipeError("a 2-D sine-cosine position table needs a width divisible by 4", got=dim)
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    parts = []
    for position in (x, y):
        angle = position.reshape(-1, 1) * omega
        parts += [angle.sin(), angle.cos()]
    table = torch.cat(parts, dim=1).to(torch.float32)
    return torch.cat([torch.zeros(prefix, dim), table])[None]


class Normalise(nn.Module):
    """uint8 pixels [B, 3, S, S] to standardised float [B, 3, S, S]; `mean` and `std` (0..1) default to ImageNet's."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: tuple[float, float, float] | None = None, std: tuple[float, float, float] | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean or IMAGENET_MEAN).view(1, 3, 1, 1) * 255.0)
        self.register_buffer("std", torch.tensor(std or IMAGENET_STD).view(1, 3, 1, 1) * 255.0)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = (pixels.to(self.mean.dtype) - self.mean) / self.std
        return out


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, 3, rows*p, cols*p] to [B, rows*cols, p*p*3], in MAE's channel-last order within a patch."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch, width // patch
    tiles = images.reshape(batch, channels, rows, patch, columns, patch)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch * patch * channels)


def count_parameters(model: nn.Module) -> int:
    """Number of scalars in all parameters."""
    return sum(p.numel() for p in model.parameters())
