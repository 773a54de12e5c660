"""The `config.json` beside weights, with which `timm.create_model("local-dir:FOLDER", pretrained=True)` loads them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tinymim.configs.sections.models import ModelConfig
from tinymim.configs.sections.values import ResizeRatio
from tinymim.models import backbone
from tinymim.models.vit import size_overrides

Rgb = tuple[float, float, float]
POOLS = {"mean": "avg", "cls": "token"}  # timm's names


@dataclass(frozen=True)
class Pixels:
    """How a model's input is made: mean and deviation for pixels in 0..1, filter and centre crop, or squeeze."""

    mean: Rgb
    std: Rgb
    interpolation: str = "bicubic"
    crop_pct: float = 0.875  # the side of the crop, divided by the short side of the resized image
    squeezed: bool = False  # the whole image becomes the square

    def metadata(self) -> dict[str, str]:
        """The statement that weights carry in their own file."""
        return {"pixels": json.dumps({"mean": self.mean, "std": self.std})}


def crop_of(resize_ratio: ResizeRatio) -> tuple[float, bool]:
    """`crop_pct` and `squeezed` of a view law."""
    return (1.0, True) if isinstance(resize_ratio, str) else (1 / resize_ratio, False)


def timm_arguments(model: nn.Module, config: ModelConfig, pool: str) -> dict[str, Any]:
    """Arguments of `timm.create_model` that rebuild a classifier; its saved weights carry them as metadata."""
    named = {"model_name": config.name, "num_classes": backbone.classes(model), "global_pool": POOLS[pool]}
    return named | _sizes(model, config)


def _sizes(model: nn.Module, config: ModelConfig) -> dict[str, Any]:
    own = {"img_size": config.img_size} if backbone.takes_img_size(model) else {}
    return own | size_overrides(config)


def timm_config(
    model: nn.Module, config: ModelConfig, pixels: Pixels, pool: str | None = None, classes: Sequence[str] = ()
) -> dict[str, Any]:
    """The content of `config.json`, as JSON values. With `factory`, it names the factory, and timm cannot load it.

    Args:
        model: the model, built from `config`.
        config: the model's section of the recipe.
        pixels: the input that the model was trained on.
        pool: the classifier's pooling, as in recipes; None for a model without a classifier.
        classes: names of the classes by number; may be empty.
    """
    if config.factory is not None:  # not a folder for timm, but of the same names: the module, and how to call it
        own_pixels = {"mean": list(pixels.mean), "std": list(pixels.std), "interpolation": pixels.interpolation}
        return {"factory": config.factory, "args": config.args, "img_size": config.img_size, **own_pixels}
    timm_model: Any = model
    architecture: dict[str, Any] = timm_model.pretrained_cfg
    # A name with a source, "local-dir:..." or "hf-hub:...", brings arguments of its own.
    own = getattr(model, "_model_args", {}) if ":" in config.name else {}
    found: dict[str, Any] = {
        "architecture": architecture["architecture"],
        "num_classes": timm_model.num_classes,
        "num_features": backbone.final_width(model),
        "model_args": own | _sizes(model, config) | ({"global_pool": POOLS[pool]} if pool else {}),
        "pretrained_cfg": {
            "input_size": [3, config.img_size, config.img_size],
            "fixed_input_size": architecture.get("fixed_input_size", False),
            "interpolation": pixels.interpolation,
            "crop_pct": pixels.crop_pct,
            "crop_mode": "squash" if pixels.squeezed else "center",
            "mean": list(pixels.mean),
            "std": list(pixels.std),
            "num_classes": timm_model.num_classes,
            "pool_size": None,
            "first_conv": architecture.get("first_conv"),
            "classifier": architecture.get("classifier"),
        },
    }
    return found | ({"label_names": list(classes)} if len(classes) == timm_model.num_classes > 0 else {})
