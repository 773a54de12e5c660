"""A whole model under evaluation: with the classifier of its weights, if they have one."""

from dataclasses import dataclass, field

import torch
from torch import nn

from tinymim.configs.schema.evaluate import EvaluateRecipe
from tinymim.models.files import RANDOM
from tinymim.models.timm_folder import Rgb
from tinymim.models.vit import Normalise, build_model
from tinymim.models.weights import build_with_weights, stated
from tinymim.pipeline.shards import ShardSet
from tinymim.pipeline.views import CentreView
from tinymim.stages.run.interrupt import StopFlag

Measured = dict[str, float | int | str]  # by name of the metric; accuracies are shares


def load_whole(recipe: EvaluateRecipe) -> tuple[nn.Module, Rgb, Rgb]:
    """The model with the classifier of its weights, and the mean and deviation (0..1) that normalise its pixels.

    "random" weights are timm's initial ones, with the classifier that timm's model has.

    Raises:
        CheckpointError: the weights do not exist, do not fit, cannot be fetched, or do not state mean and std.
        RecipeError: timm cannot build the model.
    """
    if recipe.weights == RANDOM:
        torch.manual_seed(recipe.run.seed)
        model = build_model(recipe.model, num_classes=None)
    else:
        model = build_with_weights(recipe.model, recipe.weights, classifier=True)
    pixels = stated(model, recipe.model, recipe.weights, recipe.mean, recipe.std)
    return model, pixels.mean, pixels.std


@dataclass
class Whole:
    """A model in eval mode on `device`, its input, and what an evaluation of it needs.

    Attributes:
        unreadable: (key, reason) of images of `val` that could not be read.
    """

    model: nn.Module
    mean: Rgb
    std: Rgb
    recipe: EvaluateRecipe
    val: ShardSet | None
    device: torch.device
    stop: StopFlag
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.to(self.device).eval()
        self.normalise = Normalise(self.mean, self.std).to(self.device)
        self.law = CentreView(self.recipe.model.img_size, self.recipe.resize_ratio)
