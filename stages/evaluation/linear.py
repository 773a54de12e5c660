"""The evaluator `linear`: logistic regression on frozen features."""

from tinymim.configs.sections.evaluation import LinearEvaluator
from tinymim.models.probes import linear_probe
from tinymim.stages.evaluation.encode import Encoder
from tinymim.stages.evaluation.problem import Problem, Sets


def run(encoder: Encoder, sets: Sets, config: LinearEvaluator) -> dict[str, float]:
    """{"linear_top1", "linear_top5"}, as shares. Raises SourceError where `val` holds classes that `train` lacks."""
    problem = Problem.of(sets, encoder.device)
    logits = linear_probe(
        problem.train_x, problem.train_y, problem.val_x, problem.num_classes, config.l2, config.max_iter
    )
    return problem.accuracy("linear", logits)
