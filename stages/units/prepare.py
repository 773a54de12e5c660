"""Open the source and load the teacher of a cache-teacher recipe; make the manifest of its cache."""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from tinymim.configs.place import joined
from tinymim.configs.schema import CacheTeacherRecipe
from tinymim.models.teacher import Teacher
from tinymim.pipeline.decode import environment
from tinymim.pipeline.shards import ShardSet, open_shards
from tinymim.stages.run.device import pick_device, require_view_size
from tinymim.storage.manifest import Manifest, SourceShard
from tinymim.targets.contract import TargetKind
from tinymim.targets.kinds import make_kind


class Prepared(NamedTuple):
    """The parts of a cache-teacher recipe, opened and loaded."""

    device: torch.device
    source: ShardSet
    kind: TargetKind  # without constants
    teacher: Teacher
    manifest: Manifest


def prepare(recipe: CacheTeacherRecipe, source: ShardSet | None = None) -> Prepared:
    """Open the source, load the teacher and make the manifest; writes nothing.

    Args:
        recipe: the cache recipe.
        source: its shards, if they are open already.

    Raises:
        RecipeError: views, teacher and codec do not fit one another.
        SourceError: bad shards.
        CheckpointError: the teacher's weights do not exist or do not fit.
    """
    device = pick_device(recipe.run.device)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    require_view_size(recipe.views.size, recipe.teacher, "teacher")
    source = open_shards(recipe.source) if source is None else source
    kind = make_kind(recipe.codec, recipe.teacher.block)
    teacher = Teacher(recipe.teacher, kind.taps).to(device)
    manifest = make_manifest(recipe, source, teacher, kind)
    kind.specs(manifest.shapes)  # raises where the codec does not fit the teacher
    return Prepared(device, source, kind, teacher, manifest)


def cache_place(recipe: CacheTeacherRecipe, manifest: Manifest) -> Path | str:
    """The place of the recipe's cache: `cache`, or the spec's id in `cache_root`."""
    if recipe.cache is not None:
        return recipe.cache
    assert recipe.cache_root is not None  # the schema requires exactly one of the two
    return joined(recipe.cache_root, manifest.spec_id)


def make_manifest(recipe: CacheTeacherRecipe, source: ShardSet, teacher: Teacher, kind: TargetKind) -> Manifest:
    """The manifest of the cache that this recipe makes, which is its identity (I6)."""
    views = recipe.views
    shards = tuple(SourceShard(s.name, s.size_bytes, s.num_samples, s.content_hash) for s in source.shards)
    return Manifest(
        source=shards,
        teacher={
            **teacher.describe(),
            **asdict(teacher.shapes()),
            "block": recipe.teacher.block,
        },
        views=views.identity(),
        num_views=recipe.num_views,
        codec={"name": kind.name, "version": kind.version, "parameters": recipe.codec.model_dump(mode="json")},
        environment=environment(),
    )
