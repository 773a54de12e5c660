"""The linear probe as an evaluator, on sets whose answer is known."""

import pytest
import torch

from tinymim.configs.errors import SourceError
from tinymim.configs.sections.evaluation import LinearEvaluator
from tinymim.models.probes import linear_probe
from tinymim.stages.evaluation import linear
from tinymim.stages.evaluation.encode import EncodedSet
from tinymim.stages.evaluation.problem import Sets
from tinymim.tests.stages.encoders import clusters, encoder

LABELS = (1000, 7, 123_456_789)


def test_clusters_are_told_apart_and_class_numbers_need_not_be_consecutive() -> None:
    train, val = clusters(LABELS, 8, 0.1, seed=1), clusters(LABELS, 4, 0.1, seed=2)
    found = linear.run(encoder(), Sets(train, val), LinearEvaluator(name="linear"))
    assert found == {"linear_top1": 1.0, "linear_top5": 1.0}


def test_the_numbers_are_those_of_the_fit_with_the_recipe_s_penalty_and_iterations() -> None:
    train, val = clusters(LABELS, 12, 1.5, seed=1), clusters(LABELS, 8, 1.5, seed=2)
    found = linear.run(encoder(), Sets(train, val), LinearEvaluator(name="linear", l2=0.3, max_iter=2))
    order = {label: number for number, label in enumerate(sorted(LABELS))}
    train_y, val_y = (torch.tensor([order[int(label)] for label in each.labels]) for each in (train, val))
    logits = linear_probe(train.features, train_y, val.features, 3, 0.3, 2)
    assert found["linear_top1"] == float((logits.argmax(1) == val_y).double().mean()) > 1 / 3


def test_a_class_that_train_lacks_is_refused() -> None:
    train = clusters(LABELS, 2, 1.0)
    val = EncodedSet(train.features[:1], torch.tensor([8]), [])
    with pytest.raises(SourceError, match="classes that train lacks"):
        linear.run(encoder(), Sets(train, val), LinearEvaluator(name="linear"))
