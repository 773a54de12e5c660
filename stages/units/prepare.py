"""Open the source and load the teacher of a cache-teacher recipe; make the manifest of its cache and its layers."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from tinymim.configs.codecs.kinds import codec_parameters
from tinymim.configs.place import joined
from tinymim.configs.schema.cache import CacheTeacherRecipe, LayerTarget
from tinymim.configs.sections.masks import MaskConfig
from tinymim.models import hiding
from tinymim.models.teacher import Teacher
from tinymim.pipeline.decode import environment
from tinymim.pipeline.shards import ShardSet, open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages.run.device import pick_device, require_view_size
from tinymim.storage.layout import METADATA
from tinymim.storage.manifest import Layer, Manifest, SourceShard, joint_spec_id
from tinymim.storage.store import open_store
from tinymim.targets.contract import TargetKind
from tinymim.targets.kinds import make_kind

# Libraries that change no number of a teacher: they read images and write files.
_OF_IMAGES = frozenset({"torchvision", "pillow", "simplejpeg", "zarr"})


class Prepared(NamedTuple):
    """The parts of a cache-teacher recipe, opened and loaded."""

    device: torch.device
    source: ShardSet
    kinds: dict[str, TargetKind]  # by layer, without constants
    teachers: dict[str, Teacher]  # by layer; layers of one teacher share it
    manifest: Manifest
    layers: dict[str, Layer]  # by name


def prepare(recipe: CacheTeacherRecipe, source: ShardSet | None = None, model: nn.Module | None = None) -> Prepared:
    """Open the source, load the teachers and make manifest and layers; writes nothing.

    Args:
        recipe: the cache recipe.
        source: its shards, if they are open already.
        model: the teacher itself, instead of the one that the recipe names.

    Raises:
        RecipeError: views, teachers and codecs do not fit one another.
        SourceError: bad shards.
        CheckpointError: a teacher's weights do not exist or do not fit.
    """
    device = pick_device(recipe.run.device)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    _require_seen(recipe)
    source = open_shards(recipe.source) if source is None else source
    kinds = {name: make_kind(*target) for name, target in recipe.layers.items()}
    teachers: dict[str, Teacher] = {}
    for name, config in recipe.used_teachers.items():
        own = [layer for layer, of in recipe.teacher_names.items() if of == name]
        taps = {tap for layer in own for tap in kinds[layer].taps}
        teachers |= dict.fromkeys(own, Teacher(config, taps, model if not name else None).to(device))
    manifest = make_manifest(recipe, source)
    layers = {
        name: make_layer(name, target, manifest, teachers[name], kinds[name], recipe.masks[name])
        for name, target in recipe.layers.items()
    }
    return Prepared(device, source, kinds, teachers, manifest, layers)


def _require_seen(recipe: CacheTeacherRecipe) -> None:
    """Raises RecipeError where a new cache would have a size that none of its teachers sees."""
    teachers = recipe.used_teachers
    if any(teacher.img_size == recipe.views.size for teacher in teachers.values()):
        return
    if recipe.cache is None or not open_store(recipe.cache).exists(METADATA):
        name, first = next(iter(teachers.items()))
        require_view_size(recipe.views.size, first, f"teachers.{name}" if name else "teacher")


def cache_place(recipe: CacheTeacherRecipe, layers: Mapping[str, Layer]) -> Path | str:
    """The place of the recipe's cache: `cache`, or the id of the layers' specs in `cache_root`."""
    if recipe.cache is not None:
        return recipe.cache
    assert recipe.cache_root is not None  # the schema requires exactly one of the two
    return joined(recipe.cache_root, joint_spec_id([layer.spec_id for layer in layers.values()]))


def make_manifest(recipe: CacheTeacherRecipe, source: ShardSet) -> Manifest:
    """The manifest of the cache that this recipe writes to, which is its identity (I6)."""
    shards = tuple(SourceShard(s.name, s.size_bytes, s.num_samples, s.content_hash) for s in source.shards)
    made_with = environment() | RandomViews(recipe.views).canaries
    return Manifest(source=shards, views=recipe.views.identity(), environment=made_with)


def make_layer(
    name: str,
    target: LayerTarget,
    manifest: Manifest,
    teacher: Teacher,
    kind: TargetKind,
    mask: MaskConfig | None = None,
) -> Layer:
    """A layer of a recipe: the same whether the teacher is tapped for others, too.

    Raises:
        RecipeError: the codec or the mask does not fit the teacher.
    """
    if mask is not None:
        hiding.check_masked(teacher.cut.model)
    shapes = teacher.shapes(kind.taps, None if mask is None else mask.num_visible(*teacher.grid))
    return Layer(
        name=name,
        cache=manifest.spec_id,
        teacher={**teacher.describe(kind.taps), "shapes": asdict(shapes)},
        target={
            "taps": [str(tap) for tap in kind.taps],
            "name": kind.name,
            "version": kind.version,
            "parameters": codec_parameters(target.codec),
            "arrays": {spec.name: {"dtype": spec.dtype, "shape": list(spec.shape)} for spec in kind.specs(shapes)},
        }
        | ({} if mask is None else {"mask": mask.model_dump(mode="json")}),
        environment={name: value for name, value in environment().items() if name not in _OF_IMAGES},
    )
