"""`batch_size: auto`: how many images go through the teacher at a time, found by trying."""

import contextlib
import os

import torch

from tinymim.configs.schema import CacheTeacherRecipe
from tinymim.models.teacher import Teacher
from tinymim.stages.run.progress import say
from tinymim.targets.contract import TargetKind

MOST_VIEWS = 2048  # of a batch: any GPU is busy with fewer
CPU_VIEWS = 64  # larger batches only leave the caches
DEVICE_SHARE = 0.8  # of the memory that is free: a batch that is launched ahead and the audit need the rest
HOST_SHARE = 0.25  # of the machine's free memory, for all batches that the loader holds ready


def find_images_per_batch(
    teacher: Teacher, kind: TargetKind, recipe: CacheTeacherRecipe, largest_shard: int, device: torch.device
) -> int:
    """The largest power of two of images whose views, teacher and codec fit into memory; 1 at least.

    On a GPU it is tried, from one image up. On a CPU, where memory gives way last, it is a fixed number of views.
    Neither is more than the host's memory holds of the loader's batches, nor (rounded up) than a shard has images.

    Args:
        teacher, kind: on `device`.
        recipe: says views, sizes and the loader.
        largest_shard: images in it.
    """
    views, size, loader = recipe.num_views, recipe.views.size, recipe.loader
    ready = max(1, loader.workers * loader.prefetch) + 2  # batches, those on their way to the teacher included
    host = HOST_SHARE * _free_host_bytes() / (ready * views * 3 * size * size)
    most = min(host, (CPU_VIEWS if device.type == "cpu" else MOST_VIEWS) / views, _ceiling_power(largest_shard))
    images = 1
    if device.type == "cpu":
        while 2 * images <= most:
            images *= 2
    else:
        while 2 * images <= most and _fits(teacher, kind, 2 * images * views, size, device):
            images *= 2
    say(f"cache-teacher: batch_size auto is {images} images, {images * views} views at once on {device.type}")
    return images


def _fits(teacher: Teacher, kind: TargetKind, views: int, size: int, device: torch.device) -> bool:
    """Whether teacher and codec take so many views with memory to spare."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    free_bytes += torch.cuda.memory_reserved(device)  # what this process holds already is there to be used
    with torch.cuda.device(device):  # the next one takes no device without a number
        fraction = torch.cuda.get_per_process_memory_fraction()
    free_bytes = min(free_bytes, int(total_bytes * fraction))
    torch.cuda.reset_peak_memory_stats(device)
    try:
        pixels = torch.zeros(views, 3, size, size, dtype=torch.uint8, device=device)
        kind.encode(teacher(pixels), torch.arange(views, device=device))
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) <= DEVICE_SHARE * free_bytes
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()


def _ceiling_power(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _free_host_bytes() -> float:
    """Memory of this machine that is free, or becomes so at need."""
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration), open("/proc/meminfo") as lines:
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2
