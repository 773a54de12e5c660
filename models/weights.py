"""The `weights` of a recipe: "random", "hub" (timm's of the model's name), "package:NAME" (shipped), or a file."""

import contextlib
import json
import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from tinymim.configs.errors import CheckpointError, TinymimError, first_line
from tinymim.configs.sections.models import FACTORY, HUB, ModelConfig
from tinymim.models import backbone
from tinymim.models.backbone import POOLED_NORM
from tinymim.models.checkpoints import LoadedWeights, load_tensors, read_checkpoint, read_metadata
from tinymim.models.files import RANDOM, weights_file
from tinymim.models.heads import check_heads
from tinymim.models.hub import without_retries
from tinymim.models.layouts import TIMM
from tinymim.models.timm_folder import Rgb
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, build_model, size_overrides

_LOCAL = "unknown (local file)"


class Read(NamedTuple):
    """Tensors by name, metadata on their origin (may be empty), and their source for messages."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    origin: str


def read_weights(config: ModelConfig, weights: str, classifier: bool = False) -> Read:
    """The tensors of `weights`, which must not be "random"; those of "hub" have timm's classifier if `classifier`.

    Raises:
        CheckpointError: the weights do not exist, cannot be read, or cannot be fetched.
    """
    if weights == HUB:
        return Read(
            build_pretrained(config, num_classes=None if classifier else 0).state_dict(), {}, f"timm's '{config.name}'"
        )
    file = weights_file(weights)
    return Read(*read_checkpoint(*file), str(file.path))


def load_weights(model: nn.Module, weights: str, unread: tuple[str, ...] = ()) -> LoadedWeights:
    """Load a file into an encoder, in place.

    Tables of positions and of position biases are resampled (`models/tables.py`); all other tensors must fit. A layout
    other than timm's is logged.

    Args:
        model: the encoder.
        weights: see `weights_file`.
        unread: prefixes of parameters that nothing will read; the file may lack them.

    Raises:
        CheckpointError: the file is absent or unreadable, was trained with another number of heads, or its tensors
            are missing, unexpected or of another shape (all are listed).
    """
    file = weights_file(weights)
    tensors, metadata = read_checkpoint(*file)
    loaded = load_tensors(model, tensors, str(file.path), may_lack=unread)
    check_heads(model, metadata, str(file.path))
    if loaded.layout != TIMM:
        left_out = f"; not used: {', '.join(loaded.dropped)}" if loaded.dropped else ""
        logging.getLogger("tinymim").info(f"{file.path}: read as {loaded.layout}{left_out}")
    return loaded


def build_with_weights(
    config: ModelConfig, weights: str, unread: tuple[str, ...] = (), classifier: bool = False
) -> nn.Module:
    """The model of `config` with the weights of "hub", "factory" or a file; `unread` as in `load_weights`.

    With `classifier`, the model has the classifier of its weights, if they have one.

    Raises:
        RecipeError: timm cannot build the model.
        CheckpointError: the weights do not exist, do not fit, or cannot be fetched.
    """
    if weights == HUB:
        return build_pretrained(config, num_classes=None if classifier else 0)
    if weights == FACTORY:
        if config.factory is None:
            raise CheckpointError("weights: factory needs a factory", got=f"the timm model {config.name}")
        return build_model(config)
    model = build_model(config, **(_classifier_of(config, read_weights(config, weights).tensors) if classifier else {}))
    load_weights(model, weights, unread)
    return model


def _classifier_of(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """timm's arguments for the classifier in a file: classes, and a ViT's pooling by where its last norm is."""
    with torch.device("meta"):
        heads = backbone.classifier(build_model(config))
    found = next((len(tensors[f"{head}weight"]) for head in heads if f"{head}weight" in tensors), 0)
    return {"num_classes": found} | ({"global_pool": "avg"} if f"{POOLED_NORM}weight" in tensors else {})


def build_pretrained(config: ModelConfig, num_classes: int | None = 0) -> nn.Module:
    """timm's pretrained weights of `config.name`; None: with timm's own classifier.

    Raises:
        CheckpointError: they cannot be fetched.
    """
    # "name.tag" and "hf-hub:owner/name" (or "local-dir:folder") name their weights.
    if not {".", ":"} & set(config.name) and not timm.models.is_model_pretrained(config.name):
        raise CheckpointError(f"timm has no pretrained weights for '{config.name}'", hint="set weights to a file")
    local = config.name.startswith("local-dir:")
    with contextlib.nullcontext() if local else without_retries() as unreachable:
        try:
            return build_model(config, pretrained=True, num_classes=num_classes)
        except TinymimError:
            raise
        except Exception as error:  # the hub client raises many kinds: no network, no such file, no space
            raise CheckpointError(
                f"the pretrained weights of '{config.name}' cannot be {'loaded' if local else 'fetched'}",
                got=unreachable or first_line(error),
                hint="check the folder"
                if local
                else "check the network, or download them elsewhere and set weights to the file",
            ) from error


class Stated(NamedTuple):
    """Mean and deviation of the pixels (0..1) that weights were trained with, their source, the weights' licence."""

    mean: Rgb
    std: Rgb
    source: str
    license: str


def stated(
    model: nn.Module, config: ModelConfig, weights: str, mean: Rgb | None = None, std: Rgb | None = None
) -> Stated:
    """The normalisation of the pixels: the recipe's, else that of the weights.

    Hub weights and names with a tag (`vit_base_patch16_224.mae`) state timm's values. tinymim's own files state theirs.
    A name without a tag states a value if all of timm's weights of that architecture have the same. "random" weights
    take ImageNet's.

    Args:
        model: the model, built from `config`.
        config: the model's section of the recipe.
        weights: the `weights` of the recipe.
        mean: the recipe's mean, if it has one.
        std: the recipe's deviation, if it has one.

    Raises:
        CheckpointError: neither the recipe nor the weights state it. The output of a model changes with it, so it is
            never guessed.
    """
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    own = getattr(model, "license", None) or cfg.get("license") or "unknown"
    licence = str(own) if weights in (HUB, FACTORY) else _LOCAL
    if mean is not None and std is not None:
        return Stated(mean, std, "the recipe", licence)
    known = _known_pixels(cfg, config, weights)
    if isinstance(known, str):
        raise CheckpointError(
            f"mean and std of the pixels are not known for {weights}",
            got=known,
            expected="mean and std in the recipe, beside weights",
            hint=f"set both, such as mean={list(IMAGENET_MEAN)} std={list(IMAGENET_STD)} (ImageNet's; MAE, DINO), or "
            "give the name of the weights with its tag, such as vit_base_patch16_224.mae",
        )
    return Stated(mean or known.mean, std or known.std, known.source, licence)


class _Known(NamedTuple):
    mean: Rgb
    std: Rgb
    source: str


def _known_pixels(cfg: dict[str, Any], config: ModelConfig, weights: str) -> _Known | str:
    """Mean and deviation of weights, or the reason why they are not known."""
    if weights == RANDOM:
        return _Known(IMAGENET_MEAN, IMAGENET_STD, "ImageNet's, for new weights")
    if weights != HUB:
        if weights != FACTORY and (own := _own_pixels(read_metadata(*weights_file(weights)))) is not None:
            return own
        if config.factory is not None and not {"mean", "std"} <= cfg.keys():
            return f"the module of {config.factory}, without a pretrained_cfg that states them"
        if config.factory is None and not {".", ":"} & set(config.name):
            return _common_pixels(config)
    return _Known(tuple(cfg["mean"]), tuple(cfg["std"]), f"timm's for {config.name}")


def _own_pixels(metadata: Mapping[str, str]) -> _Known | None:
    """The statement in a file of tinymim; None for other files."""
    try:
        pixels = json.loads(metadata["pixels"])
        means, deviations = (tuple(map(float, pixels[name])) for name in ("mean", "std"))
        if len(means) == len(deviations) == 3 and all(map(math.isfinite, means)) and min(deviations) > 0:
            return _Known(means, deviations, "those that the file states")
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    # Older files have no such statement. These two commands always trained with ImageNet's.
    if metadata.get("made_by") in ("tinymim pretrain-mae", "tinymim train-student"):
        return _Known(IMAGENET_MEAN, IMAGENET_STD, "ImageNet's, which the command that wrote the file trains with")
    return None


def _common_pixels(config: ModelConfig) -> _Known | str:
    """The values that all of timm's weights of an architecture share."""
    if size_overrides(config):
        return f"a file, and sizes in the recipe that are not those of timm's '{config.name}'"
    found: dict[tuple[Rgb, Rgb], list[str]] = {}
    for name in timm.list_pretrained(f"{config.name}.*"):
        cfg: Any = timm.get_pretrained_cfg(name)
        found.setdefault((tuple(cfg.mean), tuple(cfg.std)), []).append(name.partition(".")[2])
    if len(found) == 1:
        [(mean, std)] = found
        return _Known(mean, std, f"those of all of timm's weights for {config.name}")
    ways = "; ".join(f"mean {mean} of .{', .'.join(tags)}" for (mean, _), tags in found.items())
    return f"a file, and timm's weights for '{config.name}' differ: {ways}" if ways else "a file alone"
