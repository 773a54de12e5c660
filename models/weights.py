"""The `weights` of a recipe: "random", "hub" (timm's of the model's name), "package:NAME" (shipped), or a file."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import timm
from torch import Tensor, nn

from tinymim.configs.errors import CheckpointError, first_line
from tinymim.configs.sections import ModelConfig
from tinymim.models.backbone import POOLED_NORM
from tinymim.models.checkpoints import LoadedWeights, load_tensors, read_metadata, read_tensors
from tinymim.models.files import HUB, weights_path
from tinymim.models.heads import check_heads
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, build_model


class Read(NamedTuple):
    """Tensors by name, metadata on their origin (may be empty), and their source for messages."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    origin: str


def read_weights(config: ModelConfig, weights: str) -> Read:
    """The tensors of `weights`, which must not be "random".

    Raises:
        CheckpointError: the weights do not exist, cannot be read, or cannot be fetched.
    """
    if weights == HUB:
        return Read(build_pretrained(config).state_dict(), {}, f"timm's '{config.name}'")
    path = weights_path(weights)
    return Read(read_tensors(path), read_metadata(path), str(path))


def load_weights(model: nn.Module, weights: str, unread: tuple[str, ...] = ()) -> LoadedWeights:
    """Load a file into an encoder, in place.

    A position embedding of another grid is resampled (timm's bicubic); all other tensors must fit.

    Args:
        model: the encoder.
        weights: see `weights_path`.
        unread: prefixes of parameters that nothing will read; the file may lack them.

    Raises:
        CheckpointError: the file is absent or unreadable, was trained with another number of heads, or its tensors
            are missing, unexpected or of another shape (all are listed).
    """
    path = weights_path(weights)
    loaded = load_tensors(model, read_tensors(path), str(path), may_lack=unread)
    check_heads(model, read_metadata(path), str(path))
    return loaded


def build_with_weights(
    config: ModelConfig, weights: str, unread: tuple[str, ...] = (), classifier: bool = False
) -> nn.Module:
    """The timm model of `config` with the weights of "hub" or of a file; `unread` as in `load_weights`.

    With `classifier`, the model has the classifier of its weights, if they have one.

    Raises:
        RecipeError: timm cannot build the model.
        CheckpointError: the weights do not exist, do not fit, or cannot be fetched.
    """
    if weights == HUB:
        return build_pretrained(config, num_classes=None if classifier else 0)
    model = build_model(config, **(_classifier_of(read_weights(config, weights).tensors) if classifier else {}))
    load_weights(model, weights, unread)
    return model


def _classifier_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """timm's arguments for the classifier of a ViT's weights: classes, and pooling by where its last norm is."""
    head = tensors.get("head.weight")
    pooled = {"global_pool": "avg"} if f"{POOLED_NORM}weight" in tensors else {}
    return {"num_classes": 0 if head is None else len(head), **pooled}


def build_pretrained(config: ModelConfig, num_classes: int | None = 0) -> nn.Module:
    """timm's pretrained weights of `config.name`; None: with timm's own classifier.

    Raises:
        CheckpointError: they cannot be fetched.
    """
    # "name.tag" and "hf-hub:owner/name" (or "local-dir:folder") name their weights.
    if not {".", ":"} & set(config.name) and not timm.models.is_model_pretrained(config.name):
        raise CheckpointError(f"timm has no pretrained weights for '{config.name}'", hint="set weights to a file")
    try:
        return build_model(config, pretrained=True, num_classes=num_classes)
    except Exception as error:  # the hub client raises many kinds: no network, no such file, no space
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"the pretrained weights of '{config.name}' cannot be fetched",
            got=first_line(error),
            hint="check the network, or download them elsewhere and set weights to the file",
        ) from error


class Stated(NamedTuple):
    """Mean and deviation of the pixels (0..1) that weights were trained with, and the weights' licence."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    license: str


def stated(model: nn.Module, weights: str) -> Stated:
    """timm's statement on hub weights. A file gets ImageNet's values, which MAE, DINOv2 and `pretrain-mae` use."""
    if weights != HUB:
        return Stated(IMAGENET_MEAN, IMAGENET_STD, "unknown (local file)")
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    mean, std = tuple(cfg.get("mean", IMAGENET_MEAN)), tuple(cfg.get("std", IMAGENET_STD))
    return Stated(mean, std, str(cfg.get("license") or "unknown"))
