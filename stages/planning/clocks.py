"""What `tinymim plan` times things with: repeated runs within a budget, as a loader or as the models would run."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Final

import torch

from tinymim.configs.sections import LoaderConfig
from tinymim.pipeline.dataset import ViewSource
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import Items
from tinymim.stages.planning.forecast import Cost

MOST_RUNS: Final = 50
now_s: Callable[[], float] = time.perf_counter  # called as clocks.now_s(): a test puts another clock here


def timed(work: Callable[[], int], budget_s: float, device: torch.device) -> Cost:
    """Median cost per view of `work`, which returns how many views it did; its first run is a warm-up.

    Where one run uses up the budget it is the only one, and counts.
    """
    runs: list[Cost] = []
    began = now_s()
    while len(runs) < MOST_RUNS:
        wall, busy = now_s(), time.process_time()
        views = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall, busy = now_s() - wall, time.process_time() - busy
        runs.append(Cost(wall / views, busy / max(wall, 1e-9)))
        if now_s() - began + wall * (len(runs) > 1) > budget_s:
            break
    counted = runs[1:] or runs
    return Cost(statistics.median(run.seconds for run in counted), statistics.median(run.cores for run in counted))


def fitting(seconds_per_view: float, wanted: int, budget_s: float, least: int = 1) -> int:
    """The batch that is measured: the wanted one, or what a third of the budget allows."""
    return max(min(wanted, int(budget_s / 3 / max(seconds_per_view, 1e-9))), min(least, wanted))


@contextlib.contextmanager
def loader_threads(workers: int) -> Iterator[None]:
    """torch's threads are those of a loader within: one in a worker, the process's own without any."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if workers else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_start_s(source: ViewSource, items: Items, config: LoaderConfig) -> float:
    """Seconds until the recipe's loader workers are up; 0 without any."""
    if config.workers == 0:
        return 0.0
    began = now_s()
    with contextlib.closing(batches(source, [items[:1]], config)) as stream:
        next(iter(stream))
        return now_s() - began
