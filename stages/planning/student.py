"""Short measurements for `tinymim plan`, stage two: a student's step, and its input from a cache or a teacher."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np
import torch

from tinymim.configs.errors import RecipeError
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.sections.loader import LoaderConfig
from tinymim.configs.sections.models import TeacherConfig
from tinymim.pipeline.dataset import Lacking, ViewBatch
from tinymim.pipeline.joined import join
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.replay import ReplayedViews
from tinymim.pipeline.shards import ShardSet
from tinymim.stages.cache.opened import Opened, arrays_of, kinds_of, opened_layers
from tinymim.stages.cache.teacher_input import VIEWS_AT_ONCE, TeacherInput
from tinymim.stages.planning import clocks
from tinymim.stages.planning.clocks import Laps, loader_threads
from tinymim.stages.planning.forecast import InLoop, StudentCosts
from tinymim.stages.run.device import pick_device
from tinymim.stages.training.device_stream import MakeTargets, cached_targets
from tinymim.stages.training.optim import Part
from tinymim.stages.training.ranks import Ranks
from tinymim.stages.training.student_step import Student, StudentStep, make_students, view_size, with_mask
from tinymim.stages.training.terms import Term
from tinymim.storage.reader import CacheReader

INPUT_BATCH: Final = 32
STEPS: Final = 4  # that the budget is for; three at least are done, of which the first is a warm-up
STAND_INS: Final = 64  # shards of one image, in whose order views are counted


class Planned(NamedTuple):
    """The cache that a training run is to read.

    Attributes:
        reader: a cache of a few images like it.
        images: these images.
        num_views: views per image that it will hold.
        covered: share of the run's images that it will hold.
    """

    reader: CacheReader
    images: ShardSet
    num_views: int
    covered: float


def measured_student(
    name: str, recipe: TrainStudentRecipe, num_images: int, cache: Planned, seconds: float
) -> StudentCosts:
    """The costs of one training run.

    Args:
        name: the recipe's.
        recipe: the training recipe, with the layer names of `cache`; its own cache is not opened.
        num_images: size of its source.
        cache: the cache to read.
        seconds: approximate time to spend.

    Raises:
        RecipeError, CacheMismatch: a student does not fit the cache, or needs more views.
        UserError: the source holds less than one batch, or the cache lacks a layer whose teacher is not stated.
        CheckpointError: a teacher in the loop has no weights.
    """
    # ---- what is learned; a teacher in the loop is that of the run itself
    looped, reader = recipe.on_missing == "teacher", cache.reader
    if not looped and recipe.num_views is not None and recipe.num_views > cache.num_views:
        raise RecipeError(
            "num_views is more than the cache is for",
            got=recipe.num_views,
            expected=cache.num_views,
            hint="plan a cache of more views, or set on_missing: teacher, which computes the others",
        )
    device = pick_device(recipe.run.device)
    own = recipe.model_copy(update={"cache": reader.place, "write_back": False})
    with TeacherInput(own, None, device) if looped else contextlib.nullcontext() as loop:
        opened = opened_layers(reader, own, device) if loop is None else loop.opened
        own, terms = with_mask(own, [each.term for each in opened]), [each.term for each in opened]
        order = SampleOrder([num_images], own.order, own.optim.batch_size, _views(own, cache), fresh=own.fresh)
        students = make_students(own, terms, Ranks(), order, [])
        devices = {learner.device: None for *_, learner in students}
        if loop is None:
            targets = {each: cached_targets(kinds_of(opened_layers(reader, own, each))) for each in devices}
        else:
            targets = {each: loop.targets(each) for each in devices}

        # ---- input and steps
        every = [each.layer.name for each in opened]
        missing = [layer for layer in every if layer not in reader.layers]
        batch, replay_s = _replayed(own, [each for each in opened if each.layer.name in reader.layers], cache, seconds)
        lacking = {"held": missing} | ({"computed": every} if looped else {})
        step = _steps(own, students, terms, targets, batch, lacking, 0.6 * seconds)
        step_s, steps = step.medians_s(), students[0].learner.schedule.total_steps
        in_loop = None
        if loop is not None:
            in_loop = InLoop(
                share=computed_share(recipe, num_images, steps, cache),
                step_s=step_s["computed"] + step_s["update"],
                cores=step.cores("computed"),
                layers=missing,
                weights_bytes=loop.weights_bytes(device),
                pass_views=VIEWS_AT_ONCE,
                pass_bytes=_pass_bytes(loop.targets(device), device, batch, every),
            )
    return StudentCosts(
        name=name,
        num_images=num_images,
        steps=steps,
        batch_size=recipe.optim.batch_size,
        ranks=recipe.workers,
        workers=recipe.loader.workers,
        views_per_decode=recipe.order.views_per_decode,
        step_s=step_s["held"] + step_s["update"],
        cores=step.cores("held"),
        replay_s=replay_s,
        in_loop=in_loop,
    )


def named_as(
    recipe: TrainStudentRecipe, reader: CacheReader, randomised: Callable[[TeacherConfig], TeacherConfig] | None
) -> TrainStudentRecipe:
    """The recipe with the layer names of a cache.

    Args:
        recipe: a training recipe.
        reader: the cache. If it has one layer, a recipe of one layer means this one whatever it calls it, unless it
            states the teacher of another.
        randomised: gives a teacher random weights; None: teachers have their own.
    """
    layers = recipe.layers or {}
    [name, config], *more = recipe.each_layer()
    if not more and len(reader.layers) == 1 and name not in reader.layers and config.teacher is None:
        [only] = reader.layers
        recipe = recipe.model_copy(update={"layer": None})
        layers = {only: config} if layers else {}
    if randomised is not None:
        changes = {
            name: {"teacher": None, "codec": None} if name in reader.layers else {"teacher": randomised(own.teacher)}
            for name, own in layers.items()
            if own.teacher is not None
        }
        layers = layers | {name: layers[name].model_copy(update=own) for name, own in changes.items()}
    return recipe.model_copy(update={"layers": layers or None})


def computed_share(recipe: TrainStudentRecipe, num_images: int, steps: int, cache: Planned) -> float:
    """The share of a run's views that its cache lacks, counted in the run's own order of views.

    With `write_back` a view is lacking when it comes first; the units that a run drops are not counted.
    """
    rounds = steps * recipe.optim.batch_size / num_images  # of one view of every image
    alone = recipe.order.model_copy(update={"lanes": 1, "views_per_epoch": recipe.order.views_per_decode})
    order = SampleOrder([1] * STAND_INS, alone, STAND_INS, _views(recipe, cache), fresh=recipe.fresh)
    views = np.concatenate([items[:, [0, 2]] for _, items in order.steps(math.ceil(rounds))])
    weights = np.minimum(rounds - np.arange(len(views)) // STAND_INS, 1.0)  # the last round may be a part of one
    lacking = weights.copy()
    if recipe.write_back:
        first = np.unique(views, axis=0, return_index=True)[1]
        lacking[np.setdiff1d(np.arange(len(views)), first)] = 0.0
    beyond = lacking[views[:, 1] >= cache.num_views].sum()
    return float((cache.covered * beyond + (1.0 - cache.covered) * lacking.sum()) / weights.sum())


def _views(recipe: TrainStudentRecipe, cache: Planned) -> int | None:
    """Views per image in the order of a run; None: no view comes twice."""
    return recipe.num_views or (None if recipe.on_missing == "teacher" else cache.num_views)


def _replayed(
    recipe: TrainStudentRecipe, held: Sequence[Opened], cache: Planned, seconds: float
) -> tuple[ViewBatch, float]:
    """Views with the records that the cache holds, and seconds per view on one core, without reading the records."""
    names = [each.layer.name for each in held]
    source = join(cache.images, cache.reader, names, on_missing="skip", size=view_size(recipe, cache.reader))
    together = min(recipe.order.views_per_decode, source.num_views)
    here = recipe.order.model_copy(update={"lanes": 1, "views_per_decode": together, "views_per_epoch": together})
    order = SampleOrder(source.counts, here, min(INPUT_BATCH, sum(source.counts)), source.num_views)
    verify = recipe.verify.model_copy(update={"first": 0})  # the share of digests in the long run
    manifest, per_lane = cache.reader.manifest, order.slices_per_lane
    views = ReplayedViews(cache.reader, manifest, source, arrays_of(held), verify, per_lane=per_lane)
    began, laps, loader = clocks.now_s(), Laps(), LoaderConfig(workers=0)
    with loader_threads(recipe.loader.workers):
        for number, entry in enumerate(order.plan(10**9)):
            list(batches(views.pixels, [entry], loader, rank_part=views))  # reads, which is not to be in the lap
            with laps.lap("replay", entry.shape[0] * entry.shape[1]):
                loaded = list(batches(views.pixels, [entry], loader, rank_part=views))
            if number and clocks.now_s() - began > 0.4 * seconds:
                break
    return loaded[0], laps.medians_s()["replay"]


def _steps(
    recipe: TrainStudentRecipe,
    students: Sequence[Student],
    terms: Sequence[Term],
    targets: Mapping[torch.device, MakeTargets],
    batch: ViewBatch,
    lacking: Mapping[str, Sequence[str]],
    seconds: float,
) -> Laps:
    """Steps of all students: laps "update", per view its share of the update, and by name of `lacking`, per view, the
    rest of a step whose records of these layers are computed.
    """
    share = recipe.optim.batch_size // recipe.workers
    most = share // recipe.optim.accumulate
    began, laps, count, rounds = clocks.now_s(), Laps(targets), min(2, most), 0
    while rounds < 3 or clocks.now_s() - began < seconds * (1 - 1 / STEPS):
        some = batch.pick(np.arange(count) % len(batch.keys))
        some = some.pin_memory() if any(device.type == "cuda" for device in targets) else some
        step = StudentStep(recipe, students, terms, targets, torch.arange(count), count)
        for name, layers in lacking.items():
            with laps.lap(name, count):
                step.take(0, replace(some, lacking=_lacking(some, layers)))
                step.add(0, Part(slice(0, count), 1.0, True, True))
        with laps.lap("update", share):
            step.update(0)
        # As many views as the recipe's step has at a time, or as the budget allows.
        count = max(min(most, int(seconds / STEPS / sum(map(laps.latest_s, lacking)))), min(2, most))
        rounds += 1
    return laps


def _lacking(batch: ViewBatch, layers: Sequence[str]) -> Lacking:
    """States that all records of some layers are missing."""
    missing = {layer: np.ones(len(batch.keys), np.bool_) for layer in layers}
    return Lacking(batch.items, batch.named, missing, np.zeros(len(batch.keys), np.uint32))


def _pass_bytes(make: MakeTargets, device: torch.device, batch: ViewBatch, layers: Sequence[str]) -> int | None:
    """The most memory of computing some layers of as many views as a teacher gets at once; None on a CPU."""
    if device.type != "cuda":
        return None
    some = batch.pick(np.arange(VIEWS_AT_ONCE) % len(batch.keys))
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    make(some.pixels.to(device), {}, some.view_keys.to(device), _lacking(some, layers))
    return torch.cuda.max_memory_allocated(device) - before
