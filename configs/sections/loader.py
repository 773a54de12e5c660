"""Sections of the loader: its processes, the order of the samples, the check of their pixels."""

from typing import Literal

from pydantic import Field, model_validator

from tinymim.configs.sections.base import Section
from tinymim.configs.sections.values import Positive, Processes, Seed, Whole


class LoaderConfig(Section):
    """Reading and decoding. These fields change neither a pixel nor the order of samples."""

    workers: int = Field(
        default=2,
        ge=0,
        le=1024,
        description="Loader processes per rank. 0: load in the training process, without overlap.",
    )
    prefetch: Processes = Field(
        default=4, description="Batches kept ready per loader process; at least `order.views_per_decode`."
    )


class OrderConfig(Section):
    """The order of samples: a function of (seed, epoch), whatever the number of workers (I10)."""

    seed: Seed = Field(default=0, description="Seed of the order.")
    shuffle_units: Positive = Field(
        default=4, description="Shards whose samples are mixed, per lane. Memory grows with it (docs/training.md)."
    )
    views_per_decode: Positive = Field(
        default=1, description="Views made from one decode. Consecutive batches then hold the same images."
    )
    views_per_epoch: Positive | Literal["all"] = Field(
        default=1, description="Views of every image per epoch: a multiple of `views_per_decode`, or `all`."
    )
    lanes: Positive = Field(
        default=1, description="Parts of an epoch. Must be a multiple of every number of ranks and divide the batch."
    )

    @model_validator(mode="after")
    def _whole_decodes(self) -> "OrderConfig":
        if self.views_per_epoch != "all" and self.views_per_epoch % self.views_per_decode:
            raise ValueError(
                f"views_per_epoch must be a multiple of views_per_decode, or all; "
                f"got {self.views_per_epoch} and {self.views_per_decode}"
            )
        return self


class VerifyConfig(Section):
    """Comparison of replayed pixels with the stored digests: are these the teacher's pixels? (I2)"""

    first: Whole = Field(default=4096, description="Compare the first N samples after a start or resume.")
    every: Whole = Field(default=16, description="Then compare one sample in N. 0: none.")
