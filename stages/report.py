"""The demo's report: one HTML file that needs nothing else, and the table for the terminal. It only shows, never measures."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Rectangle

from tinymim.storage.atomic import write_bytes_atomic

REPORT_NAME = "report.html"
RELATIONS_NAME = "relations.png"
_INK, _FAINT = "#1f2430", "#8a90a0"
_COLOURS = ("#3b6fb6", "#d1793b", "#4d9a6a", "#9a5ea8")
_RELATION_TITLES = {"qk": "query-key: what this patch looks for", "vv": "value-value: what is like this patch"}


@dataclass(frozen=True)
class Arm:
    """One line of the table."""

    model: str
    parameters: int
    how_trained: str
    steps: int | None  # None: not known, 0: none
    teacher_passes: str
    knn_top1: float  # share of the validation images
    linear_top1: float


@dataclass(frozen=True)
class Example:
    """One query patch of one cached view, as teacher, cache and students see it.

    Attributes:
        key: the image's key.
        pixels: uint8 [S, S, 3].
        head: counted from 1.
        query: (row, column) on the patch grid.
        maps: relation -> who says so -> probabilities of the patches, float [rows, columns].
    """

    key: str
    pixels: npt.NDArray[np.uint8]
    head: int
    query: tuple[int, int]
    maps: Mapping[str, Mapping[str, npt.NDArray[np.floating[Any]]]]


@dataclass(frozen=True)
class Report:
    """All that the page shows, in its order."""

    arms: Sequence[Arm]
    lesson: str  # one paragraph: what was done
    teacher: str  # what the teacher is
    caveat: str  # how much the numbers of the table can be trusted
    student_curves: Mapping[str, Sequence[Mapping[str, float]]]  # student -> metric lines with kl_*
    mae_curves: Mapping[str, Sequence[Mapping[str, float]]]  # student -> metric lines with loss
    examples: Sequence[Example]
    bytes_per_view: Mapping[str, float]  # component -> bytes on disk
    dense_bytes: int  # of one view in fp16
    provenance: Mapping[str, str]


def write_report(report: Report, folder: Path) -> Path:
    """Write `report.html` and `relations.png` into `folder`; returns the path of the page."""
    relations = png(relations_figure(report.examples))
    write_bytes_atomic(folder / RELATIONS_NAME, relations)
    path = folder / REPORT_NAME
    write_bytes_atomic(path, page(report, relations, png(curves_figure(report))).encode())
    return path


# ---- the table


def table_cells(arms: Sequence[Arm]) -> list[list[str]]:
    """Header and one row per arm, as text in ASCII."""
    header = ["model", "parameters", "how trained", "steps", "teacher passes", "k-NN top-1", "linear top-1"]
    assert len(header) == len(fields(Arm))
    return [header] + [
        [
            arm.model,
            f"{arm.parameters:,}",
            arm.how_trained,
            "?" if arm.steps is None else f"{arm.steps:,}",
            arm.teacher_passes,
            f"{arm.knn_top1:.1%}",
            f"{arm.linear_top1:.1%}",
        ]
        for arm in arms
    ]


_NUMBERS = frozenset({1, 3, 5, 6})  # columns that align to the right


def text_table(arms: Sequence[Arm]) -> str:
    """The table for a terminal: plain ASCII, so that it survives every encoding, pipe and width."""
    cells = table_cells(arms)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if column in _NUMBERS else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])


def _html_table(rows: Sequence[Sequence[str]], numbers: frozenset[int], strong: frozenset[int] = frozenset()) -> str:
    """The first row is the header; `strong` rows are set off, counted without it."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class="n"' if i in numbers else ''}>{html.escape(cell)}</{tag}>" for i, cell in enumerate(row)
        )

    head, *body = rows
    lines = [f"<tr{' class="s"' if i in strong else ''}>{cells(row, 'td')}</tr>" for i, row in enumerate(body)]
    return f'<div class="wide"><table><thead><tr>{cells(head, "th")}</tr></thead>\n<tbody>{"\n".join(lines)}</tbody></table></div>'
