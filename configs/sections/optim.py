"""Sections of the optimiser and of the moving average of the weights."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tinymim.configs.sections.base import Section
from tinymim.configs.sections.values import Batch, Fraction, Positive

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimConfig(Section):
    """AdamW with linear warm-up, then a cosine to `min_lr`, per step. Give `epochs` or `steps`, not both."""

    batch_size: Batch = Field(default=256, description="Images per step, over all ranks.")
    epochs: Positive | None = Field(default=None, description="Length of the training run in epochs.")
    steps: Positive | None = Field(default=None, description="Length of the training run in steps.")
    base_lr: float = Field(
        default=1.5e-4, gt=0, description="Learning rate at batch 256. The peak is base_lr x batch_size / 256."
    )
    min_lr: float = Field(default=0.0, ge=0, description="Learning rate at the end.")
    warmup: Fraction = Field(
        default=0.05, description="Share of all steps used for warm-up (TinyMIM: 15 of 300 epochs)."
    )
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), description="Betas of AdamW.")
    weight_decay: float = Field(default=0.05, ge=0, description="Weight decay; none on biases, norms and tokens.")
    clip_norm: float | None = Field(default=None, gt=0, description="Largest gradient norm. Default: no clipping.")
    accumulate: Positive = Field(
        default=1, description="Gradient accumulation: a rank splits its share of a batch into N parts."
    )

    @model_validator(mode="after")
    def _one_length(self) -> "OptimConfig":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give epochs or steps, exactly one; got epochs={self.epochs}, steps={self.steps}")
        return self


class LayerwiseOptimConfig(OptimConfig):
    """The optimiser of fine-tuning, with a lower rate in each lower layer (timm's `param_groups_layer_decay`).

    `base_lr` is the rate of the head.
    """

    name: Literal["adamw", "sgd"] = Field(
        default="adamw", description="`adamw`, or `sgd` with Nesterov's momentum, which transfer to small sets uses."
    )
    momentum: Beta = Field(default=0.9, description="Momentum of `sgd`.")
    base_lr: float = Field(
        default=5e-4, gt=0, description="Learning rate of the head at batch 256; scales with the batch as above."
    )
    min_lr: float = Field(default=1e-6, ge=0, description="Learning rate of the head at the end.")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="Betas of `adamw`.")
    layer_decay: float = Field(
        default=0.65,
        gt=0,
        le=1,
        description="Rate of a layer relative to the layer above it. 1: the same rate everywhere.",
    )


class EmaConfig(Section):
    """Moving average of the weights (timm's ModelEmaV3), written beside them as `*-ema.safetensors`."""

    decay: float = Field(default=0.9999, ge=0, lt=1, description="Share of the average that a step keeps.")
    warmup: bool = Field(default=True, description="Raise the decay from 0 as 1 - (1 + step)^(-2/3), up to `decay`.")
