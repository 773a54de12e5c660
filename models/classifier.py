"""A timm model with a classifier head, for fine-tuning: an encoder's weights, and a new head where they have none."""

from collections.abc import Mapping
from pathlib import Path

import torch
from timm.layers import trunc_normal_
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from tinymim.configs.class_map import ABSENT, read_class_map
from tinymim.configs.errors import CheckpointError, RecipeError
from tinymim.configs.sections.models import ModelConfig
from tinymim.models import backbone
from tinymim.models.backbone import FINAL_NORM, POOLED_NORM
from tinymim.models.checkpoints import LoadedWeights, load_tensors, tensors_sha256
from tinymim.models.files import RANDOM
from tinymim.models.heads import check_heads
from tinymim.models.layouts import rewritten
from tinymim.models.timm_folder import POOLS
from tinymim.models.vit import build_model
from tinymim.models.weights import read_weights

_HEAD_STD = 2e-5  # as in MAE: logits start near zero, and the head's first gradients cannot disturb the encoder


def build_classifier(config: ModelConfig, num_classes: int, pool: str, drop_path: float = 0.0) -> nn.Module:
    """The timm model at timm's initialisation, with a trainable position embedding.

    With `pool` "mean", timm's ViT has no final norm but a norm after the pooling, `fc_norm`, as in MAE's fine-tuning.

    Raises:
        RecipeError: timm cannot build it, it has no class token for `pool` "cls", or it is a factory's, whose
            classifier is not known.
    """
    if config.factory is not None:
        raise RecipeError(
            "fine-tuning needs a timm model, to which it gives a classifier",
            got=f"factory {config.factory}",
            hint="evaluate the encoder with `tinymim evaluate`, or fine-tune it in a loop of your own",
        )
    try:
        return build_model(config, drop_path=drop_path, num_classes=num_classes, global_pool=POOLS[pool])
    except RecipeError as error:
        if pool == "cls" and not _has_class_token(config):
            raise RecipeError("pool: cls needs a class token", got=config.name, hint="set pool: mean") from error
        raise


def _has_class_token(config: ModelConfig) -> bool:
    with torch.device("meta"):
        return backbone.has_class_token(build_model(config))


def load_classifier(
    model: nn.Module, config: ModelConfig, weights: str, class_map: Path | None = None
) -> LoadedWeights:
    """Load an encoder's weights, or a classifier's, into a classifier.

    The head stays new unless the weights have one of N classes, N as in the model; so does `fc_norm` unless they have
    it. An encoder's final norm is dropped where the model has `fc_norm`. A plain ViT's weights also fit timm's BEiT,
    whose tables of relative positions (zero) and layer scales (`init_values`) then are new, and its distilled DeiT,
    whose distillation token (and T*'s hidden layer) then is new and has no position. All other tensors must fit.

    Args:
        model: a model from `build_classifier`.
        config: the model's section of the recipe.
        weights: as in `models.weights`; "random" loads nothing.
        class_map: a file of `configs/class_map.py` with the weights' class of each class of the model; its head then
            starts with their rows, and with the mean of these rows for a class that they lack (Wu et al., TinyViT).

    Raises:
        CheckpointError: the weights do not exist, cannot be fetched or do not fit, or have no head for `class_map`.
        RecipeError: the class map cannot be read or is not one of the model's classes.
    """
    if weights == RANDOM:
        return LoadedWeights(tensors_sha256(model.state_dict()), ())
    tensors, metadata, origin = read_weights(config, weights, classifier=class_map is not None)
    head = {} if class_map is None else _mapped_head(model, tensors, origin, class_map)
    hint = "check the model's name and sizes, and pool: a model fine-tuned on the mean over patches has no final norm"
    loaded = load_tensors(
        model,
        tensors,
        origin,
        may_drop=(FINAL_NORM, *backbone.classifier(model)),
        may_lack=(POOLED_NORM, *backbone.classifier(model), *_grown(model, tensors)),
        hint=hint,
    )
    check_heads(model, metadata, origin)
    if any(name.startswith(backbone.classifier(model)) for name in loaded.new):
        _initialise_head(model)
    if head or loaded.new:
        model.load_state_dict(head, strict=False)
        new = tuple(name for name in loaded.new if name not in head)
        loaded = LoadedWeights(tensors_sha256(model.state_dict()), loaded.dropped, new, loaded.layout)
    return loaded


_GROWN = (".relative_position_bias_table", ".gamma_1", ".gamma_2")  # what BEiT has more than a ViT


def _grown(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names that weights of a ViT lack for BEiT or a distilled DeiT; none where the weights have some of the kind."""
    kinds = [kind for kind in _GROWN if not any(name.endswith(kind) for name in tensors)]
    if isinstance(model, VisionTransformerDistilled) and "dist_token" not in tensors:
        return ("dist_token", "hidden.")
    return tuple(name for name in model.state_dict() if isinstance(model, Beit) and name.endswith(tuple(kinds)))


def _mapped_head(model: nn.Module, tensors: dict[str, Tensor], origin: str, file: Path) -> dict[str, Tensor]:
    """The model's head from rows of the weights' head."""
    class_map = torch.tensor(read_class_map(file))
    if len(class_map) != backbone.classes(model):
        raise RecipeError(
            "the class map is not one of the model's classes",
            got=f"{file}: {len(class_map)} lines",
            expected=f"{backbone.classes(model)}, one for each class of train",
        )
    names = [name for name in model.state_dict() if name.startswith(backbone.classifier(model))]
    found = rewritten(model, tensors).tensors
    if not names or not found.keys() >= set(names):
        raise CheckpointError(f"{origin} has no head for class_map", got=", ".join(names), hint="leave out class_map")
    if int(class_map.max()) >= (classes := len(found[names[0]])):
        raise CheckpointError(
            f"{origin} lacks a class of the class map", got=int(class_map.max()), expected=f"< {classes}"
        )
    absent = class_map == ABSENT
    head = {name: found[name][class_map.clamp(min=0)] for name in names}
    for name, rows in head.items():
        rows[absent] = found[name][class_map[~absent]].mean(dim=0)
    return head


def _initialise_head(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith(backbone.classifier(model)):
            weight: Tensor = parameter.data
            trunc_normal_(weight, std=_HEAD_STD) if weight.ndim > 1 else nn.init.zeros_(weight)
