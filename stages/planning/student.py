"""Short measurements for `tinymim plan`, stage two: a student's step, and its input from a cache and without one."""

import statistics

import numpy as np
import torch
from torch import Tensor

from tinymim.configs.errors import UserError
from tinymim.configs.schema import TrainStudentRecipe
from tinymim.configs.sections import JitterConfig, LoaderConfig, VerifyConfig, ViewConfig
from tinymim.models.taps import StudentWithTap
from tinymim.models.vit import Normalise, build_vit
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.jitter import jitter
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.replay import ReplayedViews, join
from tinymim.pipeline.shards import ShardSet
from tinymim.pipeline.views import RandomViews
from tinymim.stages.cache.opened import stored_constants
from tinymim.stages.planning import clocks
from tinymim.stages.planning.clocks import fitting, loader_start_s, loader_threads, timed
from tinymim.stages.planning.forecast import Cost, StudentCosts
from tinymim.stages.planning.teacher import Sampled, as_loaded
from tinymim.stages.run.device import autocast, pick_device
from tinymim.stages.training.learner import Learner
from tinymim.stages.training.optim import seeded
from tinymim.stages.training.ranks import Ranks
from tinymim.stages.training.student_step import check_student_fits
from tinymim.targets.kinds import stored_codec
from tinymim.targets.record import Codec
from tinymim.targets.relations.losses import relation_loss
from tinymim.targets.relations.qkv import QKV

CPU = torch.device("cpu")
INPUT_BATCH = 32


def measured_student(
    name: str, recipe: TrainStudentRecipe, num_images: int, sampled: Sampled, seconds: float
) -> StudentCosts:
    """What one training costs.

    Args:
        name: of the recipe.
        recipe: of the training; its cache is not opened.
        num_images: of its source.
        sampled: real views and records of the cache that it will read.
        seconds: that this may take, about.

    Raises:
        RecipeError, CacheMismatch: a student does not fit the cache.
    """
    device = pick_device(recipe.run.device)
    manifest = sampled.reader.manifest
    source = join(ShardSet((sampled.shard,)), sampled.reader, sampled.num_views, "skip")
    order = _order(recipe, source.counts, sampled.num_views)
    codec = stored_codec(manifest.codec, recipe.targets, stored_constants(sampled.reader.store, manifest, device))
    arrays = [spec.name for spec in codec.arrays(int(manifest.teacher["heads"]), int(manifest.teacher["tokens"]))]
    steps = _steps(recipe, num_images, manifest.num_views)
    # Digests are compared of the first views and then of one in so many: on average of one in `every`.
    verify, views = recipe.verify, steps * recipe.optim.batch_size
    share = min(verify.first / views, 1.0) + (1 / verify.every if verify.every else 0.0)
    every = round(1 / min(share, 1.0)) if share else 0
    check = VerifyConfig(first=0, every=every)
    replayed = ReplayedViews(sampled.reader, source, arrays, check, order.resident_units(source.units_per_shard))
    law = ViewConfig.model_validate({"scaled_decode": False, **manifest.views})
    drawn = ImageViews(source.shards, RandomViews(law), law.seed)
    with loader_threads(recipe.loader.workers):
        replay_s, draw_s, batch = _input(replayed, drawn, order, 0.3 * seconds)
    step = _step(recipe, codec, sampled, batch, order, device, 0.6 * seconds)
    return StudentCosts(
        name=name,
        num_images=num_images,
        steps=steps,
        batch_size=recipe.optim.batch_size,
        ranks=recipe.workers,
        workers=recipe.loader.workers,
        views_per_decode=order.order.views_per_decode,
        unit_views=sampled.unit_views,
        step=step,
        replay_s=replay_s,
        draw_s=draw_s,
        read_s=sampled.read_s,
        record_bytes=sampled.record_bytes,
        start_s=loader_start_s(drawn, batch.items, recipe.loader),
    )


def _order(recipe: TrainStudentRecipe, counts: list[int], num_views: int) -> SampleOrder:
    """The recipe's order of samples over the images at hand, in one lane."""
    together = min(recipe.order.views_per_decode, num_views)
    update = {"lanes": 1, "views_per_decode": together, "views_per_epoch": together}
    return SampleOrder(counts, recipe.order.model_copy(update=update), min(INPUT_BATCH, sum(counts)), num_views)


def _steps(recipe: TrainStudentRecipe, num_images: int, num_views: int) -> int:
    """Steps of the whole run on the whole source."""
    if recipe.optim.steps is not None:
        return recipe.optim.steps
    assert recipe.optim.epochs is not None  # the schema wants one of both
    in_use = recipe.num_views or num_views
    views = in_use if recipe.order.views_per_epoch == "all" else recipe.order.views_per_epoch
    steps = num_images // recipe.optim.batch_size * views * recipe.optim.epochs
    if steps == 0:
        raise UserError("the source holds less than one batch", got=0, hint="lower optim.batch_size")
    return steps


def _input(
    replayed: ReplayedViews, drawn: ImageViews, order: SampleOrder, budget_s: float
) -> tuple[float, float, ViewBatch]:
    """Seconds per view with records that are in memory, the same views without a cache, and one batch of them."""
    together = order.order.views_per_decode
    here = LoaderConfig(workers=0)
    replay: list[float] = []
    draw: list[float] = []
    began = clocks.now_s()
    batch: ViewBatch | None = None
    for entry in order.plan(10**9):
        list(batches(replayed, [entry], here, batches_per_entry=together))  # reads the unit, if its views are others
        wall = clocks.now_s()
        found = list(batches(replayed, [entry], here, batches_per_entry=together))
        middle = clocks.now_s()
        items = np.stack([each.items for each in found])
        list(batches(drawn, [items], here, batches_per_entry=together))
        replay.append((middle - wall) / items.shape[0] / items.shape[1])
        draw.append((clocks.now_s() - middle) / items.shape[0] / items.shape[1])
        batch = batch or found[0]
        if clocks.now_s() - began > budget_s and len(replay) > 1:
            break
    assert batch is not None  # a plan has at least one step
    return statistics.median(replay), statistics.median(draw), batch


def _step(
    recipe: TrainStudentRecipe,
    codec: Codec,
    sampled: Sampled,
    batch: ViewBatch,
    order: SampleOrder,
    device: torch.device,
    budget_s: float,
) -> Cost:
    """Everything between two batches, per view, of all students of the recipe: as `train_student.train` does it."""
    teacher, manifest = sampled.reader.manifest.teacher, sampled.reader.manifest
    heads, tokens = codec.relation_heads(int(teacher["heads"])), int(teacher["tokens"])
    learners: list[tuple[JitterConfig, StudentWithTap, Learner]] = []
    for name, own in recipe.each().items():
        assert own.student is not None  # by TrainStudentRecipe.each
        check_student_fits(own.student, teacher, manifest.views, heads)
        student = StudentWithTap(build_vit(own.student, drop_path=own.drop_path)).to(device)
        example = (torch.zeros(2, 3, own.student.img_size, own.student.img_size, device=device),)
        learners.append(
            (own.jitter, student, Learner(name, name, own, "student", student, example, Ranks(), order, []))
        )
    normalise = Normalise().to(device)
    loaded = as_loaded(batch, device)

    def part(count: int) -> int:
        views, places = loaded(count), torch.arange(count)
        pixels = views.pixels.to(device, non_blocking=True)
        records = {name: array.to(device, non_blocking=True) for name, array in views.records.items()}
        target = codec.decode(records, views.view_keys.to(device, non_blocking=True), tokens)
        images: dict[JitterConfig, Tensor] = {}
        for strengths, student, learner in learners:
            if strengths not in images:
                images[strengths] = normalise(jitter(pixels, strengths, seeded(CPU, 0), places, count))
            student.draw(seeded(CPU, 0), places, count)
            with learner.part_of_step(True, True):
                with autocast(device, recipe.precision):
                    losses = relation_loss(QKV(*learner.model(images[strengths])).resplit(heads), target)
                    loss = torch.stack(list(losses.values())).sum()
                learner.backward({"loss": loss}, 1.0)
        return count

    def update() -> int:
        for *_, learner in learners:
            for parameter in learner.module.parameters():
                if parameter.grad is None and parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            learner.update(0)
        return 1

    share = recipe.optim.batch_size // recipe.workers
    probe = timed(lambda: part(min(2, share)), 0.1 * budget_s, device)
    count = fitting(probe.seconds, share // recipe.optim.accumulate, budget_s, least=2)
    once = timed(update, 0.1 * budget_s, device)
    return timed(lambda: part(count), 0.8 * budget_s, device) + once.times(1 / share)
