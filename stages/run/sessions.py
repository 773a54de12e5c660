"""What a run has taken of a machine, `sessions.jsonl` in its folder: a line per process, and a newer one as it goes on.

A run that is stopped and continued has several sessions, and took the time of all of them, also of what was computed
and lost. Beside the metrics, because those of lost steps go.
"""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import uuid4

import torch

from tinymim.configs.schema import RunRecipe

SESSIONS_NAME = "sessions.jsonl"
_EVERY_S = 30.0  # at least, between lines; they come with lines of metrics


class Session:
    """The clock of one process.

    Args:
        recipe: of the run.
        devices: of all ranks, divided by the models that share them.
        anew: the run begins: earlier sessions are no part of it.

    Attributes:
        device_s: device seconds so far where that is not the time times `devices`: of workers elsewhere.
    """

    def __init__(self, recipe: RunRecipe, devices: float = 1.0, anew: bool = True) -> None:
        self._path: Path = recipe.run.folder / SESSIONS_NAME
        if anew:
            self._path.unlink(missing_ok=True)
        self._devices = devices
        self.device_s: float | None = None
        self._about = {"session": uuid4().hex[:8], "device": device_name(recipe)}
        self._began_s = self._written_s = monotonic()

    def tick(self, last: bool = False) -> None:
        """Write down the time, if it is due."""
        now_s = monotonic()
        if not last and now_s - self._written_s < _EVERY_S:
            return
        self._written_s, elapsed_s = now_s, now_s - self._began_s
        device_s = elapsed_s * self._devices if self.device_s is None else self.device_s
        line = self._about | {"elapsed_s": round(elapsed_s, 3), "device_s": round(device_s, 3)}
        with open(self._path, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")


def device_name(recipe: RunRecipe) -> str:
    """A GPU's name, or the processor's kind and the threads that torch uses."""
    if recipe.run.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(recipe.run.device if ":" in recipe.run.device else None)
    threads = torch.get_num_threads()
    return f"CPU {platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def read_sessions(folder: Path) -> list[Mapping[str, Any]]:
    """The last line of every session of a run folder, oldest session first; none where there is no such file."""
    found: dict[str, Mapping[str, Any]] = {}
    path = folder / SESSIONS_NAME
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            found[line["session"]] = line
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # cut short by a kill; there is an older one
    return list(found.values())
