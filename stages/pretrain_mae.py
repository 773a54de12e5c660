"""`tinymim pretrain-mae`: pre-train a teacher on any images as a masked autoencoder."""

import contextlib
import json

import torch

from tinymim.configs.errors import SourceError
from tinymim.configs.load import dump_recipe
from tinymim.configs.schema import PretrainMaeRecipe
from tinymim.models import backbone
from tinymim.models.checkpoints import to_safetensors
from tinymim.models.mae import MaskedAutoencoder
from tinymim.models.timm_folder import Pixels, timm_config
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, Normalise, build_vit, count_parameters
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.decode import environment
from tinymim.pipeline.loader import batches
from tinymim.pipeline.masks import MASKS_VERSION, mask_orders
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages.run.device import autocast, require_view_size
from tinymim.stages.run.folder import ENCODER_EMA_NAME, ENCODER_NAME, write_weights
from tinymim.stages.run.progress import logger
from tinymim.stages.training.bookkeeping import Bookkeeping
from tinymim.stages.training.launch import on_ranks
from tinymim.stages.training.learner import Learner
from tinymim.stages.training.optim import parts_of
from tinymim.stages.training.ranks import Ranks, set_up


def run(recipe: PretrainMaeRecipe) -> None:
    """Train and write `<run.folder>/encoder.safetensors` (a timm ViT without head), the folder `encoder` that timm
    loads with its sizes and normalisation, metrics and resumable states.

    Args:
        recipe: the recipe to run, in `workers` processes or as the rank that the environment names.

    Raises:
        UserError: bad source, sizes or weights; a loss is not finite.
        InternalError: workers died more often than `max_restarts` allows.
        Interrupted: stopped by a signal after saving its state.
    """
    on_ranks(train, recipe)


def train(recipe: PretrainMaeRecipe, ranks: Ranks) -> None:
    """`run` on one of the ranks."""
    # ---- source, model, optimiser
    device = set_up(recipe, ranks)
    require_view_size(recipe.views.size, recipe.model, "model")
    batch_size = recipe.optim.batch_size
    source = open_shards(recipe.source)
    order = SampleOrder(source.counts, recipe.order, batch_size, None, ranks.rank, ranks.world_size)
    torch.manual_seed(recipe.run.seed)
    encoder = build_vit(recipe.model)
    if recipe.recompute:
        backbone.recompute(encoder)
    model = MaskedAutoencoder(encoder, recipe.mae).to(device)
    normalise = Normalise().to(device)
    (rows, columns), size = backbone.grid(encoder), recipe.model.img_size
    about = f"encoder of {count_parameters(encoder):,} parameters"
    example = (torch.zeros(2, 3, size, size, device=device), torch.arange(rows * columns, device=device).expand(2, -1))
    content = [f"masks {MASKS_VERSION}", *(shard.content_hash for shard in source.shards)]
    learner = Learner("", about, recipe, "model", model, example, ranks, order, content)

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
            masks = mask_orders(recipe.run.seed, batch.named, rows, columns, recipe.mae.mask_unit)
            masks = masks.to(device, non_blocking=True)
            for part in parts_of(len(order.places), recipe.optim.accumulate, present=len(pixels)):
                with learner.part_of_step(part.first, part.last):
                    with autocast(device, recipe.precision):
                        loss = learner.model(normalise(pixels[part.rows]), masks[part.rows])
                    learner.backward({"loss": loss}, part.share)
            learner.update(step)
            books.end_step(step + 1, stop, meter)

    # ---- export
    if not ranks.first:
        return
    metadata = {
        "made_by": "tinymim pretrain-mae",
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
    logger.info(f"pretrain-mae: wrote {recipe.run.folder / ENCODER_NAME}")
