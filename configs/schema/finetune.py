"""The recipe of `finetune`."""

from typing import Literal

from pydantic import Field, model_validator

from tinymim.configs.schema.training import TrainingFields
from tinymim.configs.sections import words
from tinymim.configs.sections.augment import AugmentConfig
from tinymim.configs.sections.evaluation import ValidationConfig
from tinymim.configs.sections.models import ClassTeacherConfig, Mean, ModelConfig, Std
from tinymim.configs.sections.optim import LayerwiseOptimConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.values import DropRate, Folder
from tinymim.configs.sections.views import ViewConfig


class FinetuneRecipe(TrainingFields):
    """`tinymim finetune`: train an encoder and a new head on labelled images (docs/finetune.md)."""

    stage: Literal["finetune"] = Field(description=words.STAGE)
    train: SourceConfig = Field(description=words.TRAIN)
    val: SourceConfig = Field(description=words.VAL)
    views: ViewConfig = Field(
        default=ViewConfig(), description="View law; epoch e uses view e. Papers: `scale: [0.08, 1.0]`."
    )
    model: ModelConfig = Field(description="Encoder.")
    weights: str = Field(description=words.WEIGHTS)
    class_map: Folder | None = Field(
        default=None,
        description="Start with rows of the weights' head: a text file with their class of label 0, 1, ..., one a "
        "line; -1: the mean of the others. Default: see docs/finetune.md.",
    )
    pool: Literal["mean", "cls"] = Field(
        default="mean", description="Input of the head: the mean over patches through a new norm, or the class token."
    )
    mean: Mean | None = Field(default=None, description=words.MEAN)
    std: Std | None = Field(default=None, description=words.STD)
    drop_path: DropRate = Field(
        default=0.1, description="Stochastic depth; the rate rises from 0 to this value (timm)."
    )
    distil: ClassTeacherConfig | None = Field(
        default=None, description="Class distillation by a classifier in the loop (docs/finetune.md). Default: none."
    )
    smoothing: float = Field(default=0.1, ge=0, lt=1, description="Label smoothing.")
    augment: AugmentConfig = Field(default=AugmentConfig(), description="Augmentation.")
    optim: LayerwiseOptimConfig = Field(description="Optimiser, schedule and length.")
    validation: ValidationConfig = Field(default=ValidationConfig(), description="Validation during training.")

    @model_validator(mode="after")
    def _whole_pairs(self) -> "FinetuneRecipe":
        for name in ("operations", "pairs"):
            if getattr(self.views, name) is not None:
                raise ValueError(f"views.{name} is for caches and pre-training; fine-tuning has `augment` instead")
        pool = "mean" if self.model.name.startswith("mae_lite_distilled") else "cls"
        if self.distil is not None and self.pool != pool:
            raise ValueError(f"distil trains two heads, of which {self.model.name} reads others; set pool: {pool}")
        if self.augment.mixes and self.optim.batch_size % (2 * self.order.lanes):
            raise ValueError(
                "mixup and cutmix pair samples of a lane, so optim.batch_size must be a multiple of 2 x order.lanes; "
                f"got {self.optim.batch_size} and {self.order.lanes} lanes"
            )
        return self
