"""Masked pre-training: the loop and the export that its commands share."""

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tinymim.configs.errors import SourceError
from tinymim.configs.load import dump_recipe
from tinymim.configs.schema import PretrainMaeRecipe, PretrainRecipe
from tinymim.models import backbone
from tinymim.models.checkpoints import to_safetensors
from tinymim.models.timm_folder import Pixels, timm_config
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, Normalise, count_parameters
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.decode import environment
from tinymim.pipeline.loader import batches
from tinymim.pipeline.masks import MASKS_VERSION, mask_orders
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages.run.device import autocast
from tinymim.stages.run.folder import ENCODER_EMA_NAME, ENCODER_NAME, write_weights
from tinymim.stages.run.progress import logger
from tinymim.stages.training.bookkeeping import Bookkeeping
from tinymim.stages.training.learner import Learner
from tinymim.stages.training.optim import parts_of
from tinymim.stages.training.ranks import Ranks


class Masks(NamedTuple):
    """The law of masks: a grid of squares, hidden in units of `unit` x `unit` squares."""

    rows: int
    columns: int
    unit: int = 1

    def orders(self, seed: int, named: Iterable[tuple[str, int]]) -> Tensor:
        """As `mask_orders`."""
        return mask_orders(seed, named, self.rows, self.columns, self.unit)


def train_masked(
    recipe: PretrainMaeRecipe | PretrainRecipe,
    ranks: Ranks,
    device: torch.device,
    build: Callable[[], tuple[nn.Module, nn.Module]],
    masks: Masks,
    content: Sequence[str] = (),
) -> None:
    """Train, and write the encoder.

    Args:
        recipe: the recipe.
        ranks: the ranks of the run.
        device: where to train.
        build: makes the encoder, and the model around it that maps normalised images [B, 3, S, S] and orders of
            squares, int64 [B, squares], to the loss. Called with the run's seed set.
        masks: the law of masks.
        content: digests of what else the state depends on.
    """
    # ---- source, model, optimiser
    source = open_shards(recipe.source)
    order = SampleOrder(source.counts, recipe.order, recipe.optim.batch_size, None, ranks.rank, ranks.world_size)
    torch.manual_seed(recipe.run.seed)
    encoder, model = build()
    if recipe.recompute:
        backbone.recompute(encoder)
    model = model.to(device)
    normalise, size = Normalise().to(device), recipe.model.img_size
    squares = torch.arange(masks.rows * masks.columns, device=device).expand(2, -1)
    example = (torch.zeros(2, 3, size, size, device=device), squares)
    about = f"encoder of {count_parameters(encoder):,} parameters"
    inputs = [f"masks {MASKS_VERSION}", *content, *(shard.content_hash for shard in source.shards)]
    learner = Learner("", about, recipe, "model", model, example, ranks, order, inputs)

    # ---- resume
    books = Bookkeeping(recipe, [learner], ranks, order, [shard.name for shard in source.shards], "images_per_s")
    books.resume()
    books.describe(f"{source.num_samples:,} images")

    # ---- train
    views = ImageViews(source.shards, RandomViews(recipe.views))
    stream = batches(
        views,
        order.plan(books.total_steps),
        recipe.loader,
        pin_memory=device.type == "cuda",
        batches_per_entry=recipe.order.views_per_decode,
    )
    with contextlib.closing(stream), books.running() as (stop, meter):  # closing ends the loader's processes
        for step, batch in enumerate(stream, start=books.first_step):
            if not batch.keys:
                raise SourceError(f"no image of step {step} can be read", got=batch.unreadable[0])
            pixels = batch.pixels.to(device, non_blocking=True)
            orders = masks.orders(recipe.run.seed, batch.named).to(device, non_blocking=True)
            for part in parts_of(len(order.places), recipe.optim.accumulate, present=len(pixels)):
                with learner.part_of_step(part.first, part.last):
                    with autocast(device, recipe.precision):
                        loss = learner.model(normalise(pixels[part.rows]), orders[part.rows])
                    learner.backward({"loss": loss}, part.share)
            learner.update(step)
            books.end_step(step + 1, stop, meter)

    # ---- export
    if not ranks.first:
        return
    metadata = {
        "made_by": f"tinymim {recipe.stage}",
        "recipe": dump_recipe(recipe),
        "source": json.dumps({shard.name: shard.content_hash for shard in source.shards}),
        "libraries": json.dumps(environment()),
        "steps": str(books.total_steps),
    }
    trained_on = Pixels(IMAGENET_MEAN, IMAGENET_STD, recipe.views.interpolation)
    metadata |= trained_on.metadata()
    config = timm_config(encoder, recipe.model, trained_on)
    write_weights(recipe.run.folder / ENCODER_NAME, to_safetensors(encoder.state_dict(), metadata), config)
    if learner.ema is not None:
        averaged = learner.ema.module.encoder.state_dict()
        metadata |= {"ema": str(learner.ema.decay)}
        write_weights(recipe.run.folder / ENCODER_EMA_NAME, to_safetensors(averaged, metadata), config)
    logger.info(f"{recipe.stage}: wrote {recipe.run.folder / ENCODER_NAME}")
