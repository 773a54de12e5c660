"""`tinymim fidelity`: the gradients of a student under several codecs, and the codecs' costs, on the same views."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.errors import CheckpointError, RecipeError, SourceError
from tinymim.configs.load import recipe_digest
from tinymim.configs.schema.fidelity import FidelityRecipe
from tinymim.configs.taps import Shapes
from tinymim.models.student import StudentModel, build_student, shapes_of
from tinymim.models.taps import Tapped
from tinymim.models.teacher import Teacher
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.decode import environment
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import Items
from tinymim.pipeline.shards import ShardSet, open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages.pages.fidelity import draw_frontier
from tinymim.stages.run.device import pick_device, require_view_size
from tinymim.stages.run.folder import FIDELITY_NAME, FRONTIER_NAME, RunFolder
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.owner import owned
from tinymim.stages.run.progress import Meter, logger
from tinymim.stages.training.states import read_state
from tinymim.stages.units.constants import calibrated
from tinymim.stages.units.drops import drawn_drops
from tinymim.stages.units.gradients import CodecMoments, GradientProbe
from tinymim.storage.atomic import write_json_atomic
from tinymim.storage.blocks import stored_bytes
from tinymim.targets.contract import Target, TargetKind
from tinymim.targets.fidelity import StatisticMoments, merged, rounded
from tinymim.targets.kinds import divided_targets, make_kind

_NEXT_DRAW = 0x1E3779B97F4A7C15  # added to a view key, it gives further independent draws


@dataclass
class _Tried:
    """One codec of the recipe, and its measurements while encoding and decoding."""

    kind: TargetKind
    targets: TargetsConfig
    statistics: StatisticMoments = field(default_factory=StatisticMoments)
    records: list[dict[str, Tensor]] = field(default_factory=list)
    encode_ms: list[float] = field(default_factory=list)  # per view
    decode_ms: list[float] = field(default_factory=list)


def run(recipe: FidelityRecipe) -> dict[str, Any]:
    """Write `fidelity.json` and `frontier.png` to `run.folder`.

    Returns:
        The content of `fidelity.json`.

    Raises:
        RecipeError: sizes that do not fit one another.
        SourceError: bad shards, or too few readable images.
        CheckpointError: weights or training state that do not exist or fit.
        Interrupted: stopped by a signal; nothing is written.
    """
    # ---- teacher, views, codecs, students
    device = pick_device(recipe.run.device)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    require_view_size(recipe.views.size, recipe.teacher, "teacher")
    source = open_shards(recipe.source)
    block = recipe.teacher.block
    divided = divided_targets(list(recipe.codecs.values()), recipe.targets)
    codecs = {
        name: _Tried(make_kind(config, block, targets), targets)
        for (name, config), targets in zip(recipe.codecs.items(), divided, strict=True)
    }
    _refuse_other_heads(recipe, codecs)
    teacher = Teacher(recipe.teacher, sorted({tap for tried in codecs.values() for tap in tried.kind.taps})).to(device)
    shapes = teacher.shapes()
    for name, tried in codecs.items():
        tried.kind = _calibrated(recipe, name, tried, source, teacher)
    groups = _comparable(codecs, shapes)
    probes = {
        (student, names[0]): GradientProbe(codecs[names[0]].kind, model.to(device), shapes)
        for names in groups
        for student, model in make_students(recipe, codecs[names[0]].kind, shapes).items()
    }
    students = list(dict.fromkeys(student for student, _ in probes))
    judged = {student: {name: CodecMoments(recipe.num_images) for name in codecs} for student in students}

    # ---- every view: teacher once, every codec, every student
    law = RandomViews(recipe.views)
    views = ImageViews(source.shards, law, recipe.views.seed, further=[law.at(recipe.student.img_size)])
    plan = spread_items(source, recipe.num_images, recipe.batch_size)
    with (
        owned([recipe.run.folder]),
        RunFolder(recipe),
        StopFlag() as stop,
        Meter("fidelity", recipe.num_images, "views") as meter,
    ):
        for batch in batches(views, plan, recipe.loader, pin_memory=device.type == "cuda"):
            _refuse_unreadable(batch)
            seen, view_keys = batch.at(recipe.student.img_size).to(device), batch.view_keys.to(device)
            tapped = teacher(batch.pixels.to(device), drops=drawn_drops(teacher, view_keys))
            drawn = {name: _draw(tried, tapped, view_keys, shapes, recipe.draws) for name, tried in codecs.items()}
            for row in range(len(seen)):
                if stop.requested:
                    raise Interrupted("nothing was written")
                some = torch.tensor([row], device=device)
                one = {tap: tuple(tensor[some] for tensor in tensors) for tap, tensors in tapped.items()}
                for names in groups:
                    kind = codecs[names[0]].kind
                    targets = [kind.exact(one)]
                    for name in names:
                        targets += [codecs[name].kind.pick(t, slice(row, row + 1)) for t in drawn[name]]
                    for student in students:
                        dense, *found = probes[student, names[0]](seen[row : row + 1], targets)
                        for name in names:
                            judged[student][name].add(dense, found[: len(drawn[name])])
                            found = found[len(drawn[name]) :]
                meter.advance(1)

    # ---- report
    result = {
        "made_by": "tinymim fidelity",
        "recipe_digest": recipe_digest(recipe),
        "libraries": environment(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "teacher": teacher.describe() | asdict(shapes) | {"block": block},
        "num_views": recipe.num_images,
        "codecs": {name: _described(recipe, name, tried) for name, tried in codecs.items()},
        "students": {
            student: {
                name: merged(codecs[name].statistics.summary(), seen.summary()) for name, seen in by_codec.items()
            }
            for student, by_codec in judged.items()
        },
    }
    folder = recipe.run.folder
    write_json_atomic(folder / FIDELITY_NAME, result)
    draw_frontier(result, folder / FRONTIER_NAME)
    logger.info(f"fidelity: wrote {folder / FIDELITY_NAME} and {folder / FRONTIER_NAME}")
    return result


def _calibrated(recipe: FidelityRecipe, name: str, tried: _Tried, source: ShardSet, teacher: Teacher) -> TargetKind:
    """The kind with the constants that a cache of this source would have, if it needs any."""
    kind = tried.kind
    if not kind.calibration_views:
        return kind
    constants = calibrated(kind, recipe.views, recipe.batch_size, source, teacher)
    device = teacher.normalise.mean.device
    held = {each: array.to(device) for each, array in constants.items()}
    return make_kind(recipe.codecs[name], recipe.teacher.block, tried.targets, held)


def spread_items(source: ShardSet, count: int, batch_size: int) -> list[Items]:
    """View 0 of `count` images spread evenly over the source, in batches [B, 3].

    Raises:
        SourceError: the source holds fewer images.
    """
    if source.num_samples < count:
        raise SourceError("the source holds too few images", got=source.num_samples, expected=count)
    counts = [shard.num_samples for shard in source.shards]
    places = np.arange(count) * source.num_samples // count
    ends = np.cumsum(counts)
    units = np.searchsorted(ends, places, side="right")
    samples = places - (ends - counts)[units]
    items = np.stack([units, samples, np.zeros_like(units)], axis=1).astype(np.int64)
    return [items[start : start + batch_size] for start in range(0, count, batch_size)]


def make_students(recipe: FidelityRecipe, kind: TargetKind, teacher: Shapes) -> dict[str, StudentModel]:
    """The student at its initial weights, and as trained where the recipe names a run folder.

    Raises:
        CheckpointError: there is no training state, or it belongs to another student.
    """
    torch.manual_seed(recipe.run.seed)
    students = {"initial": _made_student(recipe, kind, teacher)}
    if recipe.student_state is not None:
        trained = _made_student(recipe, kind, teacher)
        state = read_state(recipe.student_state)
        try:
            trained.load_state_dict(state["parts"]["student"], strict=True)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"the state in {recipe.student_state} does not fit the student",
                got=error,
                hint="set student to the sizes of the training run",
            ) from error
        students[f"after {state['step']:,} steps"] = trained
    return students


def _made_student(recipe: FidelityRecipe, kind: TargetKind, teacher: Shapes) -> StudentModel:
    vit = build_student(recipe.student)
    return StudentModel(vit, kind.head(shapes_of(vit, recipe.student.img_size), teacher))


# ---------------------------------------------------------------- batches and views


def _draw(tried: _Tried, tapped: Tapped, keys: Tensor, shapes: Shapes, draws: int) -> list[Target]:
    """The targets of one batch, one per draw. `tried` keeps the records and statistics of the first, and all times."""
    kind, count = tried.kind, len(keys)
    targets: list[Target] = []
    for draw in range(draws if kind.draws(shapes) else 1):
        draw_keys = keys + draw * _NEXT_DRAW
        began = _now_ms(keys.device)
        arrays = kind.encode(tapped, draw_keys)
        encoded = _now_ms(keys.device)
        target = kind.decode(arrays, draw_keys, shapes)
        tried.encode_ms.append((encoded - began) / count)
        tried.decode_ms.append((_now_ms(keys.device) - encoded) / count)
        targets.append(target)
        if draw == 0:
            tried.records.append({name: array.cpu() for name, array in arrays.items()})
            tried.statistics.add(kind.statistics(tapped, target), count)
    return targets


def _comparable(codecs: Mapping[str, _Tried], shapes: Shapes) -> list[list[str]]:
    """Groups of codecs with the same dense targets: one meaning, and losses with the same names and parts."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tried in codecs.items():
        groups.setdefault((tried.kind.meaning, *tried.kind.parts(shapes).items()), []).append(name)
    return list(groups.values())


def _refuse_other_heads(recipe: FidelityRecipe, codecs: Mapping[str, _Tried]) -> None:
    """Raises RecipeError where a trained student, which has one head, is to be compared under several targets."""
    if recipe.student_state is not None and len(found := {tried.kind.meaning[0] for tried in codecs.values()}) > 1:
        raise RecipeError(
            "a trained student has the head of one kind of target",
            got=f"student_state, and codecs of {', '.join(sorted(map(str, found)))}",
            expected="codecs of the kind that it was trained on",
        )


def _refuse_unreadable(batch: ViewBatch) -> None:
    if batch.unreadable:
        key, reason = batch.unreadable[0]
        raise SourceError(f"image '{key}' is unreadable", got=reason, hint="leave it out with make-shards")


def _now_ms(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * time.perf_counter()


# ---------------------------------------------------------------- cost


def _described(recipe: FidelityRecipe, name: str, tried: _Tried) -> dict[str, Any]:
    """Parameters, bytes per view as a cache stores them, times per view."""
    arrays = {key: torch.cat([part[key] for part in tried.records]).numpy() for key in tried.records[0]}
    by_array = {key: stored_bytes(values) / recipe.num_images for key, values in arrays.items()}
    return {
        "name": tried.kind.name,
        "version": tried.kind.version,
        "parameters": recipe.codecs[name].model_dump(mode="json"),
        "bytes_per_view": rounded(sum(by_array.values())),
        "bytes_by_array": {key: rounded(value) for key, value in by_array.items()},
        "raw_bytes_per_view": sum(values.nbytes for values in arrays.values()) // recipe.num_images,
        "encode_ms_per_view": rounded(median(tried.encode_ms)),
        "decode_ms_per_view": rounded(median(tried.decode_ms)),
    }
