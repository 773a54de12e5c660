"""Recipes of training from images alone: `pretrain` and `pretrain-mae`."""

from typing import Literal

from pydantic import Field, model_validator

from tinymim.configs.schema.training import TrainingFields
from tinymim.configs.sections import words
from tinymim.configs.sections.decoders import LightDecoderConfig, MaeConfig, PredictedConfig
from tinymim.configs.sections.masks import PretrainMaskConfig
from tinymim.configs.sections.models import Mean, ModelConfig, Std
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.views import ViewConfig


class PretrainMaeRecipe(TrainingFields):
    """`tinymim pretrain-mae`: train a teacher, or a baseline student, from images alone."""

    stage: Literal["pretrain-mae"] = Field(description=words.STAGE)
    source: SourceConfig = Field(description=words.SOURCE)
    views: ViewConfig = Field(default=ViewConfig(), description=words.VIEWS)
    model: ModelConfig = Field(description="Encoder to train.")
    mae: MaeConfig = Field(default=MaeConfig(), description="Mask and decoder.")


class PretrainRecipe(TrainingFields):
    """`tinymim pretrain`: train any model from images alone, by what it predicts of hidden squares."""

    stage: Literal["pretrain"] = Field(description=words.STAGE)
    source: SourceConfig = Field(description=words.SOURCE)
    views: ViewConfig = Field(default=ViewConfig(size=128), description=words.VIEWS)
    model: ModelConfig = Field(description="Model to train.")
    weights: str = Field(
        default="random",
        description="Weights to start from: `random`, or a file, also of another input size; a run at a higher "
        "resolution continues one at a lower.",
    )
    xavier: bool = Field(
        default=False,
        description="Start linear layers from Xavier-uniform weights, as MAE does; plain ViTs always do. timm's other "
        "models start from a standard deviation of 0.02, too small for narrow ones (docs/pretrain.md).",
    )
    mean: Mean | None = Field(default=None, description=words.MEAN)
    std: Std | None = Field(default=None, description=words.STD)
    mask: PretrainMaskConfig = Field(default=PretrainMaskConfig(), description="Hidden squares.")
    target: PredictedConfig = Field(default=PredictedConfig(), description="What is predicted of them.")
    decoder: LightDecoderConfig = Field(default=LightDecoderConfig(), description="Decoder, dropped at export.")

    @model_validator(mode="after")
    def _given_weights_are_kept(self) -> "PretrainRecipe":
        if self.xavier and self.weights != "random":
            raise ValueError("xavier: true would replace the given weights; leave it out, or set weights: random")
        return self

    @model_validator(mode="after")
    def _dropped_patches_have_positions(self) -> "PretrainRecipe":
        if self.mask.hide == "drop" and not self.decoder.position:
            raise ValueError("mask.hide: drop needs decoder.position: true; dropped patches differ in nothing else")
        return self
