"""Summaries of run folders for a comparison. A value that no file of the folder records is None, never a guess."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file

from tinymim.configs.errors import RecipeError, UserError, first_line
from tinymim.configs.strict_yaml import parse_yaml
from tinymim.models.checkpoints import tensors_sha256
from tinymim.stages.run.folder import (
    AUDIT_NAME,
    ENCODER_EMA_NAME,
    EVALUATION_NAME,
    FINETUNED_NAME,
    LAST_EMA_NAME,
    METRICS_NAME,
    RECIPE_NAME,
    SESSIONS_NAME,
    STUDENT_EMA_NAME,
    VERSIONS_NAME,
    read_audits,
    read_metrics,
    read_sessions,
)
from tinymim.stages.run.metrics import EMA, audit_metrics, members, metric

STAGES: Final = ("train-student", "pretrain", "pretrain-mae", "finetune", "evaluate", "cache-teacher")
_AVERAGES = (STUDENT_EMA_NAME, ENCODER_EMA_NAME, LAST_EMA_NAME)
_READ = (METRICS_NAME, AUDIT_NAME, SESSIONS_NAME, EVALUATION_NAME, FINETUNED_NAME)
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """A value after `step` steps. `epoch` is None if the length of an epoch is not recorded."""

    step: float
    epoch: float | None
    value: float


@dataclass
class RunSummary:
    """One run, or one student of a run of several.

    Attributes:
        name: a short name, unique among the compared runs.
        folder: the run folder.
        stage: the command of the run.
        recipe: the resolved recipe, as plain values.
        versions: the content of `versions.json`, flattened.
        curves: the points of each metric, by its name; names from audits begin with `audit_`.
        results: the numbers to compare, by name of the metric.
        elapsed_s, device_s: wall and device seconds of all sessions.
        sessions: number of sessions.
        devices: names of the devices.
        teacher_device_s: the run's share of the device seconds of stage one.
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
        """The teacher's part of all device seconds behind this run, 0 to 1."""
        if self.teacher_device_s is None or not self.device_s:
            return None
        return self.teacher_device_s / (self.teacher_device_s + self.device_s)

    @property
    def costs(self) -> dict[str, float | None]:
        """The cost of the run, by name of the metric."""
        device_h, teacher_h = (None if s is None else s / 3600 for s in (self.device_s, self.teacher_device_s))
        return {
            "elapsed_s": self.elapsed_s,
            "device_h": device_h,
            "teacher_h": teacher_h,
            "teacher_share": self.teacher_share,
        }


def read_runs(folders: Sequence[Path]) -> list[RunSummary]:
    """Summarise the runs in `folders`, in order. A run of several students gives one summary per student.

    Raises:
        UserError: a folder is no run folder, or its command cannot be compared.
        RecipeError: a run is named twice.
    """
    found: list[RunSummary] = []
    for folder in folders:
        recipe = _recipe_of(folder)
        students = recipe.get("students")
        for place in [folder / name for name in students] if isinstance(students, dict) else [folder]:
            recipe = _recipe_of(place)
            try:
                found.append(_read(place, recipe))
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                raise UserError(
                    f"a file of {place} holds what tinymim does not write",
                    got=first_line(error),
                    hint=f"look into {', '.join(_READ)}; without the damaged line or file the rest is compared",
                ) from error
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
        data = parse_yaml((folder / RECIPE_NAME).read_text(encoding="utf-8"), RECIPE_NAME)
    except FileNotFoundError:
        inside = sorted(path.parent.name for path in folder.glob(f"*/{RECIPE_NAME}")) if folder.is_dir() else []
        there = f"no {RECIPE_NAME}, but runs in it: {', '.join(inside[:5])}" if inside else f"no {RECIPE_NAME}"
        raise UserError(
            f"{folder} is no run folder",
            got=there if folder.is_dir() else "no such folder",
            expected=expected,
            hint="name the folder that is `run.folder` in the recipe of the run",
        ) from None
    except (OSError, UnicodeDecodeError, RecipeError) as error:
        reason = first_line(error)
        raise UserError(f"{folder} has an unreadable {RECIPE_NAME}", got=reason, expected=expected) from None
    stage = data.get("stage") if isinstance(data, dict) else None
    if stage not in STAGES:
        raise UserError(f"{folder} is no run that can be compared", got=f"stage: {stage}", expected=expected)
    return data  # type: ignore[no-any-return]  # a dictionary, see above


def _read(folder: Path, recipe: dict[str, Any]) -> RunSummary:
    versions = _json(folder / VERSIONS_NAME)
    run = RunSummary(folder.name, folder, recipe["stage"], recipe, flattened(versions))
    metrics, audits = read_metrics(folder), read_audits(folder)
    epoch_steps = _steps_per_epoch(metrics, audits)
    if run.stage in ("train-student", "pretrain", "pretrain-mae", "finetune"):
        for line in metrics:
            # A training line has its step, counted from 0; a validation line has the number of steps done.
            done = line["step"] + (0 if members("val_*", line) else 1)
            for name, value in line.items():
                if metric(name).curve == METRICS_NAME and isinstance(value, int | float):
                    epoch = done / epoch_steps if epoch_steps else None
                    run.curves.setdefault(name, []).append(Point(done, epoch, float(value)))
        for line in audits:
            for name in (found := audit_metrics(line)):
                if metric(name).curve:
                    run.curves.setdefault(name, []).append(
                        Point(line["step"], _float(line.get("epoch")), float(found[name]))
                    )
        if audits:
            run.results["alarms"] = sum(len(line.get("alarms", ())) for line in audits)
    _read_results(run, metrics)
    sessions = read_sessions(folder)
    if sessions:
        run.elapsed_s = sum(float(session["elapsed_s"]) for session in sessions)
        run.device_s = sum(float(session["device_s"]) for session in sessions)
        run.sessions, run.devices = len(sessions), list(dict.fromkeys(str(session["device"]) for session in sessions))
    return run


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _steps_per_epoch(metrics: Sequence[Line], audits: Sequence[Line]) -> float | None:
    """The number of steps in an epoch, from the first line with an epoch."""
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
    if shares := run.curves.get("computed_share"):
        # A line has the share of the views since the line before.
        steps = [point.step for point in shares]
        pairs = zip(shares, [0.0, *steps], strict=False)
        computed_steps = sum(point.value * (point.step - before) for point, before in pairs)
        run.results["computed_views"] = computed_steps * run.recipe["optim"]["batch_size"]
        run.results["computed_share"] = computed_steps / steps[-1]
    evaluation = _json(run.folder / EVALUATION_NAME)
    run.results |= {name: value for name, value in evaluation.items() if isinstance(value, float)}  # counts are whole
    for name, entry in _json(run.folder / FINETUNED_NAME).get("weights", {}).items():
        kind = name.removesuffix(".safetensors")
        run.results |= {f"finetuned_{kind}_{key}": float(entry[key]) for key in ("top1", "top5") if key in entry}


def _give_evaluations(runs: Sequence[RunSummary]) -> None:
    """Copy the results of an evaluation to the run that wrote the evaluated weights, if it still holds them."""
    by_folder = {run.folder.resolve(): run for run in runs}
    for run in runs:
        path = Path(str(run.recipe.get("weights")))
        author = by_folder.get(path.resolve().parent)
        if run.stage != "evaluate" or author is None or path.suffix != ".safetensors" or not path.exists():
            continue
        if tensors_sha256(load_file(path)) == _json(run.folder / EVALUATION_NAME).get("weights_sha256"):
            mark = EMA if path.name in _AVERAGES else ""
            author.results |= {mark + name: value for name, value in run.results.items()}


def _share_stage_one(runs: Sequence[RunSummary]) -> None:
    """Divide the device seconds of making a cache equally among the students that read it."""
    students = [run for run in runs if run.stage == "train-student"]
    for teacher in [run for run in runs if run.stage == "cache-teacher" and run.device_s is not None]:
        readers = [run for run in students if _makes(teacher.recipe, str(run.recipe["cache"]))]
        for run in readers:
            run.teacher_device_s = (teacher.device_s or 0.0) / len(readers)


def _makes(recipe: Mapping[str, Any], cache: str) -> bool:
    """Whether a cache-teacher recipe makes the `cache` of a student."""
    if recipe.get("cache") is not None:
        return _place(cache) == _place(str(recipe["cache"]))
    root = _place(str(recipe["cache_root"]))
    return _place(cache) == root or _place(cache).rpartition("/")[0] == root


def _place(text: str) -> str:
    return text if "://" in text else str(Path(text).resolve())


# ---------------------------------------------------------------- recipes


def differences(runs: Sequence[RunSummary]) -> dict[str, dict[str, Any]]:
    """Fields that differ between the runs: by dotted name, the value of each run that has the field.

    These are fields of recipes, without `run.folder`, and of `versions.json`, under `versions.`.
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
    """The values of nested dictionaries, by dotted name. Lists stay whole."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


# ---------------------------------------------------------------- files


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that distinguish each from the others."""
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
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
