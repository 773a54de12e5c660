"""`tinymim pretrain` and `pretrain-mae`: train a model from images alone, by what it predicts of hidden squares."""

import contextlib
import json

import torch

from tinymim.configs.errors import SourceError
from tinymim.configs.load import dump_recipe
from tinymim.configs.schema.pretrain import PretrainMaeRecipe, PretrainRecipe
from tinymim.models import backbone
from tinymim.models.checkpoints import tensors_sha256, to_safetensors
from tinymim.models.classifier import load_classifier
from tinymim.models.files import RANDOM
from tinymim.models.initialise import initialise_linear
from tinymim.models.mim import MaskedModel, masked_autoencoder
from tinymim.models.student import build_student
from tinymim.models.timm_folder import Pixels, timm_config
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, Normalise, count_parameters
from tinymim.models.weights import read_weights, stated
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


def run(recipe: PretrainRecipe | PretrainMaeRecipe) -> None:
    """Train and write `<run.folder>/encoder.safetensors` (a timm model without head), the folder `encoder` that timm
    loads with its sizes and normalisation, metrics and resumable states.

    Args:
        recipe: the recipe to run, in `workers` processes or as the rank that the environment names.

    Raises:
        UserError: bad source, sizes or weights; a loss is not finite; the model cannot hide squares in this way.
        InternalError: workers died more often than `max_restarts` allows.
        Interrupted: stopped by a signal after saving its state.
    """
    on_ranks(train, recipe)


def train(recipe: PretrainRecipe | PretrainMaeRecipe, ranks: Ranks) -> None:
    """`run` on one of the ranks."""
    # ---- source, model, optimiser
    device, size = set_up(recipe, ranks), recipe.model.img_size
    require_view_size(recipe.views.size, recipe.model, "model")
    source = open_shards(recipe.source)
    order = SampleOrder(source.counts, recipe.order, recipe.optim.batch_size, None, ranks.rank, ranks.world_size)
    torch.manual_seed(recipe.run.seed)
    encoder, content = build_student(recipe.model), [f"masks {MASKS_VERSION}"]
    trained_on, start = Pixels(IMAGENET_MEAN, IMAGENET_STD, recipe.views.interpolation), {"weights": RANDOM}
    if isinstance(recipe, PretrainMaeRecipe):
        model = masked_autoencoder(encoder, size, recipe.mae)
    else:
        if recipe.xavier:
            initialise_linear(encoder)
        load_classifier(encoder, recipe.model, recipe.weights)  # "random" leaves it as it is
        mean, std, source_of_pixels, licence = stated(encoder, recipe.model, recipe.weights, recipe.mean, recipe.std)
        trained_on = Pixels(mean, std, recipe.views.interpolation)
        logger.info(f"pretrain: weights {recipe.weights}; mean and std of the pixels: {source_of_pixels}")
        model = MaskedModel(encoder, size, recipe.mask, recipe.target, recipe.decoder)
        if recipe.weights != RANDOM:
            digest = tensors_sha256(read_weights(recipe.model, recipe.weights).tensors)
            content += [f"weights {digest}", f"pixels {mean} {std}"]
            start = {"weights": recipe.weights, "weights_sha256": digest, "license": licence}
    if recipe.recompute:
        backbone.recompute(encoder)
    model = model.to(device)
    rows, unit = model.rows, model.unit
    normalise = Normalise(trained_on.mean, trained_on.std).to(device)
    example = (torch.zeros(2, 3, size, size, device=device), torch.arange(rows**2, device=device).expand(2, -1))
    about = f"encoder of {count_parameters(encoder):,} parameters"
    inputs = [*content, *(shard.content_hash for shard in source.shards)]
    learner = Learner("", about, recipe, "model", model, example, ranks, order, inputs)

    # ---- resume
    books = Bookkeeping(recipe, [learner], ranks, order, [shard.name for shard in source.shards], "images_per_s")
    books.resume()
    books.describe(f"{source.num_samples:,} images")

    # ---- train
    stream = batches(
        ImageViews(source.shards, RandomViews(recipe.views)),
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
            orders = mask_orders(recipe.run.seed, batch.named, rows, rows, unit).to(device, non_blocking=True)
            for part in parts_of(len(order.places), recipe.optim.accumulate, present=len(pixels)):
                with learner.part_of_step(part.first, part.last):
                    with autocast(device, recipe.precision):
                        loss, r2 = learner.model(normalise(pixels[part.rows]), orders[part.rows])
                    learner.backward({"loss": loss, "r2": r2}, part.share)
            learner.update(step)
            books.end_step(step + 1, stop, meter)

    # ---- export
    if not ranks.first:
        return
    metadata = {
        "made_by": f"tinymim {recipe.stage}",
        "recipe": dump_recipe(recipe),
        "start": json.dumps(start),
        "source": json.dumps({shard.name: shard.content_hash for shard in source.shards}),
        "libraries": json.dumps(environment()),
        "steps": str(books.total_steps),
    }
    metadata |= trained_on.metadata()
    config = timm_config(encoder, recipe.model, trained_on)
    write_weights(recipe.run.folder / ENCODER_NAME, to_safetensors(encoder.state_dict(), metadata), config)
    if learner.ema is not None:
        averaged = learner.ema.module.encoder.state_dict()
        metadata |= {"ema": str(learner.ema.decay)}
        write_weights(recipe.run.folder / ENCODER_EMA_NAME, to_safetensors(averaged, metadata), config)
    logger.info(f"{recipe.stage}: wrote {recipe.run.folder / ENCODER_NAME}")
