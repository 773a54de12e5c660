"""Models over timm: build by name, normalise pixels, cut into patches."""

import contextlib
import re
from typing import Any

import timm
import torch
from timm.models import Eva, VisionTransformer
from torch import Tensor, nn

import tinymim.models.distilled  # noqa: F401  # registers its models with timm
from tinymim.configs.errors import RecipeError, first_line
from tinymim.configs.sections.models import ModelConfig
from tinymim.models import backbone, custom
from tinymim.models.hub import without_retries
from tinymim.models.initialise import initialise_like_mae, set_drop_path, sincos_table

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
    overrides = {"drop_path_rate": drop_path, **size_overrides(config), **extra}
    from_hub = not pretrained and config.name.lower().startswith(("hf-hub:", "hf_hub:"))  # its sizes are there
    try:
        with without_retries() if from_hub else contextlib.nullcontext() as unreachable:
            model = _created(config, pretrained=pretrained, num_classes=num_classes, **overrides)
    except (RuntimeError, TypeError, AssertionError, ValueError, OSError, LookupError, ZeroDivisionError) as error:
        if pretrained:  # `weights.build_pretrained` explains what a hub can do
            raise
        if (unknown := _unknown(error)) == "drop_path_rate":
            raise RecipeError(
                f"timm's '{config.name}' has no stochastic depth", got=drop_path, hint="drop_path=0"
            ) from error
        if unknown is not None:
            raise RecipeError(
                f"timm's '{config.name}' does not take {unknown}",
                got=f"{unknown}: {overrides.get(unknown)}",
                hint="its own arguments go into args, such as {depths: [2, 2, 6, 2]}",
            ) from error
        close = timm.list_models(f"*{re.sub('[^a-z0-9_]', '?', config.name.split('.')[0][:10])}*")[:5]
        raise RecipeError(
            f"timm cannot build '{config.name}'",
            got=unreachable or first_line(error),
            hint=f"names like it: {', '.join(close) or 'none'}",
        ) from error
    cell = backbone.cell(model)
    if cell is not None and any(config.img_size % side for side in cell):
        cells = "patches" if backbone.is_plain(model) else "last cells"
        raise RecipeError(
            f"img_size is not a multiple of the {'patch' if backbone.is_plain(model) else 'last stride'} of "
            f"'{config.name}': border pixels would be left out",
            got=f"img_size {config.img_size}, {cells} of {cell[0]} x {cell[1]}",
            hint=f"img_size={max(1, config.img_size // cell[0]) * cell[0]}"
            + (", or set patch_size" if backbone.is_plain(model) else ""),
        )
    backbone.forget_biases(model)
    return model


def _created(config: ModelConfig, **arguments: Any) -> nn.Module:
    """timm's model, without the image size and a drop rate of 0 where its class takes none."""
    arguments["img_size"] = config.img_size
    while True:
        try:
            return timm.create_model(config.name, **arguments)
        except TypeError as error:
            unknown = _unknown(error)
            if unknown != "img_size" and (unknown != "drop_path_rate" or arguments[unknown]):
                raise
            del arguments[unknown]


def _unknown(error: BaseException) -> str | None:
    """The argument that a model's class does not take, from Python's message."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error)) if isinstance(error, TypeError) else None
    return None if found is None else found[1]


def size_overrides(config: ModelConfig) -> dict[str, Any]:
    """timm's arguments in a recipe that replace those of the named architecture, without the image size."""
    sizes = {
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
    }
    args = {name: tuple(value) if isinstance(value, list) else value for name, value in config.args.items()}
    return {name: value for name, value in sizes.items() if value is not None} | args


def build_timm_student(config: ModelConfig, drop_path: float = 0.0, **extra: Any) -> nn.Module:
    """As `build_model`, at the initial weights of a student; `drop_path` is its stochastic depth.

    timm's VisionTransformer gets MAE's initialisation: a fixed 2-D sine-cosine position table, Xavier-uniform linear
    layers (He et al., 2022), and one drop rate as in `set_drop_path`. So does an Eva with rotary positions
    alone, such as DINOv3, without the table. Others keep timm's, with a rising rate.

    Raises:
        RecipeError: as `build_model`.
    """
    model = build_model(config, drop_path=drop_path, **extra)
    table: Tensor | None
    if isinstance(model, Eva) and backbone.positions(model) is None:
        table = None
    elif isinstance(model, VisionTransformer) and (held := backbone.positions(model)) is not None:
        table = sincos_table(backbone.final_width(model), *backbone.grid(model), prefix=held.prefix)
    else:
        return model
    initialise_like_mae(model, table)
    if drop_path:
        set_drop_path(model, drop_path)
    return model


def build_vit(config: ModelConfig, drop_path: float = 0.0, **extra: Any) -> VisionTransformer:
    """As `build_timm_student`, for masked pre-training, which needs timm's plain VisionTransformer.

    Raises:
        RecipeError: as `build_model`, or the model is not a plain ViT.
    """
    model = build_timm_student(config, drop_path, **extra)
    if not isinstance(model, VisionTransformer) or backbone.positions(model) is None:
        raise RecipeError(
            f"'{config.name}' is not a plain ViT with a position embedding",
            got=type(model).__name__,
            expected="a VisionTransformer such as vit_tiny_patch16_224",
        )
    return model


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
