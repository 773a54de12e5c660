"""The student's step: one forward and backward pass of every student against one batch of targets.

Used by `train-student`, `plan`, the benchmarks and the evidence. Here are also the checks that a student fits its
cache.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from tinymim.configs.errors import CacheMismatch, RecipeError, SourceError
from tinymim.configs.load import load_recipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.sections.augment import JitterConfig
from tinymim.configs.sections.decoders import MimConfig
from tinymim.configs.sections.masks import StudentMaskConfig
from tinymim.configs.sections.models import ModelConfig
from tinymim.configs.taps import Shapes, Tap
from tinymim.models import backbone, hiding
from tinymim.models.student import Fit, StudentModel, build_student, check_inner, fit_of, fitted_shapes, shapes_of
from tinymim.models.vit import count_parameters
from tinymim.pipeline.dataset import ViewBatch
from tinymim.pipeline.joined import CachedSource
from tinymim.pipeline.masks import visible_patches
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.tar import UNLABELLED
from tinymim.stages.run.device import autocast
from tinymim.stages.run.folder import RECIPE_NAME
from tinymim.stages.training.device_stream import CPU, DeviceStream, MakeTargets, current
from tinymim.stages.training.learner import Learner
from tinymim.stages.training.optim import Part, parts_of, seeded
from tinymim.stages.training.ranks import Ranks, rank_device
from tinymim.stages.training.states import has_state
from tinymim.stages.training.terms import Term, label_top1, naming
from tinymim.storage import layout
from tinymim.storage.constants import constants_digest
from tinymim.storage.reader import CacheReader
from tinymim.targets.contract import TargetHead, TargetKind
from tinymim.targets.vectors import check_visible

MIM_METRIC: Final = "distance_pixels"  # the loss on hidden patches among the metrics


class Student(NamedTuple):
    """A student, its own jitter, and what trains it."""

    jitter: JitterConfig
    model: StudentModel
    learner: Learner

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches of a student that can have a mask."""
        return backbone.grid(self.model.vit)


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
        CacheMismatch, RecipeError: as `check_students`.
    """
    check_students(recipe, terms)
    students = []
    for name, own in recipe.each().items():
        assert own.student is not None  # by TrainStudentRecipe.each
        device = rank_device(own.run.device, ranks)
        torch.manual_seed(own.run.seed)
        model = student_model(own, terms).to(device)
        about = f"{name or 'student'} of {count_parameters(model.vit):,} parameters"
        example: tuple[Tensor, ...] = (torch.zeros(2, 3, own.student.img_size, own.student.img_size, device=device),)
        if own.mask is not None:
            visible = own.mask.num_visible(*backbone.grid(model.vit))
            example = (*example, torch.arange(visible, device=device).expand(2, -1))
        learner = Learner(name, about, own, "student", model, example, ranks, order, content)
        students.append(Student(own.jitter, model, learner))
    return students


def student_model(recipe: TrainStudentRecipe, terms: Sequence[Term]) -> StudentModel:
    """The student of a recipe of one student, with a head for each term, on the CPU.

    Raises:
        CacheMismatch, RecipeError: as `make_students`.
    """
    assert recipe.student is not None  # by TrainStudentRecipe.each
    vit = build_student(recipe.student, recipe.drop_path)
    if recipe.recompute:
        backbone.recompute(vit)
    shapes = _seen_shapes(vit, recipe.student, recipe.mask)
    if recipe.mim is not None:
        check_decoder(recipe.mim, recipe.mask, vit)
    heads, fits, reads = zip(*(_head(vit, shapes, term) for term in terms), strict=True)
    paints = recipe.mask is not None and recipe.mask.hide == "token"
    return StudentModel(vit, *heads, fits=fits, reads=reads, paints=paints, mim=recipe.mim)


class StudentStep:
    """Trains students on one stream of batches; targets and jittered images are computed once per device.

    Args:
        recipe: the training recipe: accumulation, precision, seed.
        students: the students, from `make_students`.
        terms: the terms of the loss.
        targets: by device, the function that computes targets there.
        places: int64 [B], the places of this rank's samples in a step's whole batch.
        batch_size: number of samples in the whole batch.
        labelled: whether students of class logits are also compared with the labels of the images.
    """

    def __init__(
        self,
        recipe: TrainStudentRecipe,
        students: Sequence[Student],
        terms: Sequence[Term],
        targets: Mapping[torch.device, MakeTargets],
        places: Tensor,
        batch_size: int,
        labelled: bool = False,
    ) -> None:
        self.recipe, self.students, self.terms = recipe, students, terms
        self.places, self.batch_size, self.labelled = places, batch_size, labelled
        self.streams = {
            device: DeviceStream(device, make, recipe.run.seed, places, batch_size) for device, make in targets.items()
        }

    def __call__(self, step: int, batch: ViewBatch) -> None:
        """Do step `step`, counted from 0."""
        self.take(step, batch)
        if not batch.keys:
            raise SourceError(f"no image of step {step} can be read", got=batch.unreadable[0])
        for part in parts_of(len(self.places), self.recipe.optim.accumulate, present=len(batch.keys)):
            self.add(step, part)
        self.update(step)

    def take(self, step: int, batch: ViewBatch) -> None:
        """Copy the batch, and the masks of its views, to every device.

        Raises SourceError where a loss needs a label that an image does not have.
        """
        for term in self.terms:
            if isinstance(term.kind, TargetKind) and term.kind.label_classes:
                _require_labels(batch, term.kind.label_classes)
        self._batch = batch
        for stream in self.streams.values():
            stream.take(step, batch)
        wanted = {(each.grid, each.learner.device) for each in self.students} if self.recipe.mask is not None else set()
        self._kept = {place: visible_patches(self.recipe.mask, batch.named, *place) for place in wanted}

    def add(self, step: int, part: Part) -> None:
        """Add the gradients of a part of the batch."""
        # First the targets on all devices, then the students: nothing here waits, so all devices compute at once.
        for stream in self.streams.values():
            stream.cut(part.rows)
        for student in self.students:
            jitter, model, learner = student
            stream = self.streams[learner.device]
            kept = self._kept[student.grid, learner.device] if self._kept else None
            visible = () if kept is None else (kept[part.rows],)
            # The same draws for every student, so that a student among several trains as it would alone.
            model.draw(seeded(CPU, self.recipe.run.seed, step), self.places[part.rows], self.batch_size)
            with current(learner.device), learner.part_of_step(part.first, part.last):
                with autocast(learner.device, self.recipe.precision):
                    answers = learner.model(stream.images(jitter), *visible)
                    means: dict[str, Tensor] = {}
                    weighted: list[Tensor] = []
                    for term, own, target in zip(self.terms, model.by_head(answers), stream.targets, strict=True):
                        losses = term.kind.losses(own, target)
                        if isinstance(term.kind, TargetKind):
                            losses |= term.kind.label_losses(own, stream.labels)
                        found = {term.metric(name): loss.mean() for name, loss in losses.items()}
                        weight = term.weight(step, learner.schedule.total_steps)
                        means |= found
                        if self.labelled:
                            means |= label_top1(term, own, self._batch, part.rows)
                        weighted += found.values() if weight == 1.0 else [weight * mean for mean in found.values()]
                    if self.recipe.mim is not None:
                        means[MIM_METRIC] = answers[-1]
                        weighted.append(self.recipe.mim.weight * answers[-1])
                    loss = torch.stack(weighted).sum()
                learner.backward({"loss": loss} | means, part.share)

    def update(self, step: int) -> None:
        """Update the weights of all students."""
        for *_, learner in self.students:
            with current(learner.device):
                learner.update(step)


def _require_labels(batch: ViewBatch, classes: int) -> None:
    """Raises SourceError unless all images of a batch, and those mixed into them, have labels below `classes`."""
    partners = batch.keys if batch.partners is None else batch.partners.keys
    for keys, labels in ((batch.keys, batch.labels), (partners, batch.partner_labels()[0])):
        for place in ((labels < 0) | (labels >= classes)).nonzero()[:1, 0].tolist():
            label = int(labels[place])
            raise SourceError(
                f"image '{keys[place]}' has no label of the teacher's classes, as targets.label_weight needs",
                got="no label" if label == UNLABELLED else f"class {label}",
                expected=f"a class from 0 to {classes - 1}",
                hint="pack the images with labels (docs/shards.md), or set targets.label_weight: 0",
            )


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


def view_size(recipe: TrainStudentRecipe, reader: CacheReader) -> int:
    """The input size of all students: one of the cache's sizes, whose digests prove what they see.

    Raises:
        CacheMismatch: a student's input size is not a size of the cached views, or that of the other students.
    """
    cached = [layout.size_of(name, reader.manifest) for name in reader.view_layers]
    students = [each.student for each in recipe.each().values() if each.student is not None]
    for student in students:
        refuse_other_size(student, cached)
    own = list(dict.fromkeys(student.img_size for student in students))
    if len(own) > 1:
        raise CacheMismatch(
            "students of one stream differ in img_size",
            got=", ".join(map(str, own)),
            expected="one size",
            hint="train the students of each size in a run of their own",
        )
    return own[0]


def refuse_other_size(student: ModelConfig, cached: Sequence[int]) -> None:
    """Raises CacheMismatch where a student's input size is none of the sizes of the cached views."""
    if student.img_size not in cached:
        raise CacheMismatch(
            "student.img_size is not the size of the cached views",
            got=student.img_size,
            expected=cached[0] if len(cached) == 1 else f"one of {', '.join(map(str, cached))}",
            hint="students train at the size of a teacher's views",
        )


def with_mask(recipe: TrainStudentRecipe, terms: Sequence[Term]) -> TrainStudentRecipe:
    """The recipe with the mask of its layers, which teacher and student share, where it gives none.

    Raises:
        CacheMismatch: the layers have other masks than the recipe, or than one another.
    """
    mask = recipe.mask
    for term in terms:
        if term.mask is None:
            continue
        mask = mask or StudentMaskConfig(**term.mask.model_dump())
        given, stored = mask.model_dump(exclude={"hide"}), term.mask.model_dump()
        if given != stored or mask.hide != "drop":
            field = next((name for name in stored if given[name] != stored[name]), "hide")
            with naming(term.layer):
                raise CacheMismatch(
                    f"mask.{field} is not that of the layer, whose teacher saw visible patches alone",
                    got=getattr(mask, field),
                    expected=stored.get(field, "drop"),
                    hint="leave `mask` out: students then get the layer's own",
                )
    return recipe.model_copy(update={"mask": mask})


def check_decoder(mim: MimConfig, mask: StudentMaskConfig | None, vit: nn.Module) -> None:
    """Raises RecipeError where a student has no hidden patches to predict, or lacks the decoder's block."""
    if mask is None:
        raise RecipeError(
            "mim predicts hidden patches, and no patch is hidden",
            got="no mask",
            expected="a mask, or a layer with one",
            hint="set mask: {ratio: 0.75}",
        )
    depth = len(backbone.blocks(vit))
    if mim.block is not None and mim.block > depth:
        raise RecipeError("mim.block is outside the student", got=mim.block, expected=f"1..{depth}")


def _seen_shapes(vit: nn.Module, config: ModelConfig, mask: StudentMaskConfig | None) -> Shapes:
    """The shapes of a student's tokens for a view with a mask. Raises RecipeError where it cannot have one."""
    shapes = shapes_of(vit, config.img_size)
    if mask is None:
        return shapes
    hiding.check_masked(vit)
    visible = mask.num_visible(*shapes.grid)
    return shapes if mask.hide == "token" else replace(shapes, tokens=shapes.prefix_tokens + visible)


def check_students(recipe: TrainStudentRecipe, terms: Sequence[Term]) -> None:
    """Compare tokens and widths of a recipe's students with those of teachers; allocates no weights.

    Raises:
        CacheMismatch: a student's tokens are not a teacher's.
        RecipeError: a student cannot be built, or a kind of target cannot compare a student of its width.
        Both name student and layer where there are several.
    """
    for name, own in recipe.each().items():
        assert own.student is not None  # by TrainStudentRecipe.each
        with naming(name, "student"), torch.device("meta"):
            vit = build_student(own.student)
            for term in terms:
                with naming(term.layer):
                    seen = _seen_shapes(vit, own.student, own.mask)
                    if term.shapes.masked:  # also for kinds that need no grid: a mask of another grid hides others
                        check_visible(seen, term.shapes)
                    _head(vit, seen, term)


def _head(vit: nn.Module, seen: Shapes, term: Term) -> tuple[nn.Module, Fit, Tap | None]:
    """A new head for a student of the shapes `seen`, how its tokens fit the teacher's, and the tap that it reads."""
    fit = fit_of(seen, term.shapes, term.kind.taps)
    head = term.kind.head(fitted_shapes(seen, fit), term.shapes)
    if term.student_block is None:
        return head, fit, None
    assert isinstance(head, TargetHead)
    tap = head.at_block(term.student_block)
    check_inner(vit, tap, fit)
    return head, fit, tap
