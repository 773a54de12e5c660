"""k-NN and linear probe of encoded sets."""

from typing import NamedTuple

import torch
from torch import Tensor

from tinymim.configs.sections import KnnConfig, LinearProbeConfig
from tinymim.models.probes import knn_predict, linear_probe, top_k_accuracy
from tinymim.stages.evaluation.classes import refuse_unseen
from tinymim.stages.evaluation.encode import Encoded


def probe(
    train: Encoded, val: Encoded, knn: KnnConfig, linear: LinearProbeConfig, device: torch.device
) -> dict[str, float]:
    """Top-1 and top-5 accuracy, as shares, of k-NN and of a linear probe from `train` to `val`.

    Raises:
        SourceError: `val` holds classes that `train` lacks; their numbers are named.
    """
    problem = _problem(train, val, device)
    logits = linear_probe(*problem[:-1], linear.l2, linear.max_iter)
    return _nearest(problem, knn) | _accuracy("linear", logits, problem.val_y)


def knn_accuracy(train: Encoded, val: Encoded, knn: KnnConfig, device: torch.device) -> dict[str, float]:
    """Of `probe` the k-NN alone."""
    return _nearest(_problem(train, val, device), knn)


class _Problem(NamedTuple):
    """What a probe is fitted to and judged by, on one device; classes count from 0 without gaps."""

    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    num_classes: int
    val_y: Tensor


def _problem(train: Encoded, val: Encoded, device: torch.device) -> _Problem:
    refuse_unseen(train.labels.numpy(), val.labels.numpy(), ())
    classes, train_y = train.labels.unique(return_inverse=True)  # class numbers need not be 0, 1, 2, ...
    train_x, val_x, train_y = train.features.to(device), val.features.to(device), train_y.to(device)
    return _Problem(train_x, train_y, val_x, len(classes), torch.searchsorted(classes, val.labels).to(device))


def _nearest(problem: _Problem, knn: KnnConfig) -> dict[str, float]:
    scores = knn_predict(*problem[:-1], knn.k, knn.temperature)
    return _accuracy("knn", scores, problem.val_y)


def _accuracy(name: str, scores: Tensor, labels: Tensor) -> dict[str, float]:
    return {f"{name}_top{k}": top_k_accuracy(scores, labels, k) for k in (1, 5)}
