"""Constants of codecs: calibrated on a few views when a cache is created, read from the cache afterwards."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinymim.configs.errors import CacheMismatch, SourceError
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.sections.masks import MaskConfig
from tinymim.configs.sections.views import ViewConfig
from tinymim.models.taps import Tapped
from tinymim.models.teacher import Teacher
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.masks import visible_patches
from tinymim.pipeline.shards import ShardSet
from tinymim.pipeline.views import RandomViews
from tinymim.stages.run.progress import logger
from tinymim.stages.units.drops import drawn_drops
from tinymim.storage.writer import CacheWriter
from tinymim.targets.contract import TargetKind
from tinymim.targets.kinds import make_kind


def require_rebuildable(kinds: Mapping[str, TargetKind], teachers: Mapping[str, Teacher]) -> None:
    """Check, before a cache exists, that codecs with constants fit their teachers, both by layer.

    Raises:
        RecipeError: stored records could not be rebuilt.
    """
    for layer, kind in kinds.items():
        if kind.calibration_views:
            teacher = teachers[layer]
            kind.check_teacher(teacher.black(kind.taps), teacher.projection)


def settle_constants(
    writer: CacheWriter, layer: str, recipe: CacheTeacherRecipe, source: ShardSet, teacher: Teacher
) -> dict[str, Tensor] | None:
    """The constants of a layer's codec, on the teacher's device; calibrated and written if the layer has none.

    Args:
        writer: the writer of the cache.
        layer: the name of the layer.
        recipe: the cache recipe.
        source: the shards.
        teacher: the layer's teacher, on its device.

    Returns:
        None for a codec without constants.

    Raises:
        RecipeError: the codec does not fit this teacher.
        SourceError: none of the images to calibrate on can be read.
        CacheMismatch: the source lists its shards in another order than the job that created the cache.
        CacheCorrupt: the stored constants are damaged.
    """
    kind = make_kind(*recipe.layers[layer])
    if not kind.calibration_views:
        return None
    device = teacher.normalise.mean.device
    stored = on_device(writer.constants(layer), device)
    if stored is not None:
        return stored
    with writer.exclusively_constants(layer):
        # Read again: another job may have calibrated while this one waited for the lease.
        stored = on_device(writer.constants(layer), device)
        if stored is not None:
            return stored
        _require_same_order(writer, source)
        constants = calibrated(kind, recipe.views, recipe.given_batch_size, source, teacher, recipe.masks[layer])
        writer.write_constants(layer, {name: array.numpy() for name, array in constants.items()})
    return {name: array.to(device) for name, array in constants.items()}


def _require_same_order(writer: CacheWriter, source: ShardSet) -> None:
    # Calibration takes the first images of the source. Nothing else in a cache depends on the order of shards.
    stored, wanted = [shard.name for shard in writer.manifest.source], [shard.name for shard in source.shards]
    if stored[: len(wanted)] != wanted:
        first = next(place for place, name in enumerate(wanted) if stored[place] != name)
        raise CacheMismatch(
            f"the shards of this source have another order than those that {writer.place} was created with",
            got=f"{wanted[first]} at place {first}",
            expected=f"{stored[first]}, because a codec is calibrated on the first images",
            hint="restore the order of the source, or name another cache",
        )


def on_device(arrays: dict[str, npt.NDArray[Any]] | None, device: torch.device) -> dict[str, Tensor] | None:
    return None if arrays is None else {name: torch.tensor(array, device=device) for name, array in arrays.items()}


def calibrated(
    kind: TargetKind,
    law: ViewConfig,
    batch_size: int,
    source: ShardSet,
    teacher: Teacher,
    mask: MaskConfig | None = None,
) -> dict[str, Tensor]:
    """Calibrate on the first view of the first `kind.calibration_views` images; the constants are on the CPU.

    Args:
        kind: the codec to calibrate.
        law: the distribution of views.
        batch_size: images per batch of the teacher.
        source: the shards.
        teacher: the teacher, on its device.
        mask: the mask of the teacher's views.

    Raises:
        RecipeError: the codec does not fit this teacher.
        SourceError: none of these images can be read.
    """
    device = teacher.normalise.mean.device
    images = ((shard, sample, 0) for shard, held in enumerate(source.shards) for sample in range(held.num_samples))
    items = np.array(list(itertools.islice(images, kind.calibration_views)), dtype=np.int64)
    views = ImageViews(source.shards, RandomViews(law).at(teacher.config.img_size), law.seed)

    def tapped() -> Iterator[Tapped]:
        count = 0
        for start in range(0, len(items), batch_size):
            batch = views.batch(items[start : start + batch_size])
            count += len(batch.keys)
            if batch.keys:
                kept = visible_patches(mask, batch.named, teacher.grid, device)
                drops = drawn_drops(teacher, batch.view_keys.to(device))
                yield teacher(batch.pixels.to(device), taps=kind.taps, kept=kept, drops=drops)
        if not count:
            raise SourceError("none of the images to calibrate the codec on can be read", got=f"{len(items)} images")
        logger.info(f"codec {kind.name}: calibrating on {count:,} views")

    return kind.calibrate(tapped(), teacher.projection)
