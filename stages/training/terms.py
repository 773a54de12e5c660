"""The terms of a student's loss: one for each layer of the cache that it learns from, with a weight for each step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from tinymim.configs.errors import TinymimError
from tinymim.configs.schema.train import LayerConfig
from tinymim.configs.sections.masks import MaskConfig
from tinymim.configs.taps import Shapes
from tinymim.pipeline.dataset import ViewBatch
from tinymim.targets.contract import Answers, StudentTarget
from tinymim.targets.logits.kind import Logits


class Term(NamedTuple):
    """What students are compared with by one layer.

    Attributes:
        kind: the layer's kind of target.
        shapes: the shapes of its teacher.
        layer: its name where there are several; empty for a single term.
        weights: weights in the first and in the last step.
        mask: the patches that its teacher did not see; None: it saw all.
        student_block: the block of the student that learns it, counted from 1; None: a head on the final tokens.
    """

    kind: StudentTarget
    shapes: Shapes
    layer: str = ""
    weights: tuple[float, float] = (1.0, 1.0)
    mask: MaskConfig | None = None
    student_block: int | None = None

    def weight(self, step: int, total_steps: int) -> float:
        """The weight of step `step`, counted from 0: a function of the step alone, so that a resume needs no state."""
        first, last = self.weights
        return first + (last - first) * step / max(1, total_steps - 1)

    def loss_name(self, loss: str) -> str:
        """The name of one of the kind's losses among those of all terms: "cls", or "clip-cls/cls"."""
        return f"{self.layer}/{loss}" if self.layer else loss

    def metric(self, loss: str) -> str:
        """Its name in the metrics: "distance_cls", or "distance_clip-cls/cls"."""
        return f"{self.kind.measure}_{self.loss_name(loss)}"


def weights_of(config: LayerConfig) -> tuple[float, float]:
    """The weights in the first and in the last step."""
    return config.weight, config.weight if config.end_weight is None else config.end_weight


def weight_metrics(terms: Sequence[Term], step: int, total_steps: int) -> dict[str, float]:
    """The weights of a step by name in the metrics; empty for a single term."""
    return {f"weight_{term.layer}": term.weight(step, total_steps) for term in terms if term.layer}


def label_top1(term: Term, answers: Answers, batch: ViewBatch, rows: slice) -> dict[str, Tensor]:
    """How far a student of class logits agrees with the labels, a check that cache and images belong together.

    Args:
        term: the term of the loss.
        answers: the student's answers for a part of the batch.
        batch: the batch.
        rows: the part.

    Returns:
        `label_top1`, the mean over views of the share whose label is the student's first class: a mixed view counts by
        the shares of its two images, an image without a label as a miss. Empty for other kinds of target.
    """
    if not isinstance(term.kind, Logits):
        return {}
    first = answers[0].detach().argmax(-1)
    parts = (batch.labels, *batch.partner_labels())
    own, partners, shares = (each[rows].to(first.device, non_blocking=True) for each in parts)
    hits = shares * (first == own) + (1.0 - shares) * (first == partners)
    return {f"label_top1_{term.layer}" if term.layer else "label_top1": hits.mean()}


@contextmanager
def naming(name: str, what: str = "layer") -> Iterator[None]:
    """Name the layer, or the student, in errors about it, where there are several; `name` is empty for the only one."""
    try:
        yield
    except TinymimError as error:
        if not name:
            raise
        whole = f"{what} {name}: {error.what}"
        raise type(error)(whole, got=error.got, expected=error.expected, hint=error.hint) from error
