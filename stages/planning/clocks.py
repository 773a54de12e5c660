"""Timing for `tinymim plan`: named laps in this process."""

import contextlib
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator

import torch

now_s: Callable[[], float] = time.perf_counter  # called as clocks.now_s(): a test puts another clock here


class Laps:
    """Seconds per view by name, one value a lap. The first lap of a name is a warm-up, unless it is the only one.

    Args:
        devices: a lap ends when these have done their work.
    """

    def __init__(self, devices: Collection[torch.device] = ()) -> None:
        self._gpus = [device for device in devices if device.type == "cuda"]
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._busy: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, name: str, seconds: float) -> None:
        """Append a lap."""
        self._seconds[name].append(seconds)

    @contextlib.contextmanager
    def lap(self, name: str, views: int) -> Iterator[None]:
        """Append the block's time, shared by `views` views."""
        wall, busy = now_s(), time.process_time()
        yield
        for gpu in self._gpus:
            torch.cuda.synchronize(gpu)
        wall, busy = now_s() - wall, time.process_time() - busy
        self.add(name, wall / views)
        self._busy[name].append(busy / max(wall, 1e-9))

    def latest_s(self, name: str) -> float:
        """Seconds of the last lap."""
        return self._seconds[name][-1]

    def medians_s(self) -> dict[str, float]:
        """Median seconds of the laps, by name."""
        return {name: statistics.median(laps[1:] or laps) for name, laps in self._seconds.items()}

    def cores(self, name: str) -> float:
        """Cores that this process keeps busy in a block: median of CPU time over wall time."""
        return statistics.median(self._busy[name][1:] or self._busy[name])


@contextlib.contextmanager
def loader_threads(workers: int) -> Iterator[None]:
    """Give torch the threads of a loading process: one in a worker, the process's own without workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if workers else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
