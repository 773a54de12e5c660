"""The demo's report: the self-contained HTML page, its pictures, and the table for the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Rectangle

from tinymim.stages.pages.look import COLOURS, DASHES, FAINT, INK, document, dress, html_figure, log_scale, png, prose
from tinymim.stages.pages.tables import html_table, plain_table
from tinymim.stages.run.metrics import formatted, members, metric
from tinymim.storage.atomic import write_bytes_atomic
from tinymim.targets.relations.picture import TITLES

REPORT_NAME = "report.html"
RELATIONS_NAME = "relations.png"
SKETCH = "in the cache"  # its maps have a colour scale of their own


@dataclass(frozen=True)
class Arm:
    """One line of the table."""

    model: str
    parameters: int
    how_trained: str
    steps: int | None  # None: unknown, 0: untrained
    teacher_passes: str
    knn_top1: float  # share of the validation images
    linear_top1: float


@dataclass(frozen=True)
class Example:
    """One query patch of one cached view, with its relation rows in the teacher, the cache and the students.

    Attributes:
        key: the key of the image.
        pixels: the view, uint8 [S, S, 3].
        head: the relation head, counted from 1.
        query: (row, column) of the patch on the grid.
        maps: relation -> column title -> probabilities of the patches, float [rows, columns]; the teacher comes first.
    """

    key: str
    pixels: npt.NDArray[np.uint8]
    head: int
    query: tuple[int, int]
    maps: Mapping[str, Mapping[str, npt.NDArray[np.floating[Any]]]]


@dataclass(frozen=True)
class Report:
    """The content of the page, in its order."""

    arms: Sequence[Arm]
    lesson: str  # one paragraph about the experiment
    teacher: str  # one sentence about the teacher
    caveat: str  # how the table was measured, and its standard error
    student_curves: Mapping[str, Sequence[Mapping[str, float]]]  # student -> metric lines with kl_*
    mae_curves: Mapping[str, Sequence[Mapping[str, float]]]  # student -> metric lines with loss
    examples: Sequence[Example]
    bytes_per_view: Mapping[str, float]  # component of `cache info` -> bytes on disk
    dense_bytes: int  # dense maps of one view in fp16
    head_k: int  # number of largest entries of a row that the codec stores
    tail_k: int  # number of draws from the rest of the row
    provenance: Mapping[str, str]


def write_report(report: Report, folder: Path) -> Path:
    """Write `report.html` and `relations.png` into `folder`. Returns the path of the page."""
    relations = png(relations_figure(report.examples))
    write_bytes_atomic(folder / RELATIONS_NAME, relations)
    path = folder / REPORT_NAME
    write_bytes_atomic(path, page(report, relations, png(curves_figure(report))).encode())
    return path


# ---- the table


def table_cells(arms: Sequence[Arm]) -> list[list[str]]:
    """The header and one row per arm, as ASCII text."""
    header = ["model", "parameters", "how trained", "steps", "teacher passes"]
    header += [f"{metric(name).header} top-1" for name in ("knn_top1", "linear_top1")]
    assert len(header) == len(fields(Arm))
    return [header] + [
        [
            arm.model,
            f"{arm.parameters:,}",
            arm.how_trained,
            "?" if arm.steps is None else f"{arm.steps:,}",
            arm.teacher_passes,
            formatted("knn_top1", arm.knn_top1),
            formatted("linear_top1", arm.linear_top1),
        ]
        for arm in arms
    ]


_NUMBERS = frozenset({1, 3, 5, 6})  # columns aligned right


def text_table(arms: Sequence[Arm]) -> str:
    """The table for a terminal, in plain ASCII for every encoding and pipe."""
    return plain_table(table_cells(arms), _NUMBERS)


# ---- the pictures


def curves_figure(report: Report) -> Figure:
    """Plot the students' KL per relation on the left and the masked autoencoders' loss on the right."""
    figure = Figure(figsize=(9.6, 3.6), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.08})
    for colour, (name, lines) in zip(COLOURS, report.student_curves.items(), strict=False):
        by_relation = members("kl_*", lines[0] if lines else ())
        for style, (loss, relation) in zip(DASHES, by_relation.items(), strict=False):
            values = [line[loss] for line in lines]
            left.plot([line["step"] for line in lines], values, style, color=colour, label=f"{name}, {relation}")
    log_scale(left)
    dress(left, "distilled from the cache: KL to the sketches", "nats per row")
    for colour, style, (name, lines) in zip(COLOURS, DASHES, report.mae_curves.items(), strict=False):
        right.plot([line["step"] for line in lines], [line["loss"] for line in lines], style, color=colour, label=name)
    dress(right, "the same networks as masked autoencoders", "squared error of masked patches")
    return figure


def relations_figure(examples: Sequence[Example]) -> Figure:
    """Draw one line per example: the view, then for each relation the row of the teacher, the cache and the students.

    Within one relation of one example the exact rows share the teacher's colour scale. The sketch has its own, because
    it consists of a few draws of equal weight.
    """
    relations = list(examples[0].maps) if examples else []
    columns = [len(examples[0].maps[relation]) for relation in relations]
    # The view and the maps, with a narrow empty column before each relation.
    widths = [1.0] + [width for count in columns for width in (0.14, *[1.0] * count)]
    height_in = 1.22 * len(examples) + 0.62
    figure = Figure(figsize=(1.22 * sum(widths) + 0.1, height_in), dpi=130)
    grid = GridSpec(
        max(1, len(examples)),
        len(widths),
        figure,
        left=0.02,
        right=0.995,
        bottom=0.06 / height_in,
        top=1 - 0.56 / height_in,
        wspace=0.07,
        hspace=0.07,
        width_ratios=widths,
    )
    for line, example in enumerate(examples):
        _draw_view(figure.add_subplot(grid[line, 0]), example, line == 0)
        place = 1
        for relation in relations:
            place += 1
            maps = example.maps[relation]
            exact = next(iter(maps.values()))  # the teacher comes first
            for number, (column_title, values) in enumerate(maps.items()):
                axes = figure.add_subplot(grid[line, place])
                own_scale = column_title == SKETCH
                _heatmap(axes, values, values if own_scale else exact, example.query, 0.0 if own_scale else None)
                if line == 0:
                    axes.set_title(column_title, fontsize=8.5, color=INK, pad=3)
                if line == 0 and number == 0:
                    title = TITLES.get(relation, relation)
                    axes.annotate(
                        title,
                        (0, 1),
                        (0, 18),
                        "axes fraction",
                        "offset points",
                        fontsize=9.5,
                        color=INK,
                        weight="bold",
                    )
                place += 1
    return figure


def _draw_view(axes: Axes, example: Example, first: bool) -> None:
    axes.imshow(example.pixels)
    grid_rows = next(iter(next(iter(example.maps.values())).values())).shape[0]
    side = example.pixels.shape[0] / grid_rows
    row, column = example.query
    for colour, width in (("black", 3.2), ("white", 1.4)):
        box = Rectangle((column * side - 0.5, row * side - 0.5), side, side, fill=False, ec=colour, lw=width)
        axes.add_patch(box)
    if first:
        axes.set_title("view, query", fontsize=8.5, color=INK, pad=3)
    axes.set_ylabel(f"head {example.head}", fontsize=7.5, color=FAINT, labelpad=2)
    _bare(axes)


def _heatmap(
    axes: Axes,
    values: npt.NDArray[np.floating[Any]],
    scale: npt.NDArray[np.floating[Any]],
    query: tuple[int, int],
    lowest: float | None,
) -> None:
    low = float(scale.min()) if lowest is None else lowest
    axes.imshow(values, cmap="magma", vmin=low, vmax=float(scale.max()), interpolation="nearest")
    axes.add_patch(Rectangle((query[1] - 0.5, query[0] - 0.5), 1, 1, fill=False, ec="white", lw=1.1))
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


# ---- the page


def page(report: Report, relations_png: bytes, curves_png: bytes) -> str:
    """The page, as HTML. Every text is escaped, every picture embedded."""
    text = {field: prose(getattr(report, field)) for field in ("lesson", "teacher", "caveat")}
    distilled = frozenset(i for i, arm in enumerate(report.arms) if arm.how_trained.startswith("distilled"))
    bytes_rows = _byte_rows(report)
    identity = html_table([("what", "value"), *report.provenance.items()], frozenset())
    return document(
        "tinymim demo: two students from one teacher pass",
        f"""<h1>Two students from one teacher pass</h1>
<p>{text["lesson"]}</p>
<p>{text["teacher"]}</p>

<h2>Accuracy of the frozen features</h2>
{html_table(table_cells(report.arms), _NUMBERS, distilled)}
<p class="note">{text["caveat"]}</p>

<h2>Training</h2>
{html_figure(curves_png, "Loss curves of the students and of the masked autoencoders")}
<p class="note">Lower is better. The two plots show different losses and cannot be compared with each other.</p>

<h2>Relations in the teacher, in the cache and in the students</h2>
{html_figure(relations_png, "Relation rows of the teacher, the cache and the students for some query patches")}
<p class="note">Each line shows one query patch (boxed) of one training view, in one of the teacher&#39;s heads. A map
shows how one relation row spreads its probability over the patches; bright is high. The exact row is never stored.
Instead the cache keeps {_kept(report)}. All draws have the same weight, so the average over many sketches is the exact
row. Teacher and students share one colour scale per line and relation; the sketch has its own. For each view the
picture shows the most selective of the cached queries, in different heads.</p>

<h2>Bytes per view</h2>
{html_table(bytes_rows, frozenset({2, 3}), {len(bytes_rows) - 3})}
<p class="note">Compressed bytes on disk, averaged over all views of the cache. The choice of query rows is recomputed
from the identity of the view and takes no space.</p>

<h2>Provenance</h2>
<div class="k">{identity}</div>
""",
    )


def _kept(report: Report) -> str:
    """The stored entries of a row, in words."""
    draws = f"{report.tail_k} random draws"
    return (
        f"its {report.head_k} largest entries and {draws} from the rest" if report.head_k else f"{draws} from the row"
    )


_COMPONENTS = {
    "sketches": "drawn patches of each row, and its entropy",
    "digests": "digest of the pixels",
    "keys": "key of the image",
    "overhead": "metadata and commit records",
}


def _byte_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """The cells of the table of bytes; the last two rows are the total and the dense maps."""
    total = sum(report.bytes_per_view.values())
    rows = [("component", "content", "bytes per view", "share")]
    for name, count in sorted(report.bytes_per_view.items(), key=lambda item: -item[1]):
        shown = f"{count:,.0f}" if count >= 100 else f"{count:.1f}"
        rows.append((name, _COMPONENTS.get(name, ""), shown, f"{count / total:.1%}"))
    rows.append(("total", "", f"{total:,.0f}", "100.0%"))
    rows.append(("dense maps", "all rows in fp16", f"{report.dense_bytes:,}", f"{report.dense_bytes / total:.0f} x"))
    return rows
