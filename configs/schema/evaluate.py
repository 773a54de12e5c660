"""The recipe of `evaluate`."""

from typing import Literal

from pydantic import Field, model_validator

from tinymim.configs.sections import words
from tinymim.configs.sections.base import Section
from tinymim.configs.sections.evaluation import Evaluator, KnnEvaluator, LinearEvaluator
from tinymim.configs.sections.loader import LoaderConfig
from tinymim.configs.sections.models import Mean, ModelConfig, Std
from tinymim.configs.sections.run import RunConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.values import Batch, Positive, ResizeRatio


class EvaluateRecipe(Section):
    """`tinymim evaluate`: evaluators of a frozen model: k-NN, a linear probe, its own classifier, its throughput."""

    stage: Literal["evaluate"] = Field(description=words.STAGE)
    train: SourceConfig | None = Field(default=None, description=f"{words.TRAIN} `knn` and `linear` need them.")
    val: SourceConfig | None = Field(
        default=None, description=f"{words.VAL} All evaluators but `throughput` need them."
    )
    model: ModelConfig = Field(description="Encoder.")
    weights: str = Field(description=words.WEIGHTS)
    block: Positive | None = Field(
        default=None, description="Take features after this block, counted from 1. Default: the last, with its norm."
    )
    pool: Literal["mean", "cls"] = Field(
        default="mean", description="Features: mean over patch tokens, or class token."
    )
    mean: Mean | None = Field(default=None, description=words.MEAN)
    std: Std | None = Field(default=None, description=words.STD)
    resize_ratio: ResizeRatio = Field(default=1.143, description=words.RESIZE_RATIO)
    batch_size: Batch = Field(default=256, description="Images per forward pass. Does not affect results.")
    evaluators: tuple[Evaluator, ...] = Field(
        default=(KnnEvaluator(name="knn"), LinearEvaluator(name="linear")),
        description="What is measured, each evaluator once. --set replaces the whole list.",
    )
    loader: LoaderConfig = Field(default=LoaderConfig(), description=words.LOADER)
    run: RunConfig = Field(description=words.RUN)

    @model_validator(mode="after")
    def _each_once(self) -> "EvaluateRecipe":
        names = [each.name for each in self.evaluators]
        if not names:
            raise ValueError("evaluators is empty: name at least one")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"evaluators names {', '.join(twice)} twice: the results have one place for each")
        return self

    @model_validator(mode="after")
    def _what_they_need(self) -> "EvaluateRecipe":
        for each in self.evaluators:
            needed = {"knn": ("train", "val"), "linear": ("train", "val"), "classifier": ("val",)}.get(each.name, ())
            if lacking := [name for name in needed if getattr(self, name) is None]:
                raise ValueError(f"evaluator {each.name} needs {' and '.join(lacking)}: labelled images")
            if each.name == "classifier" and self.weights == "random":
                raise ValueError("evaluator classifier needs weights with a classifier; got weights: random")
        return self
