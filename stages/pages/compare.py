"""The page of `tinymim compare`: tables and curves of several runs."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from matplotlib.figure import Figure

from tinymim.stages.pages.look import COLOURS, DASHES, document, dress, html_figure, log_scale, png, prose
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
    Picture("Fine-tuning: loss", "cross entropy", ("loss",), True, "finetune"),
    Picture(_AUDITS, "nats per row", ("audit_kl_*", "audit_ema_kl_*"), True),
    Picture("k-NN top-1 of audits", "share of images", ("audit_knn_top1", "audit_ema_knn_top1"), False),
    Picture("Fine-tuning: top-1", "share of images", ("val_*_top1",), False),
)


_LEGEND = """A dash means that the run folder has no such value. Losses are comparable only between runs of the same
stage. `seconds` sums all sessions of a run, including steps that were repeated after an interruption. `device-h` counts
every rank; several students trained on one stream share it. `teacher-h` is the time of stage one, shared equally by
the students on this page that read its cache. It needs the run folder of `cache-teacher` among the compared folders.
`audit` columns show the last audit, against dense targets of held-out images."""


def page(runs: Sequence[RunSummary], table: list[list[str]], differing: Mapping[str, list[list[str]]]) -> str:
    """The page, as HTML. Every text is escaped, every picture embedded."""
    parts = [
        f"<h1>{len(runs)} runs</h1>\n",
        f'<div class="r">{html_table(table, range(2, len(table[0])))}</div>',
        f'\n<p class="note">{prose(_LEGEND)}</p>\n',
        *_curves(runs),
        *_costs(runs),
    ]
    for stage, rows in differing.items():
        parts += [f"\n<h2>What differs in {html.escape(stage)}</h2>\n", f'<div class="v">{html_table(rows, ())}</div>']
    if not differing:
        parts.append("\n<h2>Recipes</h2>\n<p>No two runs of one command differ in a field.</p>")
    parts += ["\n<h2>Runs</h2>\n", f'<div class="v">{html_table(_identities(runs), ())}</div>\n']
    return document(f"tinymim compare: {', '.join(run.name for run in runs)}", "".join(parts))


def _curves(runs: Sequence[RunSummary]) -> list[str]:
    figures = {picture.title: curves_figure(runs, picture) for picture in PICTURES}
    return [f"\n<h2>{html.escape(t)}</h2>\n{html_figure(png(figure), t)}" for t, figure in figures.items() if figure]


def curves_figure(runs: Sequence[RunSummary], picture: Picture) -> Figure | None:
    """Plot a line per run and metric, over steps on the left and epochs on the right; None if no run has a curve.

    A run has the same colour in all pictures of a page.
    """
    curves = [
        (run.name, colour, name, run.curves[name])
        for colour, run in zip(cycle(COLOURS), runs, strict=False)
        for name in picture.names_of(run)
    ]
    if not curves:
        return None
    names = in_order(name for _, _, name, _ in curves)  # averages come last and are dashed
    figure = Figure(figsize=(9.6, 3.6), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for run_name, colour, name, points in curves:
        dash = DASHES[names.index(name) % len(DASHES)]
        text = run_name if len(names) == 1 else f"{run_name}, {metric(name).header}"
        style = {"color": colour, "linestyle": dash, "linewidth": 1.3, "label": text}
        marker = "." if len(points) < 30 else ""
        left.plot([point.step for point in points], [point.value for point in points], marker=marker, **style)
        by_epoch = [point for point in points if point.epoch is not None]
        if by_epoch:
            right.plot([point.epoch for point in by_epoch], [point.value for point in by_epoch], marker=marker, **style)
    if picture.log and all(point.value > 0 for *_, points in curves for point in points):
        log_scale(left)
    dress(left, "", picture.label)
    dress(right, "", "", "epoch" if right.lines else "epoch (not recorded)")
    if right.get_legend() is not None:
        right.get_legend().remove()
    return figure


def _costs(runs: Sequence[RunSummary]) -> list[str]:
    """Bars of device-hours: those of the run, and its part of stage one."""
    known = [run for run in runs if run.device_s is not None]
    if not known:
        return []
    figure = Figure(figsize=(9.6, 0.9 + 0.34 * len(known)), dpi=130, layout="constrained")
    axes = figure.subplots()
    names = [run.name for run in known]
    own = [(run.device_s or 0.0) / 3600 for run in known]
    axes.barh(names, own, color=COLOURS[0], label="the run itself")
    shares = [(run.teacher_device_s or 0.0) / 3600 for run in known]
    if any(shares):
        axes.barh(names, shares, left=own, color=COLOURS[1], label="its share of stage one")
    axes.invert_yaxis()
    dress(axes, "", "", "device-hours")
    return ["\n<h2>Device-hours</h2>\n", html_figure(png(figure), "Device-hours of every run")]


def _identities(runs: Sequence[RunSummary]) -> list[list[str]]:
    rows = [["run", "folder", "sessions", "device"]]
    for run in runs:
        rows.append([run.name, str(run.folder), str(run.sessions or MISSING), "; ".join(run.devices) or MISSING])
    return rows
