"""An encoder and encoded sets for the tests of evaluators."""

from collections.abc import Sequence

import numpy as np
import torch

from tinymim.configs.sections.loader import LoaderConfig
from tinymim.pipeline.views import CentreView
from tinymim.stages.evaluation.encode import EncodedSet, Encoder


def encoder() -> Encoder:
    """One that encodes nothing: for evaluators of features that are there."""
    identity = torch.nn.Identity()
    return Encoder(identity, identity, CentreView(32, 1.0), None, "mean", 1, LoaderConfig(), torch.device("cpu"))


def clusters(labels: Sequence[int], per_class: int, spread: float, seed: int = 0) -> EncodedSet:
    """Features [N, 4] around one centre a class, which no seed moves; the classes take turns."""
    rng = np.random.default_rng(seed)
    centres = np.eye(len(labels), 4)
    features = np.tile(centres, (per_class, 1)) + spread * rng.normal(size=(len(labels) * per_class, 4))
    return EncodedSet(torch.from_numpy(features).float(), torch.tensor([*labels] * per_class), [])
