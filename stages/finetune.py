"""`tinymim finetune`: train an encoder and a new head on labelled images, with timm's laws of augmentation."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from tinymim.configs.errors import SourceError
from tinymim.configs.load import dump_recipe, recipe_digest
from tinymim.configs.schema.finetune import FinetuneRecipe
from tinymim.models import backbone
from tinymim.models.checkpoints import LoadedWeights, tensors_sha256, to_safetensors
from tinymim.models.classifier import build_classifier, load_classifier
from tinymim.models.drop_path import replace_drop_path, set_drop_masks
from tinymim.models.files import RANDOM
from tinymim.models.timm_folder import Pixels, crop_of, timm_arguments, timm_config
from tinymim.models.vit import Normalise, count_parameters
from tinymim.models.weights import stated
from tinymim.pipeline.augment import AugmentedViews, Mixing, policies_of
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.decode import environment
from tinymim.pipeline.loader import batches
from tinymim.pipeline.operations.registry import canaries
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.policies import POLICIES_VERSION, Constants
from tinymim.pipeline.shards import ShardSet, labels_of, open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages.evaluation.classes import count_classes
from tinymim.stages.run.device import autocast, require_view_size
from tinymim.stages.run.folder import BEST_NAME, FINETUNED_NAME, LAST_EMA_NAME, LAST_NAME, write_weights
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.progress import Meter, logger
from tinymim.stages.training.bookkeeping import Bookkeeping
from tinymim.stages.training.class_teacher import ClassTeacher
from tinymim.stages.training.launch import on_ranks
from tinymim.stages.training.learner import Learner
from tinymim.stages.training.optim import parts_of, seeded
from tinymim.stages.training.ranks import Ranks, environment_ranks, set_up
from tinymim.stages.training.validation import Counts, History, Validation, by_class, merged
from tinymim.storage.atomic import write_json_atomic

CPU = torch.device("cpu")


def run(recipe: FinetuneRecipe) -> dict[str, Any] | None:
    """Train and write `<run.folder>/{last,best}.safetensors` and `finetuned.json`.

    Args:
        recipe: the recipe to run, in `workers` processes or as the rank that the environment names.

    Returns:
        the content of `finetuned.json`; None on ranks other than the first.

    Raises:
        UserError: sources are unlabelled or do not fit each other, weights do not exist or do not fit, or a loss is
            not finite.
        InternalError: workers died more often than `max_restarts` allows.
        Interrupted: stopped by a signal after saving its state.
    """
    on_ranks(train, recipe)
    if not environment_ranks().first:
        return None
    report: dict[str, Any] = json.loads((recipe.run.folder / FINETUNED_NAME).read_text())
    return report


def train(recipe: FinetuneRecipe, ranks: Ranks) -> None:
    """`run` on one of the ranks."""
    # ---- sources
    canaries()
    device = set_up(recipe, ranks)
    require_view_size(recipe.views.size, recipe.model, "model")
    batch_size = recipe.optim.batch_size
    source, held_out = open_shards(recipe.train), open_shards(recipe.val)
    num_classes = size_of_head(source, held_out)
    order = SampleOrder(source.counts, recipe.order, batch_size, None, ranks.rank, ranks.world_size)

    # ---- model, optimiser
    torch.manual_seed(recipe.run.seed)
    model = build_classifier(recipe.model, num_classes, recipe.pool, recipe.drop_path)
    start = load_classifier(model, recipe.model, recipe.weights, recipe.class_map)
    mean, std, source_of_pixels, _ = stated(model, recipe.model, recipe.weights, recipe.mean, recipe.std)
    normalise, constants = Normalise(mean, std).to(device), Constants.of(mean, std)
    pixels = Pixels(mean, std, recipe.views.interpolation, *crop_of(recipe.validation.resize_ratio))
    teacher = None if recipe.distil is None else ClassTeacher(recipe, model, normalise, device)
    paths = replace_drop_path(model)
    if recipe.recompute:
        backbone.recompute(model)
    model.to(device)
    size = recipe.model.img_size
    about = f"{recipe.model.name} of {count_parameters(model):,} parameters, {num_classes:,} classes"
    example = (torch.zeros(2, 3, size, size, device=device),)
    content = [
        f"policies {POLICIES_VERSION}",
        start.sha256,
        *([f"teacher {teacher.sha256}"] if teacher else []),
        *(shard.content_hash for each in (source, held_out) for shard in each.shards),
    ]
    learner = Learner("", about, recipe, "model", model, example, ranks, order, content)
    history = History()
    learner.parts["history"] = history
    metadata = {
        "made_by": "tinymim finetune",
        "recipe": dump_recipe(recipe),
        "libraries": json.dumps(environment()),
        "timm": json.dumps(timm_arguments(model, recipe.model, recipe.pool)),
        "classes": json.dumps(source.classes),
        "constants": json.dumps(constants._asdict()),
        "started_from_sha256": start.sha256,
        **pixels.metadata(),
    }
    folder_config = timm_config(model, recipe.model, pixels, recipe.pool, source.classes)

    # ---- resume
    books = Bookkeeping(recipe, [learner], ranks, order, [shard.name for shard in source.shards], "images_per_s")
    books.resume()
    logger.info(f"finetune: {started_from(recipe, start)}; mean and std of the pixels: {source_of_pixels}")
    books.describe(f"{source.num_samples:,} images, validated on {held_out.num_samples:,}")
    validation = Validation(recipe, held_out.shards, num_classes, normalise, ranks)
    schedule = ValidationSchedule(
        recipe, learner, history, validation, metadata, folder_config, order.steps_per_epoch, books.total_steps
    )

    # ---- train
    views = ImageViews(source.shards, RandomViews(recipe.views), seed=recipe.run.seed)
    stream = batches(
        AugmentedViews(views, policies_of(recipe.augment, constants), constants.fill),
        order.plan(books.total_steps),
        recipe.loader,
        pin_memory=device.type == "cuda",
        batches_per_entry=recipe.order.views_per_decode,
    )
    places = torch.from_numpy(order.places)
    mixing = Mixing(recipe.augment, recipe.smoothing, num_classes)
    criterion = SoftTargetCrossEntropy()
    with contextlib.closing(stream), books.running() as (stop, meter):  # closing ends the loader's processes
        schedule.after(books.first_step, stop, meter)  # the last run may have stopped before this validation ended
        for step, batch in enumerate(stream, start=books.first_step):
            schedule.unreadable |= dict(batch.unreadable)
            images = normalise(batch.pixels.to(device, non_blocking=True))
            targets = mixing(images, batch.labels, order.lanes, recipe.run.seed, step)
            for part in parts_of(len(places), recipe.optim.accumulate):
                # Drawn for the whole batch, so that they do not depend on the number of ranks or parts.
                set_drop_masks(paths, seeded(CPU, recipe.run.seed, step), places[part.rows], batch_size, device)
                with learner.part_of_step(part.first, part.last):
                    with autocast(device, recipe.precision):
                        logits = learner.model(images[part.rows])
                    own = logits[0] if teacher else logits
                    losses = {"loss": criterion(own.float(), targets[part.rows])}
                    if teacher:
                        given = teacher(images[part.rows])
                        losses = teacher.losses(logits, losses["loss"], given, targets[part.rows])
                    learner.backward(losses, part.share)
            learner.update(step)
            # The state is saved before the validation, so a stop in the middle of it loses no step.
            books.end_step(step + 1, stop, meter, save=schedule.due(step + 1))
            schedule.after(step + 1, stop, meter)

    # ---- export
    if ranks.first:
        _export(schedule, start, source, held_out)


def size_of_head(train: ShardSet, val: ShardSet) -> int:
    """Number of classes of the head: the length of the index's list, or the largest label plus 1 without a list.

    Raises:
        SourceError: a sample has no label, `val` has a class that `train` lacks, the class lists differ, or a label
            is beyond the list.
    """
    count_classes(train, val)
    largest = int(np.max(labels_of(train.shards)))
    if train.classes and largest >= len(train.classes):
        raise SourceError(
            "a label is beyond the index's list of classes",
            got=f"label {largest}",
            expected=f"below {len(train.classes)}",
        )
    return len(train.classes) or largest + 1


def started_from(recipe: FinetuneRecipe, start: LoadedWeights) -> str:
    """The start of the training run as text: weights loaded, not used, new."""
    if recipe.weights == RANDOM:
        return f"from scratch because of `weights: random` (seed {recipe.run.seed})"
    left_out = f"; not used: {', '.join(start.dropped)}" if start.dropped else ""
    new = ", ".join(start.new) or "nothing, the head is loaded too"
    return f"from {recipe.weights} ({start.layout}); new: {new}{left_out}"


@dataclass
class ValidationSchedule:
    """Validates when it is due; logs the scores and keeps the best weights.

    Attributes:
        unreadable: by key, why this rank could not read images of the training set since the last validation.
    """

    recipe: FinetuneRecipe
    learner: Learner
    history: History
    validation: Validation
    metadata: dict[str, str]
    folder_config: dict[str, Any]  # of the folders that timm loads
    steps_per_epoch: int
    total_steps: int

    def __post_init__(self) -> None:
        self.unreadable: dict[str, str] = {}

    def due(self, step: int) -> bool:
        """Whether the weights after `step` steps are validated."""
        every = self.recipe.validation.every_epochs * self.steps_per_epoch
        return step == self.total_steps or (step > 0 and step % every == 0)

    def after(self, step: int, stop: StopFlag, meter: Meter) -> None:
        """Validate if due and not yet done; call it when the state after `step` steps is saved.

        Raises:
            Interrupted: some rank was asked to stop.
        """
        if not self.due(step) or not self.history.lacks(step):
            return
        learner, ranks = self.learner, self.learner.ranks
        models: dict[str, nn.Module] = {"model": learner.module}
        if learner.ema is not None:
            models["ema"] = learner.ema.module
        try:
            counts = self.validation.count(models, learner.device, stop, meter)
        except Interrupted as interrupted:
            raise Interrupted(
                f"state of step {step:,} saved, without its validation; the same command continues",
                interrupted.requeue,
            ) from None
        self.history.unreadable |= dict(merged(list(self.unreadable.items()), ranks))
        self.unreadable.clear()
        self._note(step, counts, models)

    def _note(self, step: int, counts: dict[str, Counts], models: dict[str, nn.Module]) -> None:
        learner, scores = self.learner, {name: each.scores() for name, each in counts.items()}
        entry = {"epoch": round(step / self.steps_per_epoch, 4), "step": step, **scores}
        of = list(models)[-1]  # the average, where there is one
        best = self.history.add(entry, of, counts[of], models[of] if learner.ranks.first else None)
        learner.log(
            step, {f"val_{name}_{score}": value for name, each in scores.items() for score, value in each.items()}
        )
        if best and learner.ranks.first:
            self.write(learner.folder / BEST_NAME, self.history.weights, self.history.best or {})
        tops = ", ".join(f"{name} top-1 {each['top1']:.2%} top-5 {each['top5']:.2%}" for name, each in scores.items())
        logger.info(
            f"finetune: epoch {entry['epoch']:g}: {tops}, loss {scores[of]['loss']:.4f}{', the best' if best else ''}"
        )

    def write(self, path: Path, state: dict[str, Tensor], entry: dict[str, Any]) -> None:
        """Write a state dict with its provenance and its scores on the validation set."""
        data = to_safetensors(state, self.metadata | {"validation": json.dumps(entry)})
        write_weights(path, data, self.folder_config)


def _export(schedule: ValidationSchedule, start: LoadedWeights, source: ShardSet, held_out: ShardSet) -> None:
    """Write the last and the best weights, and the report."""
    recipe, learner, history = schedule.recipe, schedule.learner, schedule.history
    assert history.best is not None  # validated after the last step
    folder, last = recipe.run.folder, history.entries[-1]
    files: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
        LAST_NAME: (learner.module.state_dict(), last | {"of": "model"}),
        BEST_NAME: (history.weights, history.best),
    }
    if learner.ema is not None:
        files[LAST_EMA_NAME] = (learner.ema.module.state_dict(), last | {"of": "ema"})
    weights = {}
    for name, (state, entry) in files.items():
        schedule.write(folder / name, state, entry)
        about = {key: entry[key] for key in ("of", "epoch", "step")}
        weights[name] = about | entry[entry["of"]] | {"weights_sha256": tensors_sha256(state)}
    report = {
        "weights": weights,
        "num_train_images": source.num_samples,
        "num_val_images": int(history.confusion.sum()),
        "num_classes": len(history.confusion),
        "unreadable": [
            {"set": name, "key": key, "reason": reason}
            for name, found in (("train", sorted(history.unreadable.items())), ("val", schedule.validation.unreadable))
            for key, reason in found
        ],
        "model": timm_arguments(learner.module, recipe.model, recipe.pool),
        "started_from": {"weights": recipe.weights, "sha256": start.sha256, "new": start.new, "unused": start.dropped},
        "recipe_digest": recipe_digest(recipe),
        "constants": json.loads(schedule.metadata["constants"]),
        "libraries": environment(),
        "history": history.entries,
        "classes_of_best": by_class(history.confusion, source.classes or held_out.classes),
    }
    write_json_atomic(folder / FINETUNED_NAME, report)
    best = weights[BEST_NAME]
    logger.info(f"finetune: wrote {folder / BEST_NAME}: top-1 {best['top1']:.2%} after {best['epoch']:g} epochs")
