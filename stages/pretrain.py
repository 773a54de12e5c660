"""`tinymim pretrain`: train any model from images alone, by what it predicts of hidden squares."""

from torch import nn

from tinymim.configs.schema import PretrainRecipe
from tinymim.models.checkpoints import tensors_sha256
from tinymim.models.classifier import load_classifier
from tinymim.models.files import RANDOM
from tinymim.models.mim import MaskedModel
from tinymim.models.student import build_student
from tinymim.models.weights import read_weights
from tinymim.stages.run.device import require_view_size
from tinymim.stages.training.launch import on_ranks
from tinymim.stages.training.masked import Masks, train_masked
from tinymim.stages.training.ranks import Ranks, set_up


def run(recipe: PretrainRecipe) -> None:
    """Train and write `<run.folder>/encoder.safetensors` (a timm model without head), the folder `encoder` that timm
    loads with its sizes and normalisation, metrics and resumable states.

    Args:
        recipe: the recipe to run, in `workers` processes or as the rank that the environment names.

    Raises:
        UserError: bad source, sizes or weights; a loss is not finite; the model cannot hide squares in this way.
        InternalError: workers died more often than `max_restarts` allows.
        Interrupted: stopped by a signal after saving its state.
    """
    on_ranks(train, recipe)


def train(recipe: PretrainRecipe, ranks: Ranks) -> None:
    """`run` on one of the ranks."""
    device, size = set_up(recipe, ranks), recipe.model.img_size
    require_view_size(recipe.views.size, recipe.model, "model")
    recipe.mask.num_visible(size)  # refuses squares that do not fill the image

    def build() -> tuple[nn.Module, nn.Module]:
        encoder = build_student(recipe.model)
        load_classifier(encoder, recipe.model, recipe.weights)  # "random" leaves it as it is
        return encoder, MaskedModel(encoder, size, recipe.mask, recipe.target, recipe.decoder)

    side, content = size // recipe.mask.block, []
    if recipe.weights != RANDOM:
        content = [f"weights {tensors_sha256(read_weights(recipe.model, recipe.weights).tensors)}"]
    train_masked(recipe, ranks, device, build, Masks(side, side), content)
