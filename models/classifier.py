"""A timm model with a head, as fine-tuning begins with it: an encoder's weights, a new head where they have none."""

from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from tinymim.configs.sections import ModelConfig
from tinymim.models.checkpoints import (
    LoadedWeights,
    load_tensors,
    read_metadata,
    read_tensors,
    tensors_sha256,
    weights_path,
)
from tinymim.models.heads import check_heads
from tinymim.models.teacher import build_pretrained
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, build_model, size_overrides

_HEAD_STD = 2e-5  # MAE's: a new head says nothing at first, and what it sends back cannot disturb the encoder
_POOLS = {"mean": "avg", "cls": "token"}  # timm's names


def timm_arguments(config: ModelConfig, num_classes: int, pool: str) -> dict[str, Any]:
    """What `timm.create_model` is called with to get the classifier, for whoever loads it."""
    sizes = {"img_size": config.img_size, **size_overrides(config)}
    return {"model_name": config.name, "num_classes": num_classes, "global_pool": _POOLS[pool], **sizes}


def build_classifier(config: ModelConfig, num_classes: int, pool: str, drop_path: float = 0.0) -> nn.Module:
    """The timm model, at timm's initialisation, its position embedding free to train.

    With `pool` "mean" timm's ViT has no final norm but one behind the pooling, `fc_norm`, as MAE's fine-tuning has.

    Raises:
        RecipeError: timm cannot build it.
    """
    return build_model(config, drop_path=drop_path, num_classes=num_classes, global_pool=_POOLS[pool])


def load_classifier(model: nn.Module, config: ModelConfig, weights: str) -> LoadedWeights:
    """Load an encoder's weights, or a classifier's, into a classifier.

    What stays new is the head, unless there is one of as many classes, and `fc_norm`; the final norm of an encoder is
    dropped where the model has it behind the pooling. All else must fit.

    Args:
        model: from `build_classifier`.
        config: of that model.
        weights: "random": nothing is loaded; "hub"; "package:NAME"; or a file.

    Raises:
        CheckpointError: the weights do not exist, cannot be fetched or do not fit.
    """
    if weights == "random":
        return LoadedWeights(tensors_sha256(model.state_dict()), ())
    if weights == "hub":
        tensors, origin = build_pretrained(config).state_dict(), f"timm's '{config.name}'"
    else:
        path = weights_path(weights)
        tensors, origin = read_tensors(path), str(path)
    hint = "check the model's name and sizes, and pool: a model fine-tuned on the mean over patches has no final norm"
    loaded = load_tensors(
        model,
        tensors,
        origin,
        may_drop=("norm.", *_head(model)),
        may_lack=("fc_norm.", *_head(model)),
        hint=hint,
    )
    if weights != "hub":
        check_heads(model, read_metadata(path), path)
    if any(name.startswith(_head(model)) for name in loaded.new):
        _initialise_head(model)
        loaded = LoadedWeights(tensors_sha256(model.state_dict()), loaded.dropped, loaded.new)
    return loaded


def pixel_statistics(model_config: ModelConfig, weights: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the pixels (0..1) that the weights were made with: what timm states, else ImageNet's."""
    if weights != "hub":
        return IMAGENET_MEAN, IMAGENET_STD
    with torch.device("meta"):
        stated: dict[str, Any] = getattr(build_model(model_config), "pretrained_cfg", None) or {}
    return tuple(stated.get("mean", IMAGENET_MEAN)), tuple(stated.get("std", IMAGENET_STD))


def _head(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the classifier's parameters, as timm names them: "head." of a ViT."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _initialise_head(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith(_head(model)):
            weight: Tensor = parameter.data
            trunc_normal_(weight, std=_HEAD_STD) if weight.ndim > 1 else nn.init.zeros_(weight)
