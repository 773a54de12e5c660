"""The student's step: one forward and backward pass of every student against one batch of targets.

Used by `train-student`, `plan`, the benchmarks and the evidence. Here are also the checks that a student fits its
cache.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from tinymim.configs.errors import CacheMismatch, RecipeError
from tinymim.configs.load import load_recipe
from tinymim.configs.schema import TrainStudentRecipe
from tinymim.configs.sections import JitterConfig, ModelConfig
from tinymim.models import backbone
from tinymim.models.student import StudentModel, fit_of, fitted_shapes, shapes_of
from tinymim.models.vit import build_student, count_parameters
from tinymim.pipeline.dataset import ViewBatch
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.replay import CachedSource
from tinymim.stages.run.device import autocast
from tinymim.stages.run.folder import RECIPE_NAME
from tinymim.stages.training.device_stream import CPU, DeviceStream, MakeTargets, current
from tinymim.stages.training.learner import Learner
from tinymim.stages.training.optim import Part, parts_of, seeded
from tinymim.stages.training.ranks import Ranks, rank_device
from tinymim.stages.training.states import has_state
from tinymim.stages.training.terms import Term, naming
from tinymim.storage.constants import constants_digest
from tinymim.storage.reader import CacheReader


class Student(NamedTuple):
    """A student, its own jitter, and what trains it."""

    jitter: JitterConfig
    model: StudentModel
    learner: Learner


def make_students(
    recipe: TrainStudentRecipe,
    terms: Sequence[Term],
    ranks: Ranks,
    order: SampleOrder,
    content: list[str],
) -> list[Student]:
    """The recipe's students at their initial weights, each on its device.

    Args:
        recipe: the training recipe.
        terms: the terms of the loss, whose teachers they must fit.
        ranks: the ranks of the run.
        order: the order of samples.
        content: digests of the data that their states depend on, from `trained_on`.

    Raises:
        CacheMismatch: a student's tokens are not the teacher's.
        RecipeError: its width does not fit.
        Both name the layer if there are several.
    """
    students = []
    for name, own in recipe.each().items():
        assert own.student is not None  # by TrainStudentRecipe.each
        for term in terms:
            check_student_fits(own.student, term)
        device = rank_device(own.run.device, ranks)
        torch.manual_seed(own.run.seed)
        vit = build_student(own.student, drop_path=own.drop_path)
        if own.recompute:
            backbone.recompute(vit)
        shapes = shapes_of(vit, own.student.img_size)
        fits = [fit_of(shapes, term.shapes, term.kind.taps) for term in terms]
        heads = [term.kind.head(fitted_shapes(shapes, fit), term.shapes) for term, fit in zip(terms, fits, strict=True)]
        model = StudentModel(vit, *heads, fits=fits).to(device)
        about = f"{name or 'student'} of {count_parameters(model.vit):,} parameters"
        example = (torch.zeros(2, 3, own.student.img_size, own.student.img_size, device=device),)
        learner = Learner(name, about, own, "student", model, example, ranks, order, content)
        students.append(Student(own.jitter, model, learner))
    return students


class StudentStep:
    """Trains students on one stream of batches; targets and jittered images are computed once per device.

    Args:
        recipe: the training recipe: accumulation, precision, seed.
        students: the students, from `make_students`.
        terms: the terms of the loss.
        targets: by device, the function that computes targets there.
        places: int64 [B], the places of this rank's samples in a step's whole batch.
        batch_size: number of samples in the whole batch.
    """

    def __init__(
        self,
        recipe: TrainStudentRecipe,
        students: Sequence[Student],
        terms: Sequence[Term],
        targets: Mapping[torch.device, MakeTargets],
        places: Tensor,
        batch_size: int,
    ) -> None:
        self.recipe, self.students, self.terms = recipe, students, terms
        self.places, self.batch_size = places, batch_size
        self.streams = {
            device: DeviceStream(device, make, recipe.run.seed, places, batch_size) for device, make in targets.items()
        }

    def __call__(self, step: int, batch: ViewBatch) -> None:
        """Do step `step`, counted from 0."""
        self.take(step, batch)
        for part in parts_of(len(self.places), self.recipe.optim.accumulate):
            self.add(step, part)
        self.update(step)

    def take(self, step: int, batch: ViewBatch) -> None:
        """Copy the batch to every device."""
        for stream in self.streams.values():
            stream.take(step, batch)

    def add(self, step: int, part: Part) -> None:
        """Add the gradients of a part of the batch."""
        # First the targets on all devices, then the students: nothing here waits, so all devices compute at once.
        for stream in self.streams.values():
            stream.cut(part.rows)
        for jitter, model, learner in self.students:
            stream = self.streams[learner.device]
            # The same draws for every student, so that a student among several trains as it would alone.
            model.draw(seeded(CPU, self.recipe.run.seed, step), self.places[part.rows], self.batch_size)
            with current(learner.device), learner.part_of_step(part.first, part.last):
                with autocast(learner.device, self.recipe.precision):
                    answers = model.by_head(learner.model(stream.images(jitter)))
                    means: dict[str, Tensor] = {}
                    weighted: list[Tensor] = []
                    for term, own, target in zip(self.terms, answers, stream.targets, strict=True):
                        losses = term.kind.losses(own, target)
                        found = {term.metric(name): loss.mean() for name, loss in losses.items()}
                        weight = term.weight(step, learner.schedule.total_steps)
                        means |= found
                        weighted += found.values() if weight == 1.0 else [weight * mean for mean in found.values()]
                    loss = torch.stack(weighted).sum()
                learner.backward({"loss": loss} | means, part.share)

    def update(self, step: int) -> None:
        """Update the weights of all students."""
        for *_, learner in self.students:
            with current(learner.device):
                learner.update(step)


def views_in_use(recipe: TrainStudentRecipe, ranks: Ranks) -> int | None:
    """Number of views per image to train on; None: those that all shards have. All ranks must call it.

    A resumed run continues with the views it began with, although the cache may have grown since.
    """
    if recipe.num_views is not None or not recipe.checkpoint.resume:
        return recipe.num_views
    num_views = None
    folder = next(iter(recipe.each().values())).run.folder
    if ranks.first and has_state(folder):
        with suppress(RecipeError):  # an unreadable recipe: the identity in the state decides
            begun = load_recipe(folder / RECIPE_NAME, recipe.stage)
            num_views = begun.num_views if isinstance(begun, TrainStudentRecipe) else None
    shared = ranks.from_first(None if num_views is None else str(num_views).encode())
    return None if shared is None else int(shared)


def trained_on(reader: CacheReader, source: CachedSource) -> list[str]:
    """Digests of the data that a training state depends on: specs and constants of layers, their shards of images."""
    digests = []
    for layer in map(reader.layer, source.layers):
        constants = constants_digest(reader.store, layer)
        digests += [layer.spec_id, *([constants] if constants else [])]
    return digests + [shard.content_hash for shard in source.shards]


def check_view_size(student: ModelConfig, size: int) -> None:
    """Raises CacheMismatch where a student's input size is not the size of the cached views."""
    if student.img_size != size:
        raise CacheMismatch(
            "student.img_size is not the size of the cached views",
            got=student.img_size,
            expected=size,
            hint="students train at the size of the teacher's views",
        )


def check_student_fits(student: ModelConfig, term: Term) -> None:
    """Compare the student's tokens and width with a teacher's; allocates no weights.

    Raises:
        CacheMismatch, RecipeError: the kind of target cannot compare a student of these tokens, or of this width.
    """
    with naming(term.layer), torch.device("meta"):
        own = shapes_of(build_student(student), student.img_size)
        term.kind.head(fitted_shapes(own, fit_of(own, term.shapes, term.kind.taps)), term.shapes)
