"""`tinymim pretrain-mae`: pre-train a teacher on any images as a masked autoencoder."""

import torch
from torch import nn

from tinymim.configs.schema import PretrainMaeRecipe
from tinymim.models import backbone
from tinymim.models.mae import MaskedAutoencoder
from tinymim.models.vit import build_vit
from tinymim.stages.run.device import require_view_size
from tinymim.stages.training.launch import on_ranks
from tinymim.stages.training.masked import Masks, train_masked
from tinymim.stages.training.ranks import Ranks, set_up


def run(recipe: PretrainMaeRecipe) -> None:
    """Train and write `<run.folder>/encoder.safetensors` (a timm ViT without head), the folder `encoder` that timm
    loads with its sizes and normalisation, metrics and resumable states.

    Args:
        recipe: the recipe to run, in `workers` processes or as the rank that the environment names.

    Raises:
        UserError: bad source, sizes or weights; a loss is not finite.
        InternalError: workers died more often than `max_restarts` allows.
        Interrupted: stopped by a signal after saving its state.
    """
    on_ranks(train, recipe)


def train(recipe: PretrainMaeRecipe, ranks: Ranks) -> None:
    """`run` on one of the ranks."""
    device = set_up(recipe, ranks)
    require_view_size(recipe.views.size, recipe.model, "model")

    def build() -> tuple[nn.Module, nn.Module]:
        encoder = build_vit(recipe.model)
        return encoder, MaskedAutoencoder(encoder, recipe.mae)

    with torch.device("meta"):
        rows, columns = backbone.grid(build_vit(recipe.model))
    train_masked(recipe, ranks, device, build, Masks(rows, columns, recipe.mae.mask_unit))
