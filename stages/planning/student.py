"""Short measurements for `tinymim plan`, stage two: a student's step, and its input from a cache."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from tinymim.configs.errors import RecipeError
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.sections.loader import LoaderConfig
from tinymim.pipeline.dataset import ViewBatch
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.replay import CachedSource, ReplayedViews
from tinymim.stages.cache.opened import arrays_of, kinds_of, opened_layers
from tinymim.stages.planning import clocks
from tinymim.stages.planning.clocks import Laps, loader_threads
from tinymim.stages.planning.forecast import StudentCosts
from tinymim.stages.run.device import pick_device
from tinymim.stages.training.device_stream import cached_targets
from tinymim.stages.training.optim import Part
from tinymim.stages.training.ranks import Ranks
from tinymim.stages.training.student_step import Student, StudentStep, make_students, with_mask
from tinymim.storage.reader import CacheReader

INPUT_BATCH: Final = 32
STEPS: Final = 4  # that the budget is for; three at least are done, of which the first is a warm-up


def measured_student(
    name: str,
    recipe: TrainStudentRecipe,
    num_images: int,
    num_views: int,
    reader: CacheReader,
    source: CachedSource,
    seconds: float,
) -> StudentCosts:
    """The costs of one training run.

    Args:
        name: the recipe's.
        recipe: the training recipe; its cache is not opened.
        num_images: size of its source.
        num_views: views per image of its cache.
        reader: a cache of a few images like the one that the recipe will read.
        source: that cache joined with its images.
        seconds: approximate time to spend.

    Raises:
        RecipeError, CacheMismatch: a student does not fit the cache, or needs more views.
        UserError: the source holds less than one batch.
    """
    # ---- students
    manifest = reader.manifest
    only = source.layers[0] if len(source.layers) == 1 else None  # the recipe may call it otherwise
    opened = opened_layers(reader, recipe, pick_device(recipe.run.device), only)
    recipe = with_mask(recipe, [each.term for each in opened])
    if recipe.num_views is not None and recipe.num_views > num_views:
        raise RecipeError("num_views is more than the cache is for", got=recipe.num_views, expected=num_views)
    whole = SampleOrder([num_images], recipe.order, recipe.optim.batch_size, recipe.num_views or num_views)
    students = make_students(recipe, [each.term for each in opened], Ranks(), whole, [])

    # ---- their input, with units already read
    together = min(recipe.order.views_per_decode, source.num_views)
    here = recipe.order.model_copy(update={"lanes": 1, "views_per_decode": together, "views_per_epoch": together})
    order = SampleOrder(source.counts, here, min(INPUT_BATCH, sum(source.counts)), source.num_views)
    verify = recipe.verify.model_copy(update={"first": 0})  # the share of digests in the long run
    replayed = ReplayedViews(reader, manifest, source, arrays_of(opened), verify, per_lane=order.slices_per_lane)
    began, laps, loader = clocks.now_s(), Laps(), LoaderConfig(workers=0)
    with loader_threads(recipe.loader.workers):
        for number, entry in enumerate(order.plan(10**9)):
            list(batches(replayed.pixels, [entry], loader, rank_part=replayed))  # reads, which is not to be in the lap
            with laps.lap("replay", entry.shape[0] * entry.shape[1]):
                loaded = list(batches(replayed.pixels, [entry], loader, rank_part=replayed))
            if number and clocks.now_s() - began > 0.4 * seconds:
                break

    step = _step(recipe, reader, only, students, loaded[0], 0.6 * seconds)
    return StudentCosts(
        name=name,
        num_images=num_images,
        steps=students[0].learner.schedule.total_steps,
        batch_size=recipe.optim.batch_size,
        ranks=recipe.workers,
        workers=recipe.loader.workers,
        views_per_decode=recipe.order.views_per_decode,
        step_s=sum(step.medians_s().values()),
        cores=step.cores("part"),
        replay_s=laps.medians_s()["replay"],
    )


def _step(
    recipe: TrainStudentRecipe,
    reader: CacheReader,
    layer: str | None,
    students: Sequence[Student],
    batch: ViewBatch,
    seconds: float,
) -> Laps:
    """Steps of all students: laps "part", per view of the batch, and "update", its share of the update."""
    opened = {learner.device: opened_layers(reader, recipe, learner.device, layer) for *_, learner in students}
    targets = {device: cached_targets(kinds_of(each)) for device, each in opened.items()}
    terms = [each.term for each in next(iter(opened.values()))]
    share = recipe.optim.batch_size // recipe.workers
    most = share // recipe.optim.accumulate
    began, laps, count, rounds = clocks.now_s(), Laps(targets), min(2, most), 0
    while rounds < 3 or clocks.now_s() - began < seconds * (1 - 1 / STEPS):
        some = batch.pick(np.arange(count) % len(batch.keys))
        some = some.pin_memory() if any(device.type == "cuda" for device in targets) else some
        step = StudentStep(recipe, students, terms, targets, torch.arange(count), count)
        with laps.lap("part", count):
            step.take(0, some)
            step.add(0, Part(slice(0, count), 1.0, True, True))
        with laps.lap("update", share):
            step.update(0)
        # As many views as the recipe's step has at a time, or as the budget allows.
        count = max(min(most, int(seconds / STEPS / laps.latest_s("part"))), min(2, most))
        rounds += 1
    return laps
