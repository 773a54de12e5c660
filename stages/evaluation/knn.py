"""The evaluator `knn`: weighted k-NN of frozen features."""

from tinymim.configs.sections.evaluation import KnnConfig
from tinymim.models.probes import knn_predict
from tinymim.stages.evaluation.encode import Encoder
from tinymim.stages.evaluation.problem import Problem, Sets


def run(encoder: Encoder, sets: Sets, config: KnnConfig) -> dict[str, float]:
    """{"knn_top1", "knn_top5"}, as shares. Raises SourceError where `val` holds classes that `train` lacks."""
    problem = Problem.of(sets, encoder.device)
    scores = knn_predict(
        problem.train_x, problem.train_y, problem.val_x, problem.num_classes, config.k, config.temperature
    )
    return problem.accuracy("knn", scores)
