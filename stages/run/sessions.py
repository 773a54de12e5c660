"""The time that a run takes: `sessions.jsonl` has lines per process, of which the last one counts.

A run that was stopped and resumed has several sessions and took the time of all of them, including steps that were
lost. Sessions are not part of the metrics, because the metrics of lost steps are dropped.
"""

import json
import platform
from pathlib import Path
from time import monotonic
from uuid import uuid4

import torch

from tinymim.configs.errors import naming
from tinymim.configs.sections.run import RunConfig

_EVERY_S = 30.0  # the shortest time between lines, which come with lines of metrics


class Session:
    """The clock of one process.

    Args:
        path: the file of all sessions of the run.
        device: the name of the run's device.
        num_devices: number of devices of all ranks, divided by the number of models that share them.
        from_scratch: the run starts from scratch, so earlier sessions are removed.

    Attributes:
        device_s: device seconds of workers in other processes; None: the elapsed time times `num_devices`.
    """

    def __init__(self, path: Path, device: str, num_devices: float = 1.0, from_scratch: bool = True) -> None:
        self._path = path
        if from_scratch:
            self._path.unlink(missing_ok=True)
        self._num_devices = num_devices
        self.device_s: float | None = None
        self._about = {"session": uuid4().hex[:8], "device": device}
        self._began_s = self._written_s = monotonic()

    def tick(self, last: bool = False) -> None:
        """Append a line with the time taken so far, if one is due."""
        now_s = monotonic()
        if not last and now_s - self._written_s < _EVERY_S:
            return
        self._written_s, elapsed_s = now_s, now_s - self._began_s
        device_s = elapsed_s * self._num_devices if self.device_s is None else self.device_s
        line = self._about | {"elapsed_s": round(elapsed_s, 3), "device_s": round(device_s, 3)}
        with naming(self._path), open(self._path, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")


def device_name(run: RunConfig) -> str:
    """The GPU's name, or the processor's architecture and the number of torch's threads."""
    if run.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(run.device if ":" in run.device else None)
    threads = torch.get_num_threads()
    return f"CPU {platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"
