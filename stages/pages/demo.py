"""The demo's report: one HTML file that needs nothing else, and the table for the terminal. It measures nothing."""

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
SKETCH = "in the cache"  # whose map has a colour scale of its own


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
    head_k: int  # largest entries of a row that the codec stores
    tail_k: int  # draws from the rest of the row
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


_NUMBERS = frozenset({1, 3, 5, 6})  # columns that align to the right


def text_table(arms: Sequence[Arm]) -> str:
    """The table for a terminal: plain ASCII, so that it survives every encoding, pipe and width."""
    return plain_table(table_cells(arms), _NUMBERS)


# ---- the pictures


def curves_figure(report: Report) -> Figure:
    """Students' KL per relation on the left, the masked autoencoders' loss on the right."""
    figure = Figure(figsize=(9.6, 3.4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, (name, lines) in zip(COLOURS, report.student_curves.items(), strict=False):
        by_relation = members("kl_*", lines[0] if lines else ())
        for style, (loss, relation) in zip(DASHES, by_relation.items(), strict=False):
            values = [line[loss] for line in lines]
            left.plot([line["step"] for line in lines], values, style, color=colour, label=f"{name}, {relation}")
    log_scale(left)
    dress(left, "students: KL to the cached sketches", "nats per row")
    for colour, style, (name, lines) in zip(COLOURS, DASHES, report.mae_curves.items(), strict=False):
        right.plot([line["step"] for line in lines], [line["loss"] for line in lines], style, color=colour, label=name)
    dress(right, "the same networks as masked autoencoders", "squared error of masked patches")
    return figure


def relations_figure(examples: Sequence[Example]) -> Figure:
    """One line per example: the crop, then for each relation the row as teacher, cache and students have it.

    Within one relation of one example the exact rows share the teacher's colour scale. The sketch, a few draws of equal
    weight, has its own.
    """
    relations = list(examples[0].maps) if examples else []
    columns = [len(examples[0].maps[relation]) for relation in relations]
    # The crop and the maps, with a narrow empty column before each relation.
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
        _crop(figure.add_subplot(grid[line, 0]), example, line == 0)
        place = 1
        for relation in relations:
            place += 1
            maps = example.maps[relation]
            exact = next(iter(maps.values()))  # the teacher comes first
            for number, (who, values) in enumerate(maps.items()):
                axes = figure.add_subplot(grid[line, place])
                own_scale = who == SKETCH
                _heatmap(axes, values, values if own_scale else exact, example.query, 0.0 if own_scale else None)
                if line == 0:
                    axes.set_title(who, fontsize=8.5, color=INK, pad=3)
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


def _crop(axes: Axes, example: Example, first: bool) -> None:
    axes.imshow(example.pixels)
    side = example.pixels.shape[0] / _grid_of(example)
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


def _grid_of(example: Example) -> int:
    relation = next(iter(example.maps.values()))
    return int(next(iter(relation.values())).shape[0])


# ---- the page


def page(report: Report, relations_png: bytes, curves_png: bytes) -> str:
    """The whole page; every text is escaped, every picture embedded."""
    text = {field: prose(getattr(report, field)) for field in ("lesson", "teacher", "caveat")}
    taught = frozenset(i for i, arm in enumerate(report.arms) if arm.how_trained.startswith("distilled"))
    identity = html_table([("what", "value"), *report.provenance.items()], frozenset())
    return document(
        "tinymim demo: two students from one teacher pass",
        f"""<h1>Two students from one teacher pass</h1>
<p>{text["lesson"]}</p>
<p>{text["teacher"]}</p>

<h2>What the frozen features are worth</h2>
{html_table(table_cells(report.arms), _NUMBERS, taught)}
<p class="note">{text["caveat"]}</p>

<h2>Training</h2>
{html_figure(curves_png, "Loss curves of the students and of the masked autoencoders")}
<p class="note">The two sides measure different things and cannot be compared with one another.</p>

<h2>What the teacher says, what the cache keeps, what the students learnt</h2>
{html_figure(relations_png, "Relation rows of the teacher, the cache and the students for some query patches")}
<p class="note">Each line is one query patch (boxed) of one training view, in one of the teacher&#39;s heads. A map
shows where on the patches the probability of that relation row falls. The exact row is never stored. Instead the cache
keeps {_kept(report)}. Each draw stands for an equal share, so the average over many sketches is the exact row. Teacher
and students share one colour scale per line and relation; the sketch has its own. For each view the picture shows the
most selective queries that the cache holds for all relations, in different heads.</p>

<h2>What a view costs</h2>
{html_table(_byte_rows(report), frozenset({1, 2}))}
<p class="note">Bytes on disk, compressed, with checksums, averaged over all views of the cache. Which query rows were
kept is recomputed from the view&#39;s identity and costs nothing.</p>

<h2>Provenance</h2>
<div class="k">{identity}</div>
""",
    )


def _kept(report: Report) -> str:
    """The entries of a row that the codec stores, in words."""
    draws = f"{report.tail_k} random draws"
    return (
        f"its {report.head_k} largest entries and {draws} from the rest" if report.head_k else f"{draws} from the row"
    )


def _byte_rows(report: Report) -> list[tuple[str, str, str]]:
    total = sum(report.bytes_per_view.values())
    rows = [("component", "bytes per view", "share")]
    for name, count in sorted(report.bytes_per_view.items(), key=lambda item: -item[1]):
        rows.append((name, f"{count:,.0f}" if count >= 100 else f"{count:.1f}", f"{count / total:.1%}"))
    rows.append(("all of it", f"{total:,.0f}", "100.0%"))
    rows.append(("dense maps in fp16", f"{report.dense_bytes:,}", f"{report.dense_bytes / total:.0f} x"))
    return rows
