"""The k-NN evaluator on sets whose answer is known."""

import pytest
import torch

from tinymim.configs.errors import SourceError
from tinymim.configs.sections.evaluation import KnnConfig
from tinymim.models.probes import knn_predict
from tinymim.stages.evaluation import knn
from tinymim.stages.evaluation.encode import EncodedSet
from tinymim.stages.evaluation.problem import Sets
from tinymim.tests.stages.encoders import clusters, encoder

LABELS = (1000, 7, 123_456_789)


def test_every_image_is_its_own_nearest_and_class_numbers_need_not_be_consecutive() -> None:
    train = clusters(LABELS, per_class=2, spread=1.0)
    assert knn.run(encoder(), Sets(train, train), KnnConfig(k=1)) == {"knn_top1": 1.0, "knn_top5": 1.0}


def test_the_numbers_are_those_of_the_prediction_with_the_recipe_s_k_and_temperature() -> None:
    train, val = clusters(LABELS, 12, 1.5, seed=1), clusters(LABELS, 8, 1.5, seed=2)
    found = knn.run(encoder(), Sets(train, val), KnnConfig(k=3, temperature=0.5))
    order = {label: number for number, label in enumerate(sorted(LABELS))}
    train_y, val_y = (torch.tensor([order[int(label)] for label in each.labels]) for each in (train, val))
    scores = knn_predict(train.features, train_y, val.features, 3, 3, 0.5)
    assert found["knn_top1"] == float((scores.argmax(1) == val_y).double().mean())
    assert 1 / 3 < found["knn_top1"] < found["knn_top5"] == 1.0  # three classes: all are among the best five


def test_a_class_that_train_lacks_is_refused() -> None:
    train = clusters(LABELS, 2, 1.0)
    val = EncodedSet(train.features[:1], torch.tensor([8]), [])
    with pytest.raises(SourceError, match="classes that train lacks"):
        knn.run(encoder(), Sets(train, val), KnnConfig())
