"""A timm model with a classifier head, for fine-tuning: an encoder's weights, and a new head where they have none."""

from collections.abc import Mapping

import torch
from timm.layers import trunc_normal_
from timm.models.beit import Beit
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError
from tinymim.configs.sections import ModelConfig
from tinymim.models import backbone
from tinymim.models.backbone import FINAL_NORM, POOLED_NORM
from tinymim.models.checkpoints import LoadedWeights, load_tensors, tensors_sha256
from tinymim.models.files import RANDOM
from tinymim.models.heads import check_heads
from tinymim.models.timm_folder import POOLS
from tinymim.models.vit import build_model
from tinymim.models.weights import read_weights

_HEAD_STD = 2e-5  # as in MAE: logits start near zero, and the head's first gradients cannot disturb the encoder


def build_classifier(config: ModelConfig, num_classes: int, pool: str, drop_path: float = 0.0) -> nn.Module:
    """The timm model at timm's initialisation, with a trainable position embedding.

    With `pool` "mean", timm's ViT has no final norm but a norm after the pooling, `fc_norm`, as in MAE's fine-tuning.

    Raises:
        RecipeError: timm cannot build it, or it has no class token for `pool` "cls".
    """
    try:
        return build_model(config, drop_path=drop_path, num_classes=num_classes, global_pool=POOLS[pool])
    except RecipeError as error:
        if pool == "cls" and not _has_class_token(config):
            raise RecipeError("pool: cls needs a class token", got=config.name, hint="set pool: mean") from error
        raise


def _has_class_token(config: ModelConfig) -> bool:
    with torch.device("meta"):
        return backbone.has_class_token(build_model(config))


def load_classifier(model: nn.Module, config: ModelConfig, weights: str) -> LoadedWeights:
    """Load an encoder's weights, or a classifier's, into a classifier.

    The head stays new unless the weights have one of N classes, N as in the model; so does `fc_norm` unless they have
    it. An encoder's final norm is dropped where the model has `fc_norm`. A plain ViT's weights also fit timm's BEiT,
    whose tables of relative positions (zero) and layer scales (`init_values`) then are new. All other tensors must fit.

    Args:
        model: a model from `build_classifier`.
        config: the model's section of the recipe.
        weights: as in `models.weights`; "random" loads nothing.

    Raises:
        CheckpointError: the weights do not exist, cannot be fetched or do not fit.
    """
    if weights == RANDOM:
        return LoadedWeights(tensors_sha256(model.state_dict()), ())
    tensors, metadata, origin = read_weights(config, weights)
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
        loaded = LoadedWeights(tensors_sha256(model.state_dict()), loaded.dropped, loaded.new, loaded.layout)
    return loaded


_GROWN = (".relative_position_bias_table", ".gamma_1", ".gamma_2")  # what BEiT has more than a ViT


def _grown(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names that weights of a ViT lack for BEiT; none where the weights have some of the kind."""
    kinds = [kind for kind in _GROWN if not any(name.endswith(kind) for name in tensors)]
    return tuple(name for name in model.state_dict() if isinstance(model, Beit) and name.endswith(tuple(kinds)))


def _initialise_head(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith(backbone.classifier(model)):
            weight: Tensor = parameter.data
            trunc_normal_(weight, std=_HEAD_STD) if weight.ndim > 1 else nn.init.zeros_(weight)
