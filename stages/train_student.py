"""`tinymim train-student`: train students on cached targets and the same views; the teacher is not needed."""

import contextlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinymim.configs.load import dump_recipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.models.checkpoints import to_safetensors
from tinymim.models.native_parts import missing_parts
from tinymim.models.student import StudentModel
from tinymim.models.timm_folder import Pixels, timm_config
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.pipeline.dataset import ViewBatch
from tinymim.pipeline.decode import environment
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.tar import UNLABELLED
from tinymim.stages.audits.student_audits import StudentAudits
from tinymim.stages.cache.inputs import CachedInput
from tinymim.stages.cache.teacher_input import TeacherInput
from tinymim.stages.run.folder import (
    PROJECTOR_NAME,
    STUDENT_EMA_NAME,
    STUDENT_NAME,
    TRAINED_NAME,
    write_provenance,
    write_weights,
)
from tinymim.stages.run.progress import logger
from tinymim.stages.training.bookkeeping import Bookkeeping
from tinymim.stages.training.launch import on_ranks
from tinymim.stages.training.learner import Learner
from tinymim.stages.training.ranks import Ranks, set_up
from tinymim.stages.training.student_step import (
    StudentStep,
    make_students,
    views_in_use,
    with_mask,
)
from tinymim.stages.training.terms import Term, weight_metrics
from tinymim.stages.training.validation import merged
from tinymim.storage.atomic import write_bytes_atomic, write_json_atomic
from tinymim.storage.manifest import Layer
from tinymim.targets.contract import TargetHead


def run(recipe: TrainStudentRecipe) -> None:
    """Train and write `<run.folder>/student.safetensors`, which loads into the timm model with `strict=True`.

    Each of several students has a folder of its own, `<run.folder>/<name>`.

    Args:
        recipe: the recipe to run, in `workers` processes or as the rank that the environment names.

    Raises:
        CacheMismatch: the source or a student does not fit the cache.
        ViewMismatch: replayed pixels differ from those the teacher saw.
        CacheCorrupt: bytes of the cache changed.
        UserError: the recipe is wrong, or a loss is not finite.
        InternalError: workers died more often than `max_restarts` allows.
        Interrupted: stopped by a signal after saving its state.
    """
    on_ranks(train, recipe)


def train(recipe: TrainStudentRecipe, ranks: Ranks) -> None:
    """`run` on one of the ranks."""
    # ---- cache joined with its images, or a teacher in the loop
    device, num_views = set_up(recipe, ranks), views_in_use(recipe, ranks)
    opened = TeacherInput if recipe.on_missing == "teacher" else CachedInput
    with opened(recipe, num_views, device) as data:
        # So that the run folder's recipe states what a resumed run continues with, although the cache may have grown.
        recipe = recipe.model_copy(update={"num_views": data.num_views})
        _train(with_mask(recipe, [each.term for each in data.opened]), ranks, data)


def _train(recipe: TrainStudentRecipe, ranks: Ranks, data: CachedInput | TeacherInput) -> None:
    # ---- order, students, optimisers
    manifest, counts, terms = data.manifest, data.source.counts, [each.term for each in data.opened]
    batch_size = recipe.optim.batch_size
    order = SampleOrder(
        counts,
        recipe.order,
        batch_size,
        data.num_views,
        ranks.rank,
        ranks.world_size,
        data.partners,
        recipe.fresh,
    )
    students = make_students(recipe, terms, ranks, order, data.content)
    learners = [student.learner for student in students]
    for _, model, learner in students if ranks.first else ():
        for layer, kind, _ in data.opened:
            if warning := missing_parts(model.vit, layer.teacher, kind.taps):
                logger.info(f"train-student: warning: {f'{learner.name}: ' if learner.name else ''}{warning}")
    views = data.views(order)
    targets = {each: data.targets(each) for each in {learner.device: None for learner in learners}}
    labelled = bool(data.source.shards[0].members().labels[0] != UNLABELLED)  # a set has labels or has none
    do_step = StudentStep(recipe, students, terms, targets, torch.from_numpy(order.places), batch_size, labelled)
    audits = StudentAudits(recipe, manifest, data.opened, students, ranks, data.size)

    # ---- resume
    names = [shard.name for shard in data.source.shards]
    tally = _Tally(ranks, data)
    books = Bookkeeping(recipe, learners, ranks, order, names, "views_per_s", partial(tally.metrics, terms))
    books.resume()
    views_per_image = "new views" if data.num_views is None else f"{data.num_views} views"
    books.describe(f"{sum(counts):,} images x {views_per_image}")
    for term in terms if len(terms) > 1 else ():
        logger.info(
            f"train-student: layer {term.layer}, weight {' to '.join(f'{w:g}' for w in dict.fromkeys(term.weights))}"
        )
    if recipe.students and ranks.first:
        write_provenance(recipe)

    # ---- train
    stream = batches(
        views.pixels,
        order.plan(books.total_steps),
        recipe.loader,
        pin_memory=any(each.type == "cuda" for each in targets),
        batches_per_entry=recipe.order.views_per_decode,
        rank_part=views,
    )
    with contextlib.closing(stream), books.running() as (stop, meter):  # closing ends the loader's processes
        audits.after(books.first_step, books, stop)
        for step, batch in enumerate(stream, start=books.first_step):
            do_step(step, batch)
            tally.add(batch)
            books.end_step(step + 1, stop, meter)
            audits.after(step + 1, books, stop)

    # ---- export
    if tally.counts:
        tally.log(books.first_step)
    if not ranks.first:
        return
    for own, (_, model, learner) in zip(recipe.each().values(), students, strict=True):
        assert own.student is not None  # by TrainStudentRecipe.each
        metadata = {
            "made_by": "tinymim train-student",
            "recipe": dump_recipe(learner.recipe),
            "cache_spec_id": manifest.spec_id,
            "layer_spec_id": ",".join(layer.spec_id for layer, *_ in data.opened),
            "teachers": json.dumps({layer.name: _teacher(layer) for layer, *_ in data.opened}),
            "libraries": json.dumps(environment()),
            "steps": str(books.total_steps),
        }
        pixels = Pixels(IMAGENET_MEAN, IMAGENET_STD, str(manifest.views["interpolation"]))
        config = timm_config(model.vit, own.student, pixels)
        _export(model, [term.layer for term in terms], learner, metadata | pixels.metadata(), config)


def _teacher(layer: Layer) -> dict[str, Any]:
    """What a student's card says about a teacher."""
    return {name: layer.teacher[name] for name in ("name", "license", "weights_sha256")}


class _Tally:
    """Counts the views of all ranks, and those of them that a teacher computed in the loop.

    Args:
        ranks: the ranks of the run.
        data: the input of the students.
    """

    def __init__(self, ranks: Ranks, data: CachedInput | TeacherInput) -> None:
        self._ranks, self.counts = ranks, isinstance(data, TeacherInput)
        self._here = torch.zeros(2, dtype=torch.int64)  # computed views and all views, of this rank and process
        self._lost: dict[tuple[int, int], str] = {}
        self._shards = data.source.shards
        self._logged, self._step, self._share = torch.zeros(2, dtype=torch.int64), -1, 0.0

    def add(self, batch: ViewBatch) -> None:
        """Count a batch."""
        if batch.lacking is not None:
            self._here += torch.tensor([batch.lacking.num_views, len(batch.keys)])
            self._lost |= batch.lacking.lost

    def total(self) -> tuple[int, int]:
        """Computed views and all views of this process and the other ranks'; all ranks must call it."""
        computed, views = self._ranks.total(self._here).tolist()
        return computed, views

    def log(self, first_step: int) -> None:
        """Print the totals of this process and the other ranks'; all ranks must call it."""
        own = []
        for (shard, sample), reason in self._lost.items():
            own.append((f"{self._shards[shard].members().keys[sample]} of {self._shards[shard].name}", reason))
        lost = merged(own, self._ranks)
        computed, views = self.total()
        logger.info(f"train-student: the teacher computed {computed:,} of {views:,} views since step {first_step:,}")
        if lost:
            key, reason = lost[0]
            logger.info(f"train-student: left out {len(lost):,} images, the first is {key} ({reason})")

    def metrics(self, terms: Sequence[Term], step: int, total_steps: int) -> dict[str, float]:
        """Weights, and the share of views computed since the last logged step; all ranks must call it."""
        found = weight_metrics(terms, step, total_steps)
        if not self.counts:
            return found
        if step != self._step:  # every student logs it
            now = torch.tensor(self.total())
            computed, views = (now - self._logged).tolist()
            self._step, self._logged, self._share = step, now, computed / max(views, 1)
        return found | {"computed_share": self._share}


def _export(
    model: StudentModel, layers: Sequence[str], learner: Learner, metadata: dict[str, str], config: dict[str, Any]
) -> None:
    """Write a student's weights, their average, the folders that timm loads, and the report of trained tensors."""
    folder, label = learner.folder, f"train-student: {learner.name}".removesuffix(": ")
    report = trained_report(model, learner.optimiser)
    metadata |= {name: json.dumps(value) for name, value in report.items()}
    kept = _write_student(folder / STUDENT_NAME, model, layers, metadata, config)
    if learner.ema is not None:
        ema = {"ema": str(learner.ema.decay)}
        _write_student(folder / STUDENT_EMA_NAME, learner.ema.module, layers, metadata | ema, config)
    write_json_atomic(folder / TRAINED_NAME, report)
    logger.info(
        f"{label}: wrote {folder / STUDENT_NAME}: {len(report['trained'])} tensors trained, "
        f"{len(report['fixed'])} fixed ({', '.join(report['fixed']) or 'none'}), "
        f"{len(report['never_updated'])} never updated; "
        f"{f'the projector is in {kept}' if kept else 'the head was dropped'}"
    )
    if report["never_updated"]:
        logger.info(f"{label}: warning: still at their initial values: {', '.join(report['never_updated'])}")


def _write_student(
    path: Path, student: StudentModel, layers: Sequence[str], metadata: dict[str, str], config: dict[str, Any]
) -> Path | None:
    """Write a student's weights to a file and its folder, and into the folder what heads keep; return that file.

    Of several layers, the tensors of a head have the name of its layer and a slash in front.
    """
    write_weights(path, to_safetensors(student.vit.state_dict(), metadata), config)
    projector = path.with_suffix("") / PROJECTOR_NAME
    kept: dict[str, Tensor] = {}
    for layer, head in zip(layers, student.heads, strict=True):
        assert isinstance(head, TargetHead)  # by `kind.head`
        kept |= {f"{layer}/{name}" if layer else name: tensor for name, tensor in head.kept().items()}
    if not kept:
        projector.unlink(missing_ok=True)
        return None
    write_bytes_atomic(projector, to_safetensors(kept, metadata))
    return projector


def trained_report(model: StudentModel, optimiser: torch.optim.Optimizer) -> dict[str, list[str]]:
    """Names of exported tensors by whether they were trained, from the optimiser's second moments.

    Returns:
        {"trained": names, "fixed": names without a gradient by design (the sine-cosine table), "never_updated": names
        that should have trained but got no gradient in the whole run}.
    """
    report: dict[str, list[str]] = {"trained": [], "fixed": [], "never_updated": []}
    for name, parameter in model.vit.named_parameters():
        moment: Tensor | None = optimiser.state.get(parameter, {}).get("exp_avg_sq")
        moved = moment is not None and bool((moment > 0).any())
        report["fixed" if not parameter.requires_grad else "trained" if moved else "never_updated"].append(name)
    return report
