"""The folder of a run: resolved recipe and versions first, then metrics as JSON lines and TensorBoard scalars."""

import contextlib
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from tinymim.configs.errors import first_line, naming
from tinymim.configs.load import dump_recipe, recipe_digest
from tinymim.configs.schema.recipes import RunRecipe
from tinymim.pipeline.decode import environment
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.run.loggers import close_all, log_to, open_loggers
from tinymim.stages.run.progress import Phase, ProgressFiles
from tinymim.stages.run.sessions import Session, device_name
from tinymim.storage.atomic import write_bytes_atomic, write_json_atomic

# ---- file names

RECIPE_NAME = "recipe.yaml"
VERSIONS_NAME = "versions.json"
METRICS_NAME = "metrics.jsonl"
AUDIT_NAME = "audit.jsonl"  # of train-student: its student audits
SESSIONS_NAME = "sessions.jsonl"
LOG_NAME = "log.txt"  # messages, with times
STATUS_NAME = "status.json"  # the status of the process that wrote last

# Weights; each of these files has a folder of its name without the suffix beside it, for timm.
STUDENT_NAME = "student.safetensors"  # train-student
STUDENT_EMA_NAME = "student-ema.safetensors"
TRAINED_NAME = "trained.json"
PROJECTOR_NAME = "projector.safetensors"  # in the folders of the student and its average, where it is kept
ENCODER_NAME = "encoder.safetensors"  # pretrain-mae
ENCODER_EMA_NAME = "encoder-ema.safetensors"
LAST_NAME = "last.safetensors"  # finetune
LAST_EMA_NAME = "last-ema.safetensors"
BEST_NAME = "best.safetensors"
FINETUNED_NAME = "finetuned.json"
EVALUATION_NAME = "evaluation.json"  # evaluate
FIDELITY_NAME = "fidelity.json"  # fidelity
FRONTIER_NAME = "frontier.png"


class RunFolder:
    """An open run folder; `recipe.yaml` and `versions.json` are written before anything else.

    Args:
        recipe: the recipe of the run.
        first_step: number of steps done before. Metrics of later steps and audits after more steps are dropped, so
            that a resumed run logs each step once. None drops nothing: several processes may log into one folder.
        devices: number of devices that work for this model, for the session's device seconds.
    """

    def __init__(self, recipe: RunRecipe, first_step: int | None = 0, devices: float = 1.0) -> None:
        self.path: Path = recipe.run.folder
        write_provenance(recipe)
        self._loggers = open_loggers(recipe, first_step)
        self.session = Session(self.path / SESSIONS_NAME, device_name(recipe.run), devices, first_step == 0)
        metrics = self.path / METRICS_NAME
        if first_step is not None:
            _drop_from(metrics, first_step)
            # A resumed run has done the audit of its first step. A run from scratch may start from other weights.
            _drop_from(self.path / AUDIT_NAME, first_step + 1 if first_step else 0)
        self._metrics = open(metrics, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self._progress = ProgressFiles(self.path / LOG_NAME, self.path / STATUS_NAME)

    def __enter__(self) -> "RunFolder":
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with naming(self.path), contextlib.ExitStack() as last:  # in reverse order, each although another fails
            last.callback(close_all, self._loggers, error is not None)
            last.callback(self._metrics.close)
            last.callback(self.session.tick, last=True)
            last.callback(self._progress.__exit__, kind, error, trace)
            last.callback(self._progress.end, *_outcome(error))

    def log(self, step: int, **values: float) -> None:
        """Append a line {"step": step, ...} to the metrics, and the same scalars to the recipe's loggers."""
        with naming(self.path / METRICS_NAME):
            self._metrics.write(json.dumps({"step": step, **values}) + "\n")
            self._metrics.flush()
        self.session.tick()
        log_to(self._loggers, step, values)


def _outcome(error: BaseException | None) -> tuple[Phase, str]:
    """The phase in which a run ended, and the first line of its error."""
    if error is None:
        return "done", ""
    stopped = isinstance(error, Interrupted | KeyboardInterrupt)
    return "interrupted" if stopped else "failed", first_line(error)


def write_weights(path: Path, data: bytes, config: Mapping[str, Any]) -> None:
    """Write a safetensors file, and beside it the folder of its name that timm loads as "local-dir:...".

    Args:
        path: the file, `NAME.safetensors`; the folder is `NAME`, with `model.safetensors` and `config.json`.
        data: the content of the file, from `to_safetensors`.
        config: the content of `config.json`, from `timm_config`.
    """
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    write_bytes_atomic(path, data)
    write_bytes_atomic(folder / "model.safetensors", data)
    write_json_atomic(folder / "config.json", config)


def write_provenance(recipe: RunRecipe) -> None:
    """Make the run folder; write the resolved recipe and `provenance` into it."""
    folder: Path = recipe.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(folder / RECIPE_NAME, dump_recipe(recipe).encode())
    write_json_atomic(folder / VERSIONS_NAME, provenance(recipe))


def provenance(recipe: RunRecipe) -> dict[str, Any]:
    """Recipe digest, libraries, Python and hardware, which produce the results of a run."""
    return {
        "recipe_digest": recipe_digest(recipe),
        "stage": recipe.stage,
        "libraries": environment(),
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


# ---- JSON lines


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, oldest first; empty if the file does not exist.

    Lines that hold no object are skipped: a kill can cut a line short, and the next process appends to it.
    """
    if not path.exists():
        return []
    found = map(_parsed, path.read_text(encoding="utf-8", errors="replace").split("\n"))
    return [line for line in found if line is not None]


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The metric lines of a run, oldest first."""
    return [line for line in read_lines(folder / METRICS_NAME) if _has_step(line)]


def read_audits(folder: Path) -> list[dict[str, Any]]:
    """The student audits of a run, oldest first."""
    return [line for line in read_lines(folder / AUDIT_NAME) if _has_step(line)]


def read_sessions(folder: Path) -> list[Mapping[str, Any]]:
    """The last line of every session of a run, oldest session first."""
    lines = read_lines(folder / SESSIONS_NAME)
    return list({str(line["session"]): line for line in lines if "session" in line}.values())


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _has_step(line: Mapping[str, Any]) -> bool:
    step = line.get("step")
    return isinstance(step, int | float) and 0 <= step < 2**63  # no nan either


def _drop_from(path: Path, first_step: int) -> None:
    """Remove lines of `first_step` and later steps, and unreadable lines."""
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if _has_step(line) and line["step"] < first_step]
    write_bytes_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
