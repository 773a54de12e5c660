"""The number of attention heads of a file's weights: no tensor's shape fixes it, yet the function depends on it."""

from collections.abc import Mapping

import torch
from pydantic import ValidationError
from torch import nn

from tinymim.configs.errors import CheckpointError, RecipeError
from tinymim.configs.sections.models import ModelConfig
from tinymim.configs.strict_yaml import parse_yaml
from tinymim.models.backbone import heads
from tinymim.models.vit import build_model


def stated_heads(metadata: Mapping[str, str]) -> int | None:
    """Heads of the model in the recipe that tinymim stores in a file's metadata; None without such a recipe."""
    try:
        recipe = parse_yaml(metadata.get("recipe", ""), "metadata") or {}
        config = ModelConfig.model_validate(recipe.get("student") or recipe["model"])
        if config.num_heads is not None:
            return config.num_heads
        if ":" in config.name:  # a file's metadata must not send timm to a hub or a folder
            return None
        with torch.device("meta"):
            return heads(build_model(ModelConfig(name=config.name)))
    except (AttributeError, KeyError, TypeError, ValidationError, RecipeError):  # not a recipe of ours
        return None


def check_heads(model: nn.Module, metadata: Mapping[str, str], origin: str) -> None:
    """Raises CheckpointError where a file's number of heads is not the model's, although all shapes fit."""
    stated, own = stated_heads(metadata), heads(model)
    if stated is not None and own is not None and stated != own:
        raise CheckpointError(
            f"{origin} was trained with another number of heads",
            got=f"{stated} heads in its recipe, {own} in this model",
            hint=f"set num_heads={stated}: the shapes fit either way, the function does not",
        )
