"""`tinymim plan`: measure for half a minute what a cache and its students would take here, before anybody pays."""

import contextlib
import dataclasses
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tinymim.configs.errors import CheckpointError, RecipeError, UserError
from tinymim.configs.load import dump_recipe
from tinymim.configs.schema import CacheTeacherRecipe, TrainStudentRecipe
from tinymim.configs.sections import SourceConfig
from tinymim.models.vit import build_model
from tinymim.pipeline.replay import join
from tinymim.pipeline.shards import ShardSet, open_shards
from tinymim.stages.planning import clocks
from tinymim.stages.planning.clocks import available_cores
from tinymim.stages.planning.forecast import Forecast, StudentCosts, TeacherCosts, forecast
from tinymim.stages.planning.student import measured_student
from tinymim.stages.planning.teacher import Sampled, measured_teacher
from tinymim.stages.run.device import pick_device
from tinymim.stages.run.folder import RECIPE_NAME, VERSIONS_NAME, provenance, read_metrics
from tinymim.stages.run.preflight import CACHE_RECIPE_HINT, RANDOM_WEIGHTS_HINT, hinted
from tinymim.stages.run.progress import say
from tinymim.stages.units.prepare import prepare
from tinymim.storage.catalog import resolve
from tinymim.storage.layout import METADATA
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import open_store


@dataclass(frozen=True)
class Options:
    """What the command line adds to the recipes."""

    seconds: float = 30.0  # that measuring may take, about; opening, loading and starting processes not counted
    trainings: int = 1  # of every student
    per_gb_month: float = 0.023  # price of storing 1e9 bytes for a month
    per_device_hour: float | None = None  # in the same currency
    num_images: int | None = None  # of the whole source, where what is at hand is a sample of it
    random_weights: bool = False


def run(
    cache: CacheTeacherRecipe | None, students: Mapping[str, TrainStudentRecipe], options: Options
) -> dict[str, Any]:
    """Measure, forecast, and compare with what the recipes' run folders hold of finished runs.

    Without `cache` the students' own cache must be there; the teacher is then not measured.

    Args:
        cache: what makes the cache.
        students: what trains from it, by names of the recipes.
        options: of the command.

    Returns:
        JSON values: "measured", "forecast", "compared", "machine", "options".

    Raises:
        RecipeError: options out of range, or sizes that do not fit one another.
        SourceError, CheckpointError, CacheMismatch, UserError: as the commands themselves.
    """
    _check(options)
    began = time.monotonic()
    parts = 1 + len(students) if cache is not None else max(len(students), 1)
    sources: dict[SourceConfig, ShardSet] = {}
    teacher: TeacherCosts | None = None
    trained: list[StudentCosts] = []
    cold_s = 0.0

    # ---- measure
    with contextlib.ExitStack() as stack:
        sampled: Sampled | None = None
        if cache is not None:
            prepared = prepare(stack.enter_context(_with_weights(cache, options.random_weights)))
            sources[cache.source] = prepared.source
            say(f"plan: measuring the teacher on {prepared.device}")
            share = options.seconds * (1 if not students else 0.6)
            count = options.num_images or prepared.source.num_samples
            teacher, sampled = stack.enter_context(measured_teacher(cache, prepared, count, share))
            device, cold_s = prepared.device, teacher.start_s
        for name, recipe in students.items():
            if recipe.source not in sources:
                sources[recipe.source] = open_shards(recipe.source)
            source = sources[recipe.source]
            device = pick_device(recipe.run.device)
            if recipe.run.threads:
                torch.set_num_threads(recipe.run.threads)
            say(f"plan: measuring {name} on {device}")
            share = options.seconds * (0.4 / len(students) if cache is not None else 1 / parts)
            here = sampled if sampled is not None else _existing(recipe, source)
            count = options.num_images or source.num_samples
            costs = measured_student(name, recipe, count, here, share)
            if recipe.loader.workers:
                # Only the first workers of a process start cold; a command of its own starts cold each time.
                cold_s = max(cold_s, costs.start_s)
                costs = dataclasses.replace(costs, start_s=cold_s)
            trained.append(costs)

    # ---- forecast
    cores = available_cores()
    found = forecast(teacher, trained, cores, options.trainings, options.per_gb_month, options.per_device_hour)
    return {
        "machine": {
            "cores": cores,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch_threads": torch.get_num_threads(),
            "measured_for_s": time.monotonic() - began,
        },
        "options": dataclasses.asdict(options),
        "measured": {
            "teacher": None if teacher is None else dataclasses.asdict(teacher),
            "students": [dataclasses.asdict(costs) for costs in trained],
        },
        "forecast": as_json(found),
        "compared": _compared(cache, students, found),
    }


def as_json(found: Forecast) -> dict[str, Any]:
    """A forecast as JSON values: what is infinite is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return None if isinstance(value, float) and math.isinf(value) else value

    return plain(dataclasses.asdict(found))  # type: ignore[no-any-return]  # of a dataclass it is a dict


def _check(options: Options) -> None:
    for name, value, least in (
        ("--seconds", options.seconds, 1),
        ("--trainings", options.trainings, 1),
        ("--images", options.num_images or 1, 1),
        ("--price", options.per_gb_month, 0),
        ("--device-hour", options.per_device_hour or 0.0, 0),
    ):
        if not value >= least or math.isinf(value):
            raise RecipeError(f"{name} is out of range", got=value, expected=f"at least {least}")


@contextlib.contextmanager
def _with_weights(recipe: CacheTeacherRecipe, random: bool) -> Iterator[CacheTeacherRecipe]:
    """The recipe as it is, or with a file of random weights, gone afterwards, for its teacher."""
    if not random:
        with hinted(CheckpointError, RANDOM_WEIGHTS_HINT):
            yield recipe
        return
    with tempfile.TemporaryDirectory(prefix="tinymim-plan-") as folder:
        path = Path(folder, "random.safetensors")
        save_file({name: value.contiguous() for name, value in build_model(recipe.teacher).state_dict().items()}, path)
        teacher = recipe.teacher.model_copy(update={"weights": str(path)})
        yield recipe.model_copy(update={"teacher": teacher})


def _existing(recipe: TrainStudentRecipe, source: ShardSet) -> Sampled:
    """The cache that a training is to read, as far as measuring needs it: its first unit of this source."""
    with hinted(UserError, CACHE_RECIPE_HINT):
        reader = CacheReader(resolve(recipe.cache))
    joined = join(source, reader, recipe.num_views, "skip")
    info = joined.units[joined.shards[0].name][0]
    reads = []
    for _ in range(3):
        began = clocks.now_s()
        reader.read_unit(info)
        reads.append((clocks.now_s() - began) / info.num_records)
    stored_bytes = sum(reader.bytes_by_component().values()) / reader.coverage().num_records
    num_views = recipe.num_views or reader.manifest.num_views
    return Sampled(reader, joined.shards[0], num_views, statistics.median(reads[1:]), info.unit.num_views, stored_bytes)


# ---------------------------------------------------------------- finished runs


def _compared(
    cache: CacheTeacherRecipe | None, students: Mapping[str, TrainStudentRecipe], found: Forecast
) -> list[dict[str, Any]]:
    """Forecast beside actual of every recipe whose run folder holds a finished run."""
    rows: list[dict[str, Any]] = []
    if cache is not None and found.stage_one is not None:
        seconds = _finished(cache, cache.run.folder, found.stage_one.num_records, None)
        rows += _row("cache-teacher", "seconds", found.stage_one.seconds, seconds, cache, cache.run.folder)
        size = _cache_bytes(cache) if seconds is not None else None
        rows += _row("cache-teacher", "bytes", found.stage_one.cache_bytes, size, cache, cache.run.folder)
    for (name, recipe), training in zip(students.items(), found.trainings, strict=True):
        own = next(iter(recipe.each().values()))
        last_step = training.views // recipe.optim.batch_size - 1
        seconds = _finished(recipe, own.run.folder, training.views, last_step)
        rows += _row(name, "seconds", training.cached_s, seconds, own, own.run.folder)
    return rows


def _row(
    name: str,
    what: str,
    forecast_value: float,
    actual: float | None,
    recipe: CacheTeacherRecipe | TrainStudentRecipe,
    folder: Path,
) -> list[dict[str, Any]]:
    if actual is None:
        return []
    there = json.loads((folder / VERSIONS_NAME).read_bytes())
    here = provenance(recipe)
    alike = all(there.get(key) == here[key] for key in ("machine", "cuda"))
    return [
        {
            "name": name,
            "what": what,
            "forecast": forecast_value,
            "actual": actual,
            "ratio": forecast_value / actual,
            "folder": str(folder),
            "same_recipe": (folder / RECIPE_NAME).read_text() == dump_recipe(recipe),
            "same_machine": alike,
        }
    ]


def _finished(
    recipe: CacheTeacherRecipe | TrainStudentRecipe, folder: Path, views: int, last_step: int | None
) -> float | None:
    """Seconds that a finished run took by its own log, which knows its rate; None where there is none.

    A run that was stopped and continued logs the rate of its last part, which stands for the whole.
    """
    try:
        stage = f"stage: {recipe.stage}" in (folder / RECIPE_NAME).read_text().splitlines()
        last = [line for line in read_metrics(folder) if "views_per_s" in line][-1]  # not one of an audit
    except (OSError, IndexError):
        return None
    done = last["step"] == last_step if last_step is not None else True
    return views / last["views_per_s"] if stage and done and last["views_per_s"] else None


def _cache_bytes(recipe: CacheTeacherRecipe) -> float | None:
    """Bytes of the recipe's cache, where it is complete."""
    if recipe.cache is None or not open_store(recipe.cache).exists(METADATA):
        return None
    reader = CacheReader(recipe.cache)
    complete = reader.coverage().complete and reader.manifest.num_views == recipe.num_views
    return float(sum(reader.bytes_by_component().values())) if complete else None


def read_recipes(
    named: Sequence[tuple[str, CacheTeacherRecipe | TrainStudentRecipe]],
) -> tuple[CacheTeacherRecipe | None, dict[str, TrainStudentRecipe]]:
    """The one cache-teacher recipe among those named, if there is one, and the train-student recipes by name.

    Raises:
        RecipeError: there are two of the first, or one is named twice.
    """
    caches = [recipe for _, recipe in named if isinstance(recipe, CacheTeacherRecipe)]
    students = {name: recipe for name, recipe in named if isinstance(recipe, TrainStudentRecipe)}
    if len(caches) > 1:
        raise RecipeError("a plan is for one cache", got=f"{len(caches)} cache-teacher recipes", expected="at most one")
    if len(caches) + len(students) < len(named):
        raise RecipeError(
            "a recipe is named twice", got=", ".join(name for name, _ in named), hint="--trainings N repeats them"
        )
    return (caches[0] if caches else None), students
