"""`tinymim pretrain-mae`: masked autoencoder pre-training, so that a teacher can be made from any images."""

import json

import torch

from tinymim.configs.load import dump_recipe
from tinymim.configs.schema import PretrainMaeRecipe
from tinymim.models.checkpoints import to_safetensors
from tinymim.models.mae import MaskedAutoencoder
from tinymim.models.vit import Normalise, build_vit, count_parameters
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.decode import environment
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages.interrupt import Interrupted, StopFlag
from tinymim.stages.progress import Meter, say
from tinymim.stages.runfolder import RunFolder
from tinymim.stages.training import (
    autocast,
    load_state,
    make_optimiser,
    make_scaler,
    make_schedule,
    optimiser_step,
    pick_device,
    require_finite,
    require_view_size,
    save_state,
    seeded,
    state_identity,
)
from tinymim.storage.atomic import write_bytes_atomic

ENCODER_NAME = "encoder.safetensors"


def run(recipe: PretrainMaeRecipe) -> None:
    """Train and write `<run.folder>/encoder.safetensors` (a timm ViT without head), metrics and resumable state.

    Raises:
        UserError: bad source, sizes or weights; a loss that is not finite.
        Interrupted: stopped by a signal after saving its state.
    """
    # ---- source, model, optimiser
    device = pick_device(recipe.run.device)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    require_view_size(recipe.views.size, recipe.model, "model")
    source = open_shards(recipe.source)
    torch.manual_seed(recipe.run.seed)
    encoder = build_vit(recipe.model)
    model = MaskedAutoencoder(encoder, recipe.mae).to(device)
    normalise = Normalise().to(device)
    optimiser = make_optimiser(model, recipe.optim)
    scaler = make_scaler(device, recipe.precision)
    order = SampleOrder(source.counts, recipe.order, recipe.optim.batch_size, num_views=None)
    schedule = make_schedule(recipe.optim, order.steps_per_epoch)
    num_patches = encoder.patch_embed.num_patches

    # ---- resume
    identity = state_identity(recipe, [shard.content_hash for shard in source.shards])
    parts = {"model": model, "optimiser": optimiser, "scaler": scaler, "order": order}
    folder = recipe.run.folder
    first_step = load_state(folder, identity, parts, device) if recipe.checkpoint.resume else 0
    say(
        f"pretrain-mae: {source.num_samples:,} images, {count_parameters(encoder):,} encoder parameters, "
        f"{schedule.total_steps:,} steps of {recipe.optim.batch_size} = "
        f"{schedule.total_steps / order.steps_per_epoch:.1f} epochs, peak lr {schedule.peak_lr:.2e}, "
        f"from step {first_step:,}"
    )

    # ---- train
    views = ImageViews(source.shards, RandomViews(recipe.views))
    stream = batches(
        views,
        order.plan(schedule.total_steps),
        recipe.loader,
        pin_memory=device.type == "cuda",
        batches_per_entry=recipe.order.views_per_decode,
    )
    with (
        RunFolder(recipe, first_step) as log,
        StopFlag() as stop,
        Meter("pretrain-mae", schedule.total_steps, "steps", first_step) as meter,
    ):
        step = first_step
        for batch in stream:
            generator = seeded(device, recipe.run.seed, step)
            noise = torch.rand(len(batch.pixels), num_patches, device=device, generator=generator)
            with autocast(device, recipe.precision):
                loss = model(normalise(batch.pixels.to(device, non_blocking=True)), noise)
            lr = schedule.lr(step)
            optimiser_step(loss, model, optimiser, scaler, lr, recipe.optim.clip_norm)
            step += 1
            order.step = step
            meter.advance(1)
            last = step == schedule.total_steps
            save = stop.requested or last or step % recipe.checkpoint.every_steps == 0
            log_due = last or (step - 1) % recipe.run.log_every == 0
            if save or log_due:
                value = require_finite(loss, step - 1)
                meter.note = f"loss {value:.4f}"
            if log_due:
                log.log(step - 1, loss=value, lr=lr, images_per_s=meter.rate * recipe.optim.batch_size)
            if save:
                save_state(folder, step, identity, parts)
            if stop.requested and not last:
                raise Interrupted(f"state of step {step:,} saved; the same command continues")

    # ---- export
    metadata = {
        "made_by": "tinymim pretrain-mae",
        "recipe": dump_recipe(recipe),
        "source": json.dumps({shard.name: shard.content_hash for shard in source.shards}),
        "libraries": json.dumps(environment()),
        "steps": str(step),
    }
    write_bytes_atomic(folder / ENCODER_NAME, to_safetensors(encoder.state_dict(), metadata))
    say(f"pretrain-mae: wrote {folder / ENCODER_NAME}")
