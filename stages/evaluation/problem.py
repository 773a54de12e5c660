"""Two encoded sets as a classification problem for a probe. Shapes: N, M image; C channel; K class."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tinymim.models.probes import top_k_accuracy
from tinymim.stages.evaluation.classes import refuse_unseen
from tinymim.stages.evaluation.encode import EncodedSet


class Sets(NamedTuple):
    """The sets of an evaluation, encoded once for all evaluators."""

    train: EncodedSet
    val: EncodedSet


@dataclass(frozen=True)
class Problem:
    """Features and labels on one device; classes count from 0 without gaps."""

    train_x: Float[Tensor, "N C"]
    train_y: Int64[Tensor, " N"]
    val_x: Float[Tensor, "M C"]
    val_y: Int64[Tensor, " M"]
    num_classes: int

    @classmethod
    def of(cls, sets: Sets, device: torch.device) -> "Problem":
        """The problem on `device`. Raises SourceError, naming labels, where `val` holds classes that `train` lacks."""
        train, val = sets
        refuse_unseen(train.labels.numpy(), val.labels.numpy(), ())
        classes, train_y = train.labels.unique(return_inverse=True)  # class numbers need not be 0, 1, 2, ...
        val_y = torch.searchsorted(classes, val.labels)
        return cls(
            train.features.to(device), train_y.to(device), val.features.to(device), val_y.to(device), len(classes)
        )

    def accuracy(self, name: str, scores: Float[Tensor, "M K"]) -> dict[str, float]:
        """Top-1 and top-5 accuracy of an evaluator's scores, as shares, by metric name."""
        return {f"{name}_top{k}": top_k_accuracy(scores, self.val_y, k) for k in (1, 5)}
