"""The shares of stage one's time: start, teacher, codec, and what they wait for."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

# The phases that may limit a job, in the order in which an image passes them.
PHASES = ("start", "decode", "teacher", "encode", "audit", "write")
# Measured times: until the first images; of the device in teacher and codec; of waits for later images and for the
# threads behind the teacher; of these threads at work, which divides the waits for them between audit and write.
MEASURED = ("start", "teacher", "encode", "waited_for_images", "waited_behind", "audit", "write")


class Marks:
    """Time marks of one device: CUDA events, which nobody has to wait for, or clock times on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._moments_s: list[float] = []

    def mark(self) -> None:
        """Record the time at which the device gets here."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
        else:
            self._moments_s.append(time.monotonic())

    def wait(self) -> None:
        """Wait until the device has passed the last mark."""
        if self._events:
            self._events[-1].synchronize()

    def between_s(self) -> list[float]:
        """Seconds from each mark to the next; call after `wait`."""
        if self._cuda:
            pairs = zip(self._events, self._events[1:], strict=False)
            return [first.elapsed_time(second) / 1000.0 for first, second in pairs]
        return [second - first for first, second in zip(self._moments_s, self._moments_s[1:], strict=False)]


class Stopwatch:
    """Seconds of each of `MEASURED`, and of the "wall" clock. One thread only adds to each, so there is no lock."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(MEASURED, 0.0)
        self._began_s = time.monotonic()

    def add(self, phase: str, seconds: float) -> None:
        """Count `seconds` for one of `MEASURED`."""
        self._seconds[phase] += seconds

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count the block's time for one of `MEASURED`."""
        began_s = time.monotonic()
        try:
            yield
        finally:
            self.add(phase, time.monotonic() - began_s)

    @contextmanager
    def waiting_for_images(self) -> Iterator[None]:
        """Count the block's time as waiting for images; the first one ends the start, during which workers start."""
        began_s = time.monotonic()
        try:
            yield
        finally:
            if self._seconds["start"]:
                self.add("waited_for_images", time.monotonic() - began_s)
            else:
                self.add("start", time.monotonic() - self._began_s)

    def seconds(self) -> dict[str, float]:
        """All of `MEASURED`, and "wall"; never less than at an earlier call."""
        return {**self._seconds, "wall": time.monotonic() - self._began_s}


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """The share of the wall time, 0 to 1, that each phase causes; `seconds` are those of `Stopwatch.seconds`.

    A GPU goes on while its process waits. So waits count only for the time in which the GPU was idle, which is divided
    among phases in proportion to the waits for them.
    """
    found = {name: seconds.get(name, 0.0) / max(seconds.get("wall", 0.0), 1e-9) for name in MEASURED}
    idle = max(0.0, 1.0 - found["start"] - found["teacher"] - found["encode"])
    waited = found["waited_for_images"] + found["waited_behind"]
    part = min(1.0, idle / waited) if waited else 0.0
    behind = part * found["waited_behind"] / max(found["audit"] + found["write"], 1e-9)
    return {
        "start": found["start"],
        "decode": part * found["waited_for_images"],
        "teacher": found["teacher"],
        "encode": found["encode"],
        "audit": behind * found["audit"],
        "write": behind * found["write"],
    }


def percentages(seconds: Mapping[str, float]) -> str:
    """`shares` as text, e.g. "start 1 % decode 4 % teacher 90 % encode 5 % audit 0 % write 0 %"."""
    return " ".join(f"{phase} {100 * share:.0f} %" for phase, share in shares(seconds).items())
