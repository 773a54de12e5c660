"""What a run folder says of its run, for a comparison: what is not on record is None, and nothing is made up."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml
from safetensors.torch import load_file

from tinymim.configs.errors import RecipeError, UserError
from tinymim.models.checkpoints import tensors_sha256
from tinymim.stages.run.folder import (
    ENCODER_EMA_NAME,
    EVALUATION_NAME,
    FINETUNED_NAME,
    LAST_EMA_NAME,
    METRICS_NAME,
    RECIPE_NAME,
    STUDENT_EMA_NAME,
    VERSIONS_NAME,
    read_audits,
    read_metrics,
    read_sessions,
)
from tinymim.stages.run.metrics import EMA, audit_metrics, members, metric

STAGES: Final = ("train-student", "pretrain-mae", "finetune", "evaluate", "cache-teacher")
_AVERAGES = (STUDENT_EMA_NAME, ENCODER_EMA_NAME, LAST_EMA_NAME)
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """A value after so many steps; `epoch` None: nobody wrote down how long an epoch is."""

    step: float
    epoch: float | None
    value: float


@dataclass
class RunSummary:
    """One run, or one student of a run of several.

    Attributes:
        name: short, and no other run's.
        folder: its run folder.
        stage: its command.
        recipe: as resolved, plain values.
        versions: what `versions.json` holds, flattened.
        curves: by name of a metric; those of audits begin with `audit_`.
        results: numbers to compare, by name of a metric.
        elapsed_s, device_s: of all its sessions.
        sessions: how many these were.
        devices: their names.
        teacher_device_s: its share of stage one's device seconds.
    """

    name: str
    folder: Path
    stage: str
    recipe: dict[str, Any]
    versions: dict[str, Any]
    curves: dict[str, list[Point]] = field(default_factory=dict)
    results: dict[str, float] = field(default_factory=dict)
    elapsed_s: float | None = None
    device_s: float | None = None
    sessions: int = 0
    devices: list[str] = field(default_factory=list)
    teacher_device_s: float | None = None

    @property
    def teacher_share(self) -> float | None:
        """Of all device seconds behind this run, the part that was the teacher's, 0 to 1."""
        if self.teacher_device_s is None or not self.device_s:
            return None
        return self.teacher_device_s / (self.teacher_device_s + self.device_s)

    @property
    def costs(self) -> dict[str, float | None]:
        """What the run took, by name of a metric."""
        device_h, teacher_h = (None if s is None else s / 3600 for s in (self.device_s, self.teacher_device_s))
        return {
            "elapsed_s": self.elapsed_s,
            "device_h": device_h,
            "teacher_h": teacher_h,
            "teacher_share": self.teacher_share,
        }


def read_runs(folders: Sequence[Path]) -> list[RunSummary]:
    """The runs of some folders, in their order; of a run of several students each of them.

    Raises:
        UserError: one is no run folder, or of a command whose runs are not compared.
        RecipeError: one is named twice.
    """
    found: list[RunSummary] = []
    for folder in folders:
        recipe = _recipe_of(folder)
        students = recipe.get("students")
        for place in [folder / name for name in students] if isinstance(students, dict) else [folder]:
            found.append(_read(place, _recipe_of(place)))
    places = [run.folder.resolve() for run in found]
    if twice := [run.folder for run, place in zip(found, places, strict=True) if places.count(place) > 1]:
        raise RecipeError("a run is named twice", got=str(twice[0]), expected="every run once")
    for run, name in zip(found, _short_names([run.folder for run in found]), strict=True):
        run.name = name
    _give_evaluations(found)
    _share_stage_one(found)
    return found


def _recipe_of(folder: Path) -> dict[str, Any]:
    expected = f"a folder with the {RECIPE_NAME} that {', '.join(STAGES[:-1])} or {STAGES[-1]} wrote"
    try:
        data = yaml.safe_load((folder / RECIPE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = sorted(path.parent.name for path in folder.glob(f"*/{RECIPE_NAME}")) if folder.is_dir() else []
        there = f"no {RECIPE_NAME}, but runs in it: {', '.join(inside[:5])}" if inside else f"no {RECIPE_NAME}"
        raise UserError(
            f"{folder} is no run folder",
            got=there if folder.is_dir() else "no such folder",
            expected=expected,
            hint="name what is `run.folder` in the recipe of a run",
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} has an unreadable {RECIPE_NAME}", got=reason, expected=expected) from None
    stage = data.get("stage") if isinstance(data, dict) else None
    if stage not in STAGES:
        raise UserError(f"{folder} is of no run that can be compared", got=f"stage: {stage}", expected=expected)
    return data  # type: ignore[no-any-return]  # a dictionary, see above


def _read(folder: Path, recipe: dict[str, Any]) -> RunSummary:
    versions = _json(folder / VERSIONS_NAME)
    run = RunSummary(folder.name, folder, recipe["stage"], recipe, flattened(versions))
    metrics, audits = read_metrics(folder), read_audits(folder)
    epoch_steps = _steps_per_epoch(metrics, audits)
    if run.stage in ("train-student", "pretrain-mae", "finetune"):
        for line in metrics:
            # A line is of its step, counted from 0; a validation's of the steps that were done.
            done = line["step"] + (0 if members("val_*", line) else 1)
            for name, value in line.items():
                if metric(name).curve == METRICS_NAME and isinstance(value, int | float):
                    epoch = done / epoch_steps if epoch_steps else None
                    run.curves.setdefault(name, []).append(Point(done, epoch, value))
        for line in audits:
            for name in (found := audit_metrics(line)):
                if metric(name).curve:
                    run.curves.setdefault(name, []).append(Point(line["step"], line.get("epoch"), found[name]))
        if audits:
            run.results["alarms"] = sum(len(line.get("alarms", ())) for line in audits)
    _read_results(run, metrics)
    sessions = read_sessions(folder)
    if sessions:
        run.elapsed_s = sum(session["elapsed_s"] for session in sessions)
        run.device_s = sum(session["device_s"] for session in sessions)
        run.sessions, run.devices = len(sessions), list(dict.fromkeys(session["device"] for session in sessions))
    return run


def _steps_per_epoch(metrics: Sequence[Line], audits: Sequence[Line]) -> float | None:
    """From the first line that has an epoch."""
    for line in metrics:
        if line.get("epoch") and "loss" in line:
            return float((line["step"] + 1) / line["epoch"])
    for line in audits:
        if line.get("epoch"):
            return float(line["step"] / line["epoch"])
    return None


def _read_results(run: RunSummary, metrics: Sequence[Line]) -> None:
    run.results |= {name: points[-1].value for name, points in run.curves.items() if points}
    if steps := [point.step for points in run.curves.values() for point in points]:
        run.results["steps"] = max(steps)
    if epochs := [point.epoch for points in run.curves.values() for point in points if point.epoch is not None]:
        run.results["epochs"] = max(epochs)
    evaluation = _json(run.folder / EVALUATION_NAME)
    run.results |= {name: value for name, value in evaluation.items() if isinstance(value, float)}  # counts are whole
    for name, entry in _json(run.folder / FINETUNED_NAME).get("weights", {}).items():
        kind = name.removesuffix(".safetensors")
        run.results |= {f"finetuned_{kind}_{key}": entry[key] for key in ("top1", "top5") if key in entry}


def _give_evaluations(runs: Sequence[RunSummary]) -> None:
    """Of an evaluation whose weights a run of these has written, and holds, the run gets the accuracies, too."""
    by_folder = {run.folder.resolve(): run for run in runs}
    for run in runs:
        path = Path(str(run.recipe.get("weights")))
        of = by_folder.get(path.resolve().parent)
        if run.stage != "evaluate" or of is None or path.suffix != ".safetensors" or not path.exists():
            continue
        if tensors_sha256(load_file(path)) == _json(run.folder / EVALUATION_NAME).get("weights_sha256"):
            mark = EMA if path.name in _AVERAGES else ""
            of.results |= {mark + name: value for name, value in run.results.items()}


def _share_stage_one(runs: Sequence[RunSummary]) -> None:
    """Of the device seconds of a cache's making, every student here that read the cache carries the same part."""
    for made in [run for run in runs if run.stage == "cache-teacher" and run.device_s is not None]:
        readers = [
            run for run in runs if run.stage == "train-student" and _is_of(str(run.recipe["cache"]), made.recipe)
        ]
        for run in readers:
            run.teacher_device_s = (made.device_s or 0.0) / len(readers)


def _is_of(cache: str, made: Mapping[str, Any]) -> bool:
    """Whether a student's `cache` is what a cache-teacher recipe makes."""
    if made.get("cache") is not None:
        return _place(cache) == _place(str(made["cache"]))
    root = _place(str(made["cache_root"]))
    return _place(cache) == root or _place(cache).rpartition("/")[0] == root


def _place(text: str) -> str:
    return text if "://" in text else str(Path(text).resolve())


# ---------------------------------------------------------------- recipes


def differences(runs: Sequence[RunSummary]) -> dict[str, dict[str, Any]]:
    """By dotted field that is not the same in all runs, the values by run; a run without such a field is left out.

    Fields of recipes, of which `run.folder` differs anyway, and under `versions.` those of libraries and hardware.
    """
    flat = {
        run.name: {name: value for name, value in flattened(run.recipe).items() if name != "run.folder"}
        | {f"versions.{name}": value for name, value in run.versions.items() if name not in ("recipe_digest", "stage")}
        for run in runs
    }
    found = {}
    for field_name in dict.fromkeys(name for each in flat.values() for name in each):
        values = {run: each[field_name] for run, each in flat.items() if field_name in each}
        first = next(iter(values.values()))
        if len(values) < len(runs) or any(value != first for value in values.values()):
            found[field_name] = values
    return found


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries by dotted name; lists stay whole."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


# ---------------------------------------------------------------- files


def _short_names(folders: Sequence[Path]) -> list[str]:
    """As many of the last parts of every path as tell it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for own in parts:
        count = 1
        while sum(each[-count:] == own[-count:] for each in parts) > 1 and count < len(own):
            count += 1
        names.append("/".join(own[-count:]))
    return names


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return data if isinstance(data, dict) else {}
