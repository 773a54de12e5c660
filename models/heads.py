"""The number of heads behind a file's weights: no tensor's shape tells it, and another number is another model."""

from collections.abc import Mapping

import torch
import yaml
from pydantic import ValidationError
from torch import nn

from tinymim.configs.errors import CheckpointError, RecipeError
from tinymim.configs.sections import ModelConfig
from tinymim.models.backbone import heads
from tinymim.models.vit import build_model


def stated_heads(metadata: Mapping[str, str]) -> int | None:
    """Heads of the model in the recipe that a file of tinymim's carries; None where it does not say."""
    try:
        recipe = yaml.safe_load(metadata.get("recipe", "")) or {}
        config = ModelConfig.model_validate(recipe.get("student") or recipe["model"])
        if config.num_heads is not None:
            return config.num_heads
        if ":" in config.name:  # a file's words must not send timm to a hub or a folder
            return None
        with torch.device("meta"):
            return heads(build_model(ModelConfig(name=config.name)))
    except (yaml.YAMLError, AttributeError, KeyError, ValidationError, RecipeError):  # not a recipe of ours
        return None


def check_heads(model: nn.Module, metadata: Mapping[str, str], origin: str) -> None:
    """Raises CheckpointError where a file states another number of heads than the model has: its shapes would fit."""
    stated, own = stated_heads(metadata), heads(model)
    if stated is not None and own is not None and stated != own:
        raise CheckpointError(
            f"{origin} was trained with another number of heads",
            got=f"{stated} heads in its recipe, {own} in this model",
            hint=f"set num_heads={stated}: shapes would fit either way, the function would not",
        )
