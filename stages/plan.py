"""`tinymim plan`: measure for half a minute what a cache and its students would take on this machine."""

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tinymim.configs.errors import CheckpointError, RecipeError
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.sections.models import TeacherConfig
from tinymim.models.checkpoints import to_safetensors
from tinymim.models.timm_folder import Pixels
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, build_model
from tinymim.pipeline.shards import open_shards
from tinymim.stages.planning.clocks import available_cores
from tinymim.stages.planning.forecast import forecast
from tinymim.stages.planning.student import Planned, measured_student, named_as
from tinymim.stages.planning.teacher import measured_teacher
from tinymim.stages.run.device import pick_device
from tinymim.stages.run.preflight import RANDOM_WEIGHTS_HINT, hinted
from tinymim.stages.run.progress import logger
from tinymim.stages.units.prepare import prepare


@dataclass(frozen=True)
class Options:
    """The command line's addition to the recipes."""

    seconds: float = 30.0  # approximate time spent measuring; opening, loading and starting processes not counted
    trainings: int = 1  # training runs of every student
    num_images: int | None = None  # size of the whole source, where the recipes name a sample of it
    random_weights: bool = False  # for the teachers


def run(cache: CacheTeacherRecipe, students: Mapping[str, TrainStudentRecipe], options: Options) -> dict[str, Any]:
    """Measure, and forecast both stages.

    Args:
        cache: the cache recipe.
        students: the training recipes that would read the cache, by name.
        options: see `Options`.

    Returns:
        JSON values: "machine", "options", "measured", "forecast".

    Raises:
        RecipeError: options out of range, or sizes that do not fit one another.
        SourceError, CheckpointError, CacheMismatch, UserError: as the commands themselves.
    """
    asked = {"--seconds": options.seconds, "--trainings": options.trainings, "--images": options.num_images}
    for flag, value in asked.items():
        if value is not None and not 1 <= value < math.inf:
            raise RecipeError(f"{flag} is out of range", got=value, expected="at least 1")
    began, trained = time.monotonic(), []

    # ---- measure
    with contextlib.ExitStack() as stack:
        random = None
        if options.random_weights:
            random = partial(_randomised, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            cache = cache.changed_teachers(random)
        with hinted(CheckpointError, RANDOM_WEIGHTS_HINT):
            prepared = prepare(cache)
        logger.info(f"plan: measuring the teacher on {prepared.device}")
        count = options.num_images or prepared.source.num_samples
        seconds = options.seconds * (0.6 if students else 1.0)
        teacher, reader, shards = stack.enter_context(measured_teacher(cache, prepared, count, seconds))
        for name, recipe in students.items():
            if recipe.run.threads:
                torch.set_num_threads(recipe.run.threads)
            logger.info(f"plan: measuring {name} on {pick_device(recipe.run.device)}")
            images, covered = count, 1.0
            if recipe.source != cache.source and options.num_images is None:
                source, known = open_shards(recipe.source), prepared.source.by_name()
                images = source.num_samples
                covered = sum(each.num_samples for each in source.shards if each.name in known) / images
            planned = Planned(reader, shards, cache.num_views, covered)
            with hinted(CheckpointError, RANDOM_WEIGHTS_HINT):
                seconds = 0.4 * options.seconds / len(students)
                trained.append(measured_student(name, named_as(recipe, reader, random), images, planned, seconds))

    # ---- forecast
    cores = available_cores()
    found = forecast(teacher, trained, cores, options.trainings)
    return {
        "machine": {
            "cores": cores,
            "device": "cpu" if prepared.device.type == "cpu" else torch.cuda.get_device_name(prepared.device),
            "torch_threads": torch.get_num_threads(),
            "measured_for_s": time.monotonic() - began,
        },
        "options": dataclasses.asdict(options),
        "measured": {
            "teacher": dataclasses.asdict(teacher),
            "students": [dataclasses.asdict(each) for each in trained],
        },
        "forecast": dataclasses.asdict(found),
    }


def _randomised(folder: Path, teacher: TeacherConfig) -> TeacherConfig:
    """A teacher with a file of random weights in `folder`."""
    path = folder / f"random-{len(list(folder.iterdir()))}.safetensors"
    weights = build_model(teacher).state_dict()
    path.write_bytes(to_safetensors(weights, Pixels(IMAGENET_MEAN, IMAGENET_STD).metadata()))
    return teacher.model_copy(update={"weights": str(path)})
