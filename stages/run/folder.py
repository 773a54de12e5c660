"""A run's folder: resolved recipe and versions first, then metrics as JSON lines and TensorBoard scalars."""

import json
import platform
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from tinymim.configs.load import dump_recipe, recipe_digest
from tinymim.configs.schema import RunRecipe
from tinymim.pipeline.decode import environment
from tinymim.stages.run.sessions import Session
from tinymim.storage.atomic import write_bytes_atomic, write_json_atomic

AUDIT_NAME = "audit.jsonl"


class RunFolder:
    """Open a run folder for one recipe: writes `recipe.yaml` and `versions.json` before anything else.

    Metrics of steps at or after `first_step` are dropped first, and audits of more steps than that, so that a resumed
    run's log has each step once. With None nothing is dropped: several processes may then log into one folder.
    What the run takes is written down in `session`, by `devices` devices for this model.
    """

    def __init__(self, recipe: RunRecipe, first_step: int | None = 0, devices: float = 1.0) -> None:
        self.path: Path = recipe.run.folder
        write_provenance(recipe)
        self.session = Session(recipe, devices, anew=first_step == 0)
        metrics = self.path / "metrics.jsonl"
        if first_step is not None:
            _drop_from(metrics, first_step)
            _drop_from(self.path / AUDIT_NAME, first_step + 1 if first_step else 0)  # what step 0 was may have changed
        self._metrics = open(metrics, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=first_step or None)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.session.tick(last=True)
        self._metrics.close()
        self._board.close()

    def log(self, step: int, **values: float) -> None:
        """Append one line {"step": step, ...} and the same scalars to TensorBoard."""
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        self.session.tick()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)


def write_provenance(recipe: RunRecipe) -> None:
    """Make the run folder and write into it the resolved recipe, and what makes its results."""
    folder: Path = recipe.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(folder / "recipe.yaml", dump_recipe(recipe).encode())
    write_json_atomic(folder / "versions.json", provenance(recipe))


def _drop_from(lines: Path, first_step: int) -> None:
    if not lines.exists():
        return
    kept = [line for line in lines.read_text().splitlines(keepends=True) if _step_of(line) < first_step]
    write_bytes_atomic(lines, "".join(kept).encode())


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # a line cut short by a kill


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The metric lines of a run, oldest first."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def provenance(recipe: RunRecipe) -> dict[str, Any]:
    """What made an artefact: recipe digest, libraries, Python and hardware."""
    return {
        "recipe_digest": recipe_digest(recipe),
        "stage": recipe.stage,
        "libraries": environment(),
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


EVALUATION_NAME = "evaluation.json"


STUDENT_NAME = "student.safetensors"


ENCODER_NAME = "encoder.safetensors"
