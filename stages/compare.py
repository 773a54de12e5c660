"""`tinymim compare`: compare several runs as a table, as JSON and as an HTML page."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinymim.configs.errors import UserError
from tinymim.stages.pages.compare import page
from tinymim.stages.pages.numbers import field_value
from tinymim.stages.pages.summary import RunSummary, differences, read_runs
from tinymim.stages.pages.tables import plain_table
from tinymim.stages.run.metrics import MISSING, formatted, in_order, metric
from tinymim.stages.run.progress import logger
from tinymim.storage.atomic import write_bytes_atomic


def run(folders: Sequence[str | Path], out: str | Path) -> list[RunSummary]:
    """Compare runs on one self-contained HTML page: losses, accuracies, cost, recipe differences.

    Args:
        folders: run folders of train-student, pretrain-mae, finetune, evaluate and cache-teacher.
        out: the page to write.

    Returns:
        The runs in the same order; a run of several students gives one for each of them.

    Raises:
        UserError: a folder is no run folder, or the page cannot be written.
        RecipeError: a run is named twice.
    """
    out, runs = Path(out), read_runs([Path(folder) for folder in folders])
    if out.is_dir():
        raise UserError("the page cannot be written", got=f"--out {out}, a folder", expected="a file")
    html = page(runs, table_cells(runs), difference_cells(runs))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(out, html.encode())
    logger.info(f"compare: wrote {out}")
    return runs


def as_json(runs: Sequence[RunSummary]) -> dict[str, Any]:
    """The content of the page as JSON values, with all points of the curves and the direction of each metric."""
    return {
        "metrics": {
            name: {"header": metric(name).header, "better": metric(name).better}
            for name in in_order(name for run in runs for name in run.results)
        },
        "runs": [
            asdict(each)
            | {"folder": str(each.folder), "teacher_share": each.teacher_share}
            | {"curves": {name: [asdict(point) for point in points] for name, points in each.curves.items()}}
            for each in runs
        ],
        "differences": {stage: differences(same) for stage, same in by_stage(runs).items() if len(same) > 1},
    }


def as_text(runs: Sequence[RunSummary]) -> str:
    """The table of runs, and below it the fields that differ."""
    cells = table_cells(runs)
    lines = [plain_table(cells, range(2, len(cells[0])))]
    for stage, table in difference_cells(runs).items():
        lines += ["", f"what differs in {stage}", plain_table(table, ())]
    return "\n".join(lines)


# ---- cells


def table_cells(runs: Sequence[RunSummary]) -> list[list[str]]:
    """The header and one row per run."""
    values: list[dict[str, float | None]] = [{**run.results, **run.costs} for run in runs]
    names = [name for name in in_order(name for each in values for name in each) if metric(name).column]
    rows = [
        [run.name, run.stage, *(formatted(name, own.get(name)) for name in names)]
        for run, own in zip(runs, values, strict=True)
    ]
    return [["run", "stage", *(metric(name).header for name in names)], *rows]


def by_stage(runs: Sequence[RunSummary]) -> dict[str, list[RunSummary]]:
    """The runs of each command, in order."""
    found: dict[str, list[RunSummary]] = {}
    for each in runs:
        found.setdefault(each.stage, []).append(each)
    return found


def difference_cells(runs: Sequence[RunSummary]) -> dict[str, list[list[str]]]:
    """For each stage whose runs differ: a header and one row per field that differs."""
    tables = {}
    for stage, same in by_stage(runs).items():
        names = [each.name for each in same]
        rows = [
            [field, *(field_value(values[name]) if name in values else MISSING for name in names)]
            for field, values in differences(same).items()
        ]
        if rows:
            tables[stage] = [["field", *names], *rows]
    return tables
