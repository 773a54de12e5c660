"""The page of `tinymim compare`: tables and curves of several runs."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from textwrap import shorten, wrap
from typing import Any, Literal

from matplotlib.figure import Figure

from tinymim.stages.pages.look import COLOURS, DASHES, document, dress, html_figure, keep_flat, log_scale, png, prose
from tinymim.stages.pages.summary import RunSummary
from tinymim.stages.pages.tables import html_table
from tinymim.stages.run.metrics import MISSING, in_order, members, metric


@dataclass(frozen=True)
class Picture:
    """A plot of curves of several runs.

    Attributes:
        title: the heading above the plot.
        unit: the unit of the vertical axis.
        families: the families of metrics to plot; all have the same better direction.
        log: whether the vertical axis is logarithmic.
        stage: the command whose runs are plotted; None plots the runs of every command.
    """

    title: str
    unit: str
    families: tuple[str, ...]
    log: bool
    stage: str | None = None

    @property
    def share(self) -> bool:
        """Whether the values are shares, shown in percent."""
        return self.unit.startswith("%")

    def names_of(self, run: RunSummary) -> list[str]:
        """The metrics of a run that this picture plots."""
        if self.stage not in (None, run.stage):
            return []
        return in_order(name for family in self.families for name in members(family, run.curves))

    @property
    def label(self) -> str:
        """The unit, and whether lower or higher is better."""
        return f"{self.unit}, {metric(self.families[0]).better} is better"


_AUDITS = "Students: KL to dense targets of held-out images"
PICTURES = (
    Picture("Students: sum of the KL to the cached targets", "nats per row", ("loss",), True, "train-student"),
    Picture("Masked autoencoders: loss", "squared error of masked patches", ("loss",), True, "pretrain-mae"),
    Picture("Masked pre-training: loss", "squared error of hidden squares", ("loss",), True, "pretrain"),
    Picture("Fine-tuning: loss", "cross entropy", ("loss",), True, "finetune"),
    Picture(_AUDITS, "nats per row", ("audit_kl_*", "audit_ema_kl_*"), True),
    Picture("k-NN top-1 of audits", "% of images", ("audit_knn_top1", "audit_ema_knn_top1"), False),
    Picture("Fine-tuning: top-1", "% of images", ("val_*_top1",), False),
)


_LEGEND = """A dash means that the run folder has no such value. Losses are comparable only between runs of the same
stage. `seconds` sums all sessions of a run, including steps that were repeated after an interruption. `device-h` counts
every rank; several students trained on one stream share it. `teacher-h` is the time of stage one, shared equally by
the students on this page that read its cache. It needs the run folder of `cache-teacher` among the compared folders.
`audit` rows show the last audit, against dense targets of held-out images."""

Axis = Literal["step", "epoch"]
AXES: tuple[Axis, ...] = ("step", "epoch")
_RUNS_A_TABLE = 4  # more columns do not fit a telephone
_SWITCH = """<input type="radio" name="x" id="by-step" checked><label for="by-step">by step</label>
<input type="radio" name="x" id="by-epoch"><label for="by-epoch">by epoch</label>
"""


def page(runs: Sequence[RunSummary], table: list[list[str]], differing: Mapping[str, list[list[str]]]) -> str:
    """The page, as HTML. Every text is escaped, every picture embedded.

    Args:
        runs: the runs.
        table: a header and one row per run.
        differing: by command, a header and one row per field, with a column per run.
    """
    upright = [list(row) for row in zip(*table, strict=True)]
    parts = [
        f"<h1>{len(runs)} runs</h1>\n",
        *(f'<div class="r">{html_table(part, range(1, len(part[0])))}</div>' for part in _narrow(upright)),
        f'\n<p class="note">{prose(_LEGEND)}</p>\n',
        *_curves(runs),
        *_costs(runs),
    ]
    for stage, rows in differing.items():
        parts.append(f"\n<h2>What differs in {html.escape(stage)}</h2>\n")
        parts += [f'<div class="v">{html_table(part, ())}</div>' for part in _narrow(rows)]
    if not differing:
        parts.append("\n<h2>Recipes</h2>\n<p>No two runs of one command differ in a field.</p>")
    parts += ["\n<h2>Runs</h2>\n", f'<div class="v">{html_table(_identities(runs), ())}</div>\n']
    return document(f"tinymim compare: {', '.join(run.name for run in runs)}", "".join(parts))


def _narrow(rows: list[list[str]]) -> list[list[list[str]]]:
    """A table with a column per run, cut into tables of few runs; each repeats the first column."""
    starts = range(1, max(2, len(rows[0])), _RUNS_A_TABLE)
    return [[[row[0], *row[start : start + _RUNS_A_TABLE]] for row in rows] for start in starts]


def _curves(runs: Sequence[RunSummary]) -> list[str]:
    """The pictures by step and by epoch, and the switch between them."""
    found, switch = [], ""
    for picture in PICTURES:
        figures = {axis: curves_figure(runs, picture, axis) for axis in AXES}
        switched = all(figures.values())  # where no epoch is recorded, the picture by step is always shown
        switch = _SWITCH if switched else switch
        for axis, figure in figures.items():
            if figure is not None:
                image = html_figure(png(figure), f"{picture.title}, by {axis}")
                group = f' class="by-{axis}"' if switched else ""
                found.append(f"<div{group}><h2>{html.escape(picture.title)}</h2>\n{image}</div>\n")
    return [switch, '<div class="curves">\n', *found, "</div>\n"] if found else []


def curves_figure(runs: Sequence[RunSummary], picture: Picture, axis: Axis) -> Figure | None:
    """Plot a line per run and metric; None if no run has a curve over this axis.

    A run has the same colour in all pictures of a page.

    Args:
        runs: the runs.
        picture: what to plot.
        axis: the horizontal axis; runs without recorded epochs are missing by epoch.
    """
    curves = [
        (run.name, colour, name, points)
        for colour, run in zip(cycle(COLOURS), runs, strict=False)
        for name in picture.names_of(run)
        if (points := [point for point in run.curves[name] if getattr(point, axis) is not None])
    ]
    if not curves:
        return None
    names = in_order(name for _, _, name, _ in curves)  # averages come last and are dashed
    figure = Figure(figsize=(4.6, 3.1 + 0.19 * len(curves)), dpi=200, layout="constrained")
    axes = figure.subplots()
    for run_name, colour, name, points in curves:
        dash = DASHES[names.index(name) % len(DASHES)]
        text = run_name if len(names) == 1 else f"{run_name}, {metric(name).header}"
        label = shorten(text, 60, placeholder="...")
        style: dict[str, Any] = {"color": colour, "linestyle": dash, "linewidth": 1.3, "label": label}
        marker = "." if len(points) < 30 else ""
        axes.plot([getattr(p, axis) for p in points], [p.value for p in points], marker=marker, **style)
    values = [point.value for *_, points in curves for point in points]
    if picture.log and values and min(values) > 0:
        log_scale(axes)
    keep_flat(axes, values, share=picture.share)
    dress(axes, "", picture.label.replace(", ", "\n"), axis)
    if (legend := axes.get_legend()) is not None:
        legend.remove()
        figure.legend(loc="outside lower left", fontsize=8, frameon=False)
    return figure


def _costs(runs: Sequence[RunSummary]) -> list[str]:
    """Bars of device-hours: those of the run, and its part of stage one."""
    known = [run for run in runs if run.device_s is not None]
    if not known:
        return []
    figure = Figure(figsize=(4.6, 1.1 + 0.34 * len(known)), dpi=200, layout="constrained")
    axes = figure.subplots()
    places = range(len(known))
    own = [(run.device_s or 0.0) / 3600 for run in known]
    axes.barh(places, own, color=COLOURS[0], label="the run itself")
    shares = [(run.teacher_device_s or 0.0) / 3600 for run in known]
    if any(shares):
        axes.barh(places, shares, left=own, color=COLOURS[1], label="its share of stage one")
    axes.set_yticks(places, ["\n".join(wrap(run.name, 22)[:2]) for run in known])
    axes.invert_yaxis()
    dress(axes, "", "", "device-hours")
    if (legend := axes.get_legend()) is not None:
        legend.remove()
        figure.legend(loc="outside lower left", fontsize=8, frameon=False)
    picture = html_figure(png(figure), "Device-hours of every run")
    return ["\n<h2>Device-hours</h2>\n", f'<div class="curves">{picture}</div>']


def _identities(runs: Sequence[RunSummary]) -> list[list[str]]:
    rows = [["run", "folder", "sessions", "device"]]
    for run in runs:
        rows.append([run.name, str(run.folder), str(run.sessions or MISSING), "; ".join(run.devices) or MISSING])
    return rows
