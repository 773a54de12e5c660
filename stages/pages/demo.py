"""The demo's report: the self-contained HTML page, its pictures, and the table for the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from matplotlib.figure import Figure

from tinymim.stages.pages.look import COLOURS, DASHES, document, dress, html_figure, log_scale, png, prose
from tinymim.stages.pages.pictures import Example, lines_figure
from tinymim.stages.pages.tables import html_table, plain_table
from tinymim.stages.run.metrics import formatted, members, metric
from tinymim.storage.atomic import write_bytes_atomic

REPORT_NAME = "report.html"
RELATIONS_NAME = "relations.png"


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
    relations = png(lines_figure(report.examples))
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
