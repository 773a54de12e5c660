"""`tinymim compare`: several runs side by side, as a table, as JSON and as one page of HTML."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinymim.configs.errors import UserError
from tinymim.stages.pages.compare import page
from tinymim.stages.pages.summary import RunSummary, differences, read_runs
from tinymim.stages.pages.tables import plain_table
from tinymim.stages.run.progress import say
from tinymim.storage.atomic import write_bytes_atomic

MISSING = "-"
# Columns of results, in their order: name of the metric, header. Those that no run has are left out.
_RESULTS = {
    "steps": "steps",
    "epochs": "epochs",
    "loss": "loss",
    "kl_qk": "KL qk",
    "kl_vv": "KL vv",
    "kl_qq": "KL qq",
    "kl_kk": "KL kk",
    "audit_kl_qk": "audit KL qk",
    "audit_kl_vv": "audit KL vv",
    "audit_kl_qq": "audit KL qq",
    "audit_kl_kk": "audit KL kk",
    "alarms": "alarms",
    "audit_knn_top1": "audit k-NN",
    "knn_top1": "k-NN",
    "linear_top1": "linear",
    "finetuned_best_top1": "best top-1",
    "finetuned_last_top1": "last top-1",
}


def run(folders: Sequence[Path], out: Path) -> list[RunSummary]:
    """Read the runs and write the page `out`.

    Raises:
        UserError: a folder is no run's, or the page cannot be written.
        RecipeError: a run is named twice.
    """
    runs = read_runs(folders)
    if out.is_dir():
        raise UserError("the page cannot be written", got=f"--out {out}, a folder", expected="a file")
    html = page(runs, table_cells(runs), difference_cells(runs))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(out, html.encode())
    say(f"compare: wrote {out}")
    return runs


def as_json(runs: Sequence[RunSummary]) -> dict[str, Any]:
    """All that the page shows, and every point of the curves."""
    return {
        "runs": [
            asdict(each)
            | {"folder": str(each.folder), "teacher_share": each.teacher_share}
            | {"curves": {name: [asdict(point) for point in points] for name, points in each.curves.items()}}
            for each in runs
        ],
        "differences": {stage: differences(same) for stage, same in by_stage(runs).items() if len(same) > 1},
    }


def as_text(runs: Sequence[RunSummary]) -> str:
    """The table, and below it what differs in the recipes."""
    cells = table_cells(runs)
    lines = [plain_table(cells, range(2, len(cells[0])))]
    for stage, table in difference_cells(runs).items():
        lines += ["", f"what differs in {stage}", plain_table(table, ())]
    return "\n".join(lines)


# ---- cells


def table_cells(runs: Sequence[RunSummary]) -> list[list[str]]:
    """Header and one row per run."""
    columns: dict[str, list[str]] = {"run": [each.name for each in runs], "stage": [each.stage for each in runs]}
    for name, header in _RESULTS.items():
        values = [each.results.get(name) for each in runs]
        if any(value is not None for value in values):
            columns[header] = [_number(name, value) for value in values]
    columns |= {
        "seconds": [_rounded(each.elapsed_s) for each in runs],
        "device-h": [_hours(each.device_s) for each in runs],
        "teacher-h": [_hours(each.teacher_device_s) for each in runs],
        "teacher share": [MISSING if each.teacher_share is None else f"{each.teacher_share:.0%}" for each in runs],
    }
    return [list(columns), *map(list, zip(*columns.values(), strict=True))]


def by_stage(runs: Sequence[RunSummary]) -> dict[str, list[RunSummary]]:
    """Runs of one command together, in their order."""
    found: dict[str, list[RunSummary]] = {}
    for each in runs:
        found.setdefault(each.stage, []).append(each)
    return found


def difference_cells(runs: Sequence[RunSummary]) -> dict[str, list[list[str]]]:
    """By stage of which there are several runs: a header and a row per field that differs; none where nothing does."""
    tables = {}
    for stage, same in by_stage(runs).items():
        names = [each.name for each in same]
        rows = [
            [field, *(_plain(values[name]) if name in values else MISSING for name in names)]
            for field, values in differences(same).items()
        ]
        if rows:
            tables[stage] = [["field", *names], *rows]
    return tables


def _plain(value: object) -> str:
    return "null" if value is None else str(value)


def _number(name: str, value: float | None) -> str:
    if value is None:
        return MISSING
    if name.endswith("_top1"):
        return f"{value:.1%}"
    if name in ("steps", "alarms"):
        return f"{value:,.0f}"
    return f"{value:.1f}" if name == "epochs" else f"{value:.4f}"


def _rounded(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{seconds:,.0f}"


def _hours(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{seconds / 3600:,.3f}"
