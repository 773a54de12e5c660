"""`batch_size: auto`: the number of images per teacher batch, found by trying."""

import contextlib
import os
from collections.abc import Mapping

import torch

from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.models.teacher import Teacher
from tinymim.stages.run.progress import logger
from tinymim.stages.units.draft import seen_by_layer
from tinymim.targets.contract import TargetKind

MAX_GPU_VIEWS = 2048  # fewer views per batch already saturate any GPU
MAX_CPU_VIEWS = 64  # larger batches only fall out of the processor's caches
DEVICE_SHARE = 0.8  # share of the free GPU memory; a batch launched ahead and the audit need the rest
HOST_SHARE = 0.25  # share of the free host memory for all batches that the loader holds ready


def find_images_per_batch(
    teachers: Mapping[str, Teacher],
    kinds: Mapping[str, TargetKind],
    recipe: CacheTeacherRecipe,
    largest_shard: int,
    device: torch.device,
) -> int:
    """The largest power of two of images whose views fit into memory with teachers and codecs; at least 1.

    A GPU tries batches, from one image up. A CPU takes `MAX_CPU_VIEWS`, because its memory is not what limits it.
    Two bounds hold on both: the host memory for the loader's batches, and the images of a shard, rounded up.

    Args:
        teachers: the teachers by layer, on `device`.
        kinds: the codecs by layer, on `device`.
        recipe: the cache recipe: number and size of views, loader.
        largest_shard: images of the largest shard.
        device: the device that runs teachers and codecs.
    """
    views, loader = recipe.views_per_batch, recipe.loader
    pixels = sum(size * size for size in (recipe.views.size, *recipe.further_sizes))
    ready_batches = max(1, loader.workers * loader.prefetch) + 2  # 2 more are on their way to the teacher
    host_images = HOST_SHARE * _free_host_bytes() / (ready_batches * views * 3 * pixels)
    on_cpu = device.type == "cpu"
    max_views = MAX_CPU_VIEWS if on_cpu else MAX_GPU_VIEWS
    max_images = min(host_images, max_views / views, _ceiling_power(largest_shard))
    images = 1
    while 2 * images <= max_images and (on_cpu or _fits(teachers, kinds, 2 * images * views, device)):
        images *= 2
    logger.info(f"cache-teacher: batch_size auto is {images} images, {images * views} views at once on {device.type}")
    return images


def _fits(teachers: Mapping[str, Teacher], kinds: Mapping[str, TargetKind], views: int, device: torch.device) -> bool:
    """Whether a batch of `views` views leaves GPU memory to spare."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    free_bytes += torch.cuda.memory_reserved(device)  # torch's own cache counts as used, but can be reused
    with torch.cuda.device(device):  # get_per_process_memory_fraction rejects a device without an index
        fraction = torch.cuda.get_per_process_memory_fraction()
    free_bytes = min(free_bytes, int(total_bytes * fraction))  # workers that share a GPU each have a fraction
    torch.cuda.reset_peak_memory_stats(device)
    try:
        view_keys = torch.arange(views, device=device)
        seen = seen_by_layer(
            teachers,
            kinds,
            {},
            (),
            view_keys,
            lambda size: torch.zeros(views, 3, size, size, dtype=torch.uint8, device=device),
        )
        # A job holds the records of all layers until they are on their way to the host.
        _records = [kind.encode(seen[layer].tapped, view_keys) for layer, kind in kinds.items()]
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) <= DEVICE_SHARE * free_bytes
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()


def _ceiling_power(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _free_host_bytes() -> float:
    """Host memory that is free or can be reclaimed, in bytes; half of all memory where /proc/meminfo is missing."""
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration), open("/proc/meminfo") as lines:
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2
