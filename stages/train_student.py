"""`tinymim train-student`: stream the cache joined with the same views into one student; the teacher is not needed."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tinymim.configs.errors import CacheMismatch, RecipeError
from tinymim.configs.load import dump_recipe
from tinymim.configs.schema import TrainStudentRecipe
from tinymim.models.checkpoints import to_safetensors
from tinymim.models.taps import StudentWithTap, count_tokens
from tinymim.models.vit import Normalise, build_model, build_vit, count_parameters
from tinymim.pipeline.decode import environment
from tinymim.pipeline.jitter import jitter
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.replay import CachedSource, ReplayedViews, join
from tinymim.pipeline.shards import open_shards
from tinymim.stages.calibrate import stored_constants
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
    save_state,
    seeded,
    state_identity,
    step_seed,
)
from tinymim.storage.atomic import write_bytes_atomic, write_json_atomic
from tinymim.storage.catalog import resolve
from tinymim.storage.constants import constants_digest
from tinymim.storage.manifest import Manifest
from tinymim.storage.reader import CacheReader
from tinymim.targets.codecs import stored_codec
from tinymim.targets.losses import relation_loss
from tinymim.targets.relations import QKV

STUDENT_NAME = "student.safetensors"
CPU = torch.device("cpu")


def run(recipe: TrainStudentRecipe) -> None:
    """Train and write `<run.folder>/student.safetensors`, which loads into the timm model with `strict=True`.

    Raises:
        CacheMismatch: the source or the student does not fit the cache.
        ViewMismatch: replayed pixels differ from those the teacher saw.
        CacheCorrupt: bytes of the cache changed.
        UserError: a bad recipe, or a loss that is not finite.
        Interrupted: stopped by a signal after saving its state.
    """
    # ---- cache joined with its images
    device = pick_device(recipe.run.device)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    reader = CacheReader(resolve(recipe.cache))
    manifest = reader.manifest
    num_views = views_in_use(recipe, manifest)
    source = join(open_shards(recipe.source), reader, num_views, recipe.on_missing)
    constants = stored_constants(reader.store, manifest, device)
    codec = stored_codec(manifest.codec, recipe.targets, constants)
    heads, tokens = int(manifest.teacher["heads"]), int(manifest.teacher["tokens"])
    relation_heads = codec.relation_heads(heads)
    for skipped in source.skipped[:5]:
        say(f"train-student: shard {skipped} is not in the cache (yet) and is left out")
    if source.skipped or source.without_record:
        say(
            f"train-student: on_missing: skip leaves out {len(source.skipped):,} shards, and "
            f"{source.without_record:,} images of the others that the cache holds no record of"
        )
    order = SampleOrder(source.counts, recipe.order, recipe.optim.batch_size, num_views)
    views = ReplayedViews(
        reader,
        source,
        [spec.name for spec in codec.arrays(heads, tokens)],
        recipe.verify,
        resident_units=order.resident_units(source.units_per_shard),
    )

    # ---- student, optimiser
    torch.manual_seed(recipe.run.seed)
    check_student_fits(recipe, manifest.teacher, manifest.views, relation_heads)
    student = StudentWithTap(build_vit(recipe.student, drop_path=recipe.drop_path)).to(device)
    normalise = Normalise().to(device)
    optimiser = make_optimiser(student, recipe.optim)
    scaler = make_scaler(device, recipe.precision)
    schedule = make_schedule(recipe.optim, order.steps_per_epoch)

    # ---- resume
    identity = state_identity(recipe, trained_on(reader, source))
    parts = {"student": student, "optimiser": optimiser, "scaler": scaler, "order": order}
    folder = recipe.run.folder
    first_step = load_state(folder, identity, parts, device) if recipe.checkpoint.resume else 0
    say(
        f"train-student: {sum(source.counts):,} images x {num_views} views, "
        f"{count_parameters(student.vit):,} parameters, {schedule.total_steps:,} steps of {recipe.optim.batch_size} = "
        f"{schedule.total_steps / order.steps_per_epoch:.1f} epochs, peak lr {schedule.peak_lr:.2e}, "
        f"from step {first_step:,}"
    )

    # ---- train
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
        Meter("train-student", schedule.total_steps, "steps", first_step) as meter,
    ):
        step = first_step
        student.train()
        for batch in stream:
            pixels = batch.pixels.to(device, non_blocking=True)
            records = {name: array.to(device, non_blocking=True) for name, array in batch.records.items()}
            target = codec.decode(records, batch.view_keys.to(device, non_blocking=True), tokens)
            images = normalise(jitter(pixels, recipe.jitter, seeded(CPU, recipe.run.seed, step)))
            with step_seed(recipe.run.seed, step), autocast(device, recipe.precision):
                losses = relation_loss(QKV(*student(images)).resplit(relation_heads), target)
                loss = torch.stack(list(losses.values())).sum()
            lr = schedule.lr(step)
            optimiser_step(loss, student, optimiser, scaler, lr, recipe.optim.clip_norm)
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
                each = {f"kl_{relation}": float(part.detach()) for relation, part in losses.items()}
                log.log(step - 1, loss=value, **each, lr=lr, views_per_s=meter.rate * recipe.optim.batch_size)
            if save:
                save_state(folder, step, identity, parts)
            if stop.requested and not last:
                raise Interrupted(f"state of step {step:,} saved; the same command continues")

    # ---- export
    metadata = {
        "made_by": "tinymim train-student",
        "recipe": dump_recipe(recipe),
        "cache_spec_id": manifest.spec_id,
        "libraries": json.dumps(environment()),
        "steps": str(step),
    }
    report = trained_report(student, optimiser)
    write_bytes_atomic(
        folder / STUDENT_NAME,
        to_safetensors(student.vit.state_dict(), metadata | {k: json.dumps(v) for k, v in report.items()}),
    )
    write_json_atomic(folder / "trained.json", report)
    say(
        f"train-student: wrote {folder / STUDENT_NAME}: {len(report['trained'])} tensors trained, "
        f"{len(report['fixed'])} fixed ({', '.join(report['fixed']) or 'none'}), "
        f"{len(report['never_updated'])} never updated; the tap's qkv was dropped"
    )
    if report["never_updated"]:
        say(f"train-student: warning: still at their initial values: {', '.join(report['never_updated'])}")


def views_in_use(recipe: TrainStudentRecipe, manifest: Manifest) -> int:
    """Views of every image that the student is trained on. Raises RecipeError where the cache is for fewer."""
    if recipe.num_views is not None and recipe.num_views > manifest.num_views:
        raise RecipeError(
            "num_views is more than the cache is for",
            got=recipe.num_views,
            expected=f"at most {manifest.num_views}",
            hint="`tinymim cache-teacher` with a larger num_views adds to the cache",
        )
    return recipe.num_views or manifest.num_views


def trained_on(reader: CacheReader, source: CachedSource) -> list[str]:
    """What a training state depends on beside the recipe: the cache's spec and constants, the bytes of its images."""
    constants = constants_digest(reader.store, reader.manifest)
    hashes = [shard.content_hash for shard in source.shards]
    return [reader.manifest.spec_id, *([constants] if constants else []), *hashes]


def check_student_fits(
    recipe: TrainStudentRecipe, teacher: Mapping[str, Any], views: Mapping[str, Any], heads: int
) -> None:
    """Compare the student's input and tokens with the teacher's; `heads` is the number of relation heads.

    Raises:
        CacheMismatch: names the field that differs.
        RecipeError: the student's width cannot be split into the teacher's heads.
    """
    if recipe.student.img_size != views["size"]:
        raise CacheMismatch(
            "student.img_size is not the size of the cached views",
            got=recipe.student.img_size,
            expected=views["size"],
            hint="students train at the size of the teacher's views",
        )
    with torch.device("meta"):
        model = build_model(recipe.student)
    width = int(model.embed_dim)  # type: ignore[arg-type]
    if width % heads:
        raise RecipeError(
            f"a student of width {width} cannot be split into {heads} relation heads",
            got=f"student.embed_dim {width}",
            expected=f"a multiple of {heads}",
            hint=f"the nearest are {width // heads * heads or heads} and {(width // heads + 1) * heads}",
        )
    grid, prefix = count_tokens(model)
    if (list(grid), prefix) != (list(teacher["grid"]), teacher["prefix_tokens"]):
        raise CacheMismatch(
            "the student's tokens are not the teacher's",
            got=f"a grid of {grid[0]} x {grid[1]} and {prefix} prefix tokens",
            expected=f"{teacher['grid'][0]} x {teacher['grid'][1]} and {teacher['prefix_tokens']}",
            hint="choose student.patch_size so that img_size / patch_size is the teacher's grid",
        )


def trained_report(student: StudentWithTap, optimiser: torch.optim.Optimizer) -> dict[str, list[str]]:
    """Which exported tensors the objective trained, from the optimiser's own moments.

    Returns:
        {"trained": names, "fixed": names not meant to train (the sine-cosine table), "never_updated": names that
        should have trained but got no gradient in the whole run}.
    """
    report: dict[str, list[str]] = {"trained": [], "fixed": [], "never_updated": []}
    for name, parameter in student.vit.named_parameters():
        moment: Tensor | None = optimiser.state.get(parameter, {}).get("exp_avg_sq")
        moved = moment is not None and bool((moment > 0).any())
        report["fixed" if not parameter.requires_grad else "trained" if moved else "never_updated"].append(name)
    return report
