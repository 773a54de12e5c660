"""Sections of the student audits."""

from typing import Literal

from pydantic import Field

from tinymim.configs.sections import words
from tinymim.configs.sections.base import Section
from tinymim.configs.sections.evaluation import KnnConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.values import LARGEST, Batch, LayerName, Place, ResizeRatio


class AuditKnnConfig(KnnConfig):
    """k-NN accuracy of the student at each audit, on centre crops of labelled shards."""

    train: SourceConfig = Field(description="Labelled images that serve as neighbours.")
    val: SourceConfig = Field(description="Labelled images that are classified.")
    resize_ratio: ResizeRatio = Field(default=1.143, description=words.RESIZE_RATIO)
    batch_size: Batch = Field(default=256, description="Images per forward pass. Does not affect results.")


class AuditConfig(Section):
    """Student audits: compare students with dense targets of held-out images during training (docs/audits.md)."""

    cache: Place = Field(description="Cache with codec `dense` or `hidden`, of the same teacher and view size.")
    layer: LayerName | None = Field(default=None, description="Layer of that cache. Default: the only one.")
    source: SourceConfig = Field(description="Images of the audit's cache, held out from training.")
    every_epochs: float = Field(
        default=10.0,
        ge=1e-6,
        le=1e9,
        description="Epochs between audits. Audits also run before the first and after the last step.",
    )
    num_images: int = Field(
        default=64, ge=8, le=LARGEST, description="Images per audit: the first N of the cache, one view each."
    )
    knn: AuditKnnConfig | None = Field(default=None, description="Also measure k-NN accuracy. Default: no.")
    on_alarm: Literal["warn", "stop"] = Field(
        default="warn", description="`warn` prints a message; `stop` saves the state and exits with code 2."
    )
