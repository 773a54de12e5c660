"""The fields that all training commands share."""

from typing import Literal

from pydantic import Field, model_validator

from tinymim.configs.sections import words
from tinymim.configs.sections.base import Section
from tinymim.configs.sections.loader import LoaderConfig, OrderConfig
from tinymim.configs.sections.optim import EmaConfig, OptimConfig
from tinymim.configs.sections.run import CheckpointConfig, RunConfig
from tinymim.configs.sections.values import Precision, Processes, Whole

Cluster = Literal["local", "ray"]


class TrainingFields(Section):
    """Fields that all training commands share."""

    stage: str
    optim: OptimConfig = Field(description="Optimiser, schedule and length.")
    ema: EmaConfig | None = Field(
        default=None, description="Moving average of the weights. Default: none; `{}` turns it on."
    )
    order: OrderConfig = Field(default=OrderConfig(), description="Order of the samples.")
    loader: LoaderConfig = Field(default=LoaderConfig(), description="Loader processes.")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), description="States for resume.")
    precision: Precision = Field(default="fp32", description="Precision of training; `fp16` uses loss scaling.")
    batch_norm: Literal["train", "frozen", "sync"] = Field(
        default="train",
        description="Batch norms use each rank's batch (train), their stored statistics (frozen; weights still train), "
        "or the batch of all ranks (sync; GPUs).",
    )
    recompute: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: less memory, more time. With `batch_norm: train` the "
        "stored statistics then see each batch twice.",
    )
    workers: Processes = Field(
        default=1,
        description="Training processes on this machine, one per GPU. Ignored under torchrun (docs/training.md).",
    )
    cluster: Cluster = Field(
        default="local", description="`local` starts the workers on this machine, `ray` by Ray Train on a cluster."
    )
    max_restarts: Whole = Field(
        default=3, description="Restarts of all workers after one was killed or crashed, per training run."
    )
    run: RunConfig = Field(description=words.RUN)

    @model_validator(mode="after")
    def _whole_shares(self) -> "TrainingFields":
        for name, value in (("order.lanes", self.order.lanes), ("optim.batch_size", self.optim.batch_size)):
            if value % self.workers:
                raise ValueError(f"workers must divide {name}; got {self.workers} workers, {name} {value}")
        return self
