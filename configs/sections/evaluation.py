"""Sections of the evaluators, and of validation during fine-tuning."""

from typing import Annotated, Literal

from pydantic import Field

from tinymim.configs.sections import words
from tinymim.configs.sections.base import Section
from tinymim.configs.sections.values import Batch, Folder, Positive, Precision, ResizeRatio


class ValidationConfig(Section):
    """Accuracy on `val` during fine-tuning, and always after the last step."""

    every_epochs: Positive = Field(default=1, description="Epochs between validations.")
    batch_size: Batch = Field(default=256, description="Images per forward pass and rank. Does not affect results.")
    resize_ratio: ResizeRatio = Field(default=1.143, description=words.RESIZE_RATIO)


class KnnConfig(Section):
    """Weighted k-NN on l2-normalised features (Wu et al., CVPR 2018; Caron et al., ICCV 2021)."""

    k: Positive = Field(default=20, description="Number of neighbours.")
    temperature: float = Field(default=0.07, ge=1e-3, description="Temperature of the neighbours' weights.")


class KnnEvaluator(KnnConfig):
    """An evaluator: top-1 and top-5 accuracy of k-NN."""

    name: Literal["knn"] = Field(description="This evaluator.")


class LinearEvaluator(Section):
    """An evaluator: accuracy of multinomial logistic regression on standardised features by L-BFGS, full batch."""

    name: Literal["linear"] = Field(description="This evaluator.")
    l2: float = Field(default=1e-3, ge=0, le=1e6, description="Weight of the L2 penalty.")
    max_iter: Positive = Field(default=200, description="Largest number of L-BFGS iterations.")


class ClassifierEvaluator(Section):
    """An evaluator: accuracy of the classifier in the weights, as it is; nothing is trained."""

    name: Literal["classifier"] = Field(description="This evaluator.")
    class_map: Folder | None = Field(
        default=None,
        description="Text file with the classifier's class of label 0, 1, ..., one a line; -1: none. Default: labels "
        "are the classifier's classes.",
    )
    real_labels: Literal["timm"] | Folder | None = Field(
        default=None,
        description="Also measure accuracy on ImageNet ReaL's labels: its `real.json`, a JSON object {image name: "
        "labels}, or `timm` for the copy in timm.",
    )


class ThroughputEvaluator(Section):
    """An evaluator: images per second of a forward pass on random pixels, parameters, and multiply-adds."""

    name: Literal["throughput"] = Field(description="This evaluator.")
    batch_size: Batch = Field(default=64, description="Images per forward pass.")
    precision: Precision = Field(default="fp32", description="Precision of the forward pass.")
    passes: Positive = Field(default=30, description="Passes that are timed; the median counts.")
    warmup_passes: Positive = Field(default=5, description="Passes before them.")


Evaluator = Annotated[
    KnnEvaluator | LinearEvaluator | ClassifierEvaluator | ThroughputEvaluator, Field(discriminator="name")
]
