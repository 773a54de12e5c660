"""The constants of a `hidden` cache: calibrated on some views when the cache is begun, then taken from the cache."""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinymim.configs.codecs import HiddenCodec
from tinymim.configs.errors import CacheMismatch, SourceError
from tinymim.configs.schema import CacheTeacherRecipe
from tinymim.configs.sections import ViewConfig
from tinymim.models.teacher import Teacher
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.shards import ShardSet
from tinymim.pipeline.views import RandomViews
from tinymim.stages.run.progress import say
from tinymim.storage.writer import CacheWriter
from tinymim.targets.relations.hidden import calibrate, check_projection
from tinymim.targets.relations.qkv import QKV


def require_rebuildable(recipe: CacheTeacherRecipe, teacher: Teacher) -> None:
    """Refuse, before there is a cache, a teacher whose q, k, v a `hidden` codec could not rebuild.

    Raises:
        RecipeError: its q, k, v are not a linear layer of the block's input.
    """
    if isinstance(recipe.codec, HiddenCodec):
        size, device = recipe.views.size, teacher.normalise.mean.device
        black = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)
        check_projection(QKV(*teacher(black)), *teacher.qkv_projection())


def settle_constants(
    writer: CacheWriter, recipe: CacheTeacherRecipe, source: ShardSet, teacher: Teacher
) -> dict[str, Tensor] | None:
    """The constants that the recipe's codec needs, on the teacher's device; in a new cache they are made and written.

    Of several jobs that begin a cache one makes them and the others wait.

    Returns:
        None for a codec that needs none.

    Raises:
        RecipeError: this teacher's q, k, v cannot be rebuilt from the block's input.
        SourceError: none of the images to calibrate on can be read.
        CacheMismatch: the source has its shards in another order than the job that began the cache.
        CacheCorrupt: the stored ones are damaged.
    """
    if not isinstance(recipe.codec, HiddenCodec):
        return None
    device = teacher.normalise.mean.device
    held = on_device(writer.constants(), device)
    if held is not None:
        return held
    with writer.exclusively_constants():
        held = on_device(writer.constants(), device)
        if held is not None:
            return held
        _require_same_order(writer, source)
        constants = calibrated(recipe.codec, recipe.views, recipe.given_batch_size, source, teacher)
        writer.write_constants({name: array.numpy() for name, array in constants.items()})
    return {name: array.to(device) for name, array in constants.items()}


def _require_same_order(writer: CacheWriter, source: ShardSet) -> None:
    """Calibration takes the first images of the source: the one thing of a cache that the order of shards decides."""
    stored, wanted = [shard.name for shard in writer.manifest.source], [shard.name for shard in source.shards]
    if stored[: len(wanted)] != wanted:
        first = next(place for place, name in enumerate(wanted) if stored[place] != name)
        raise CacheMismatch(
            f"the shards of this source have another order than those that {writer.place} was begun with",
            got=f"{wanted[first]} at place {first}",
            expected=f"{stored[first]}, because a codec is calibrated on the first images",
            hint="restore the order of the source, or begin another cache",
        )


def on_device(arrays: dict[str, npt.NDArray[Any]] | None, device: torch.device) -> dict[str, Tensor] | None:
    return None if arrays is None else {name: torch.tensor(array, device=device) for name, array in arrays.items()}


def calibrated(
    codec: HiddenCodec, law: ViewConfig, batch_size: int, source: ShardSet, teacher: Teacher
) -> dict[str, Tensor]:
    """The constants from the first view of the first `codec.calibration_views` images of the source, on the CPU.

    Raises:
        RecipeError: this teacher's q, k, v cannot be rebuilt from the block's input.
        SourceError: none of these images can be read.
    """
    weight, bias = teacher.qkv_projection()
    images = ((shard, sample, 0) for shard, held in enumerate(source.shards) for sample in range(held.num_samples))
    items = np.array(list(itertools.islice(images, codec.calibration_views)), dtype=np.int64)
    views = ImageViews(source.shards, RandomViews(law), law.seed)
    inputs, heads = [], 0
    for start in range(0, len(items), batch_size):
        batch = views.batch(items[start : start + batch_size])
        if batch.keys:
            q, k, v, x = teacher(batch.pixels.to(weight.device))
            check_projection(QKV(q, k, v, x), weight, bias)
            inputs.append(x.float().cpu())
            heads = q.shape[1]
    if not inputs:
        raise SourceError("none of the images to calibrate the codec on can be read", got=f"{len(items)} images")
    x = torch.cat(inputs)
    say(f"codec {codec.name}: calibrating on {len(x):,} views")
    return calibrate(codec, x, weight, bias, heads)
