"""`tinymim train-student`: stream the cache joined with the same views into students; the teacher is not needed."""

import contextlib
import json

import torch
from torch import Tensor

from tinymim.configs.load import dump_recipe
from tinymim.configs.schema import TrainStudentRecipe
from tinymim.models.checkpoints import to_safetensors
from tinymim.models.taps import StudentWithTap
from tinymim.models.vit import build_vit, count_parameters
from tinymim.pipeline.decode import environment
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.replay import ReplayedViews, join
from tinymim.pipeline.shards import open_shards
from tinymim.stages.audits.student_audits import StudentAudits
from tinymim.stages.cache.opened import opened_codec
from tinymim.stages.run.device import autocast
from tinymim.stages.run.folder import STUDENT_NAME, write_provenance
from tinymim.stages.run.progress import say
from tinymim.stages.training.bookkeeping import Bookkeeping
from tinymim.stages.training.device_stream import CPU, DeviceStream, current
from tinymim.stages.training.launch import on_ranks
from tinymim.stages.training.learner import Learner
from tinymim.stages.training.optim import parts_of, seeded
from tinymim.stages.training.ranks import Ranks, rank_device, set_up
from tinymim.stages.training.student_step import Taught, check_student_fits, trained_on, views_in_use
from tinymim.storage.atomic import write_bytes_atomic, write_json_atomic
from tinymim.storage.catalog import resolve
from tinymim.storage.reader import CacheReader
from tinymim.targets.relations.losses import relation_loss
from tinymim.targets.relations.qkv import QKV

EMA_NAME = "student-ema.safetensors"


def run(recipe: TrainStudentRecipe) -> None:
    """Train and write `<run.folder>/student.safetensors`, which loads into the timm model with `strict=True`.

    Of several students each has a folder of its own, `<run.folder>/<name>`. With `workers` the training runs in so
    many processes, or as the rank that the environment names.

    Raises:
        CacheMismatch: the source or a student does not fit the cache.
        ViewMismatch: replayed pixels differ from those the teacher saw.
        CacheCorrupt: bytes of the cache changed.
        UserError: a bad recipe, or a loss that is not finite.
        InternalError: workers died more often than the recipe allows.
        Interrupted: stopped by a signal after saving its state.
    """
    on_ranks(train, recipe)


def train(recipe: TrainStudentRecipe, ranks: Ranks) -> None:
    """`run` as one of the ranks."""
    # ---- cache joined with its images
    device = set_up(recipe, ranks)
    reader = CacheReader(resolve(recipe.cache))
    manifest = reader.manifest
    num_views = views_in_use(recipe, manifest)
    source = join(open_shards(recipe.source), reader, num_views, recipe.on_missing)
    codec = opened_codec(reader, recipe.targets, device)
    heads, tokens = int(manifest.teacher["heads"]), int(manifest.teacher["tokens"])
    relation_heads = codec.relation_heads(heads)
    for skipped in source.skipped[:5]:
        say(f"train-student: shard {skipped} is not in the cache (yet) and is left out")
    if source.skipped or source.without_record:
        say(
            f"train-student: on_missing: skip leaves out {len(source.skipped):,} shards, and "
            f"{source.without_record:,} images of the others that the cache holds no record of"
        )
    batch_size = recipe.optim.batch_size
    order = SampleOrder(source.counts, recipe.order, batch_size, num_views, ranks.rank, ranks.world_size)
    views = ReplayedViews(
        reader,
        source,
        [spec.name for spec in codec.arrays(heads, tokens)],
        recipe.verify,
        resident_units=order.resident_units(source.units_per_shard),
    )

    # ---- students, optimisers
    content = trained_on(reader, source)
    places = torch.from_numpy(order.places)
    students: list[Taught] = []
    for name, own in recipe.each().items():
        assert own.student is not None  # by TrainStudentRecipe.each
        check_student_fits(own.student, manifest.teacher, manifest.views, relation_heads)
        its_device = rank_device(own.run.device, ranks)
        torch.manual_seed(own.run.seed)
        student = StudentWithTap(build_vit(own.student, drop_path=own.drop_path)).to(its_device)
        about = f"{name or 'student'} of {count_parameters(student.vit):,} parameters"
        example = (torch.zeros(2, 3, own.student.img_size, own.student.img_size, device=its_device),)
        learner = Learner(name, about, own, "student", student, example, ranks, order, content)
        students.append(Taught(own.jitter, student, learner))
    learners = [learner for *_, learner in students]
    streams = {
        each: DeviceStream(
            each, opened_codec(reader, recipe.targets, each), tokens, recipe.run.seed, places, batch_size
        )
        for each in {learner.device: None for learner in learners}
    }
    audits = StudentAudits(recipe, manifest, relation_heads, [(each.student, each.learner) for each in students], ranks)

    # ---- resume
    names = [shard.name for shard in source.shards]
    books = Bookkeeping(recipe, learners, ranks, order, names, "views_per_s")
    books.resume()
    books.describe(f"{sum(source.counts):,} images x {num_views} views")
    if recipe.students and ranks.first:
        write_provenance(recipe)

    # ---- train
    stream = batches(
        views,
        order.plan(books.total_steps),
        recipe.loader,
        pin_memory=any(each.type == "cuda" for each in streams),
        batches_per_entry=recipe.order.views_per_decode,
    )
    with contextlib.closing(stream), books.opened() as (stop, meter):  # no loader outlives an error
        audits.after(books.first_step, books, stop)
        for step, batch in enumerate(stream, start=books.first_step):
            for shared in streams.values():
                shared.take(step, batch)
            for part in parts_of(len(places), recipe.optim.accumulate):
                for shared in streams.values():
                    shared.cut(part.rows)
                for strengths, student, learner in students:
                    shared = streams[learner.device]
                    student.draw(seeded(CPU, recipe.run.seed, step), places[part.rows], batch_size)
                    with current(learner.device), learner.part_of_step(part.first, part.last):
                        with autocast(learner.device, recipe.precision):
                            qkv = QKV(*learner.model(shared.images(strengths)))
                            losses = relation_loss(qkv.resplit(relation_heads), shared.target)
                            loss = torch.stack(list(losses.values())).sum()
                        learner.backward({"loss": loss} | {f"kl_{name}": kl for name, kl in losses.items()}, part.share)
            for learner in learners:
                with current(learner.device):
                    learner.update(step)
            books.close(step + 1, stop, meter)
            audits.after(step + 1, books, stop)

    # ---- export
    if not ranks.first:
        return
    for _, student, learner in students:
        metadata = {
            "made_by": "tinymim train-student",
            "recipe": dump_recipe(learner.recipe),
            "cache_spec_id": manifest.spec_id,
            "libraries": json.dumps(environment()),
            "steps": str(books.total_steps),
        }
        _export(student, learner, metadata)


def _export(student: StudentWithTap, learner: Learner, metadata: dict[str, str]) -> None:
    """Write a student's weights, their average and the report of what was trained; say so."""
    folder, label = learner.folder, f"train-student: {learner.name}".removesuffix(": ")
    report = trained_report(student, learner.optimiser)
    metadata |= {name: json.dumps(value) for name, value in report.items()}
    write_bytes_atomic(folder / STUDENT_NAME, to_safetensors(student.vit.state_dict(), metadata))
    if learner.ema is not None:
        averaged = learner.ema.module.vit.state_dict()
        write_bytes_atomic(folder / EMA_NAME, to_safetensors(averaged, metadata | {"ema": str(learner.ema.decay)}))
    write_json_atomic(folder / "trained.json", report)
    say(
        f"{label}: wrote {folder / STUDENT_NAME}: {len(report['trained'])} tensors trained, "
        f"{len(report['fixed'])} fixed ({', '.join(report['fixed']) or 'none'}), "
        f"{len(report['never_updated'])} never updated; the tap's qkv was dropped"
    )
    if report["never_updated"]:
        say(f"{label}: warning: still at their initial values: {', '.join(report['never_updated'])}")


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
