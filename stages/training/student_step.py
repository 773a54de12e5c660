"""The student's step: what a training run needs of its cache, and whether the student fits it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from tinymim.configs.errors import CacheMismatch, RecipeError
from tinymim.configs.schema import TrainStudentRecipe
from tinymim.configs.sections import JitterConfig, ModelConfig
from tinymim.models import backbone
from tinymim.models.taps import StudentWithTap
from tinymim.models.vit import build_model
from tinymim.pipeline.replay import CachedSource
from tinymim.stages.training.learner import Learner
from tinymim.storage.constants import constants_digest
from tinymim.storage.manifest import Manifest
from tinymim.storage.reader import CacheReader


class Taught(NamedTuple):
    """A student, its jitter and what trains it."""

    jitter: JitterConfig
    student: StudentWithTap
    learner: Learner


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


def check_student_fits(student: ModelConfig, teacher: Mapping[str, Any], views: Mapping[str, Any], heads: int) -> None:
    """Compare the student's input and tokens with the teacher's; `heads` is the number of relation heads.

    Raises:
        CacheMismatch: names the field that differs.
        RecipeError: the student's width cannot be split into the teacher's heads.
    """
    if student.img_size != views["size"]:
        raise CacheMismatch(
            "student.img_size is not the size of the cached views",
            got=student.img_size,
            expected=views["size"],
            hint="students train at the size of the teacher's views",
        )
    with torch.device("meta"):
        model = build_model(student)
    width = backbone.widths(model)[-1]
    if width % heads:
        raise RecipeError(
            f"a student of width {width} cannot be split into {heads} relation heads",
            got=f"student.embed_dim {width}",
            expected=f"a multiple of {heads}",
            hint=f"the nearest are {width // heads * heads or heads} and {(width // heads + 1) * heads}",
        )
    grid, prefix = backbone.grid(model), backbone.prefix_tokens(model)
    if (list(grid), prefix) != (list(teacher["grid"]), teacher["prefix_tokens"]):
        raise CacheMismatch(
            "the student's tokens are not the teacher's",
            got=f"a grid of {grid[0]} x {grid[1]} and {prefix} prefix tokens",
            expected=f"{teacher['grid'][0]} x {teacher['grid'][1]} and {teacher['prefix_tokens']}",
            hint="choose student.patch_size so that img_size / patch_size is the teacher's grid",
        )
