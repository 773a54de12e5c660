"""Pictures of targets: a line per example, with what teacher, cache and students say about it (`PictureLine`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Rectangle

from tinymim.stages.pages.look import COLOURS, FAINT, INK
from tinymim.targets.contract import PictureLine

STORED = "in the cache"  # the column of the records
TEACHER = "teacher"

Values = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Example:
    """One line of a picture.

    Attributes:
        pixels: the view, uint8 [S, S, 3]; None where the image is not at hand.
        line: what is said about it.
    """

    pixels: npt.NDArray[np.uint8] | None
    line: PictureLine


def lines_figure(examples: Sequence[Example]) -> Figure:
    """Draw one line per example: the view, then for each group the columns, such as teacher, cache and students.

    Within one group of one example the exact maps share the colour scale of the first. Random draws have a scale of
    their own, because they consist of a few entries of equal weight. All lines have the same groups and columns.
    """
    groups = list(examples[0].line.panels) if examples else []
    columns = [len(examples[0].line.panels[group]) for group in groups]
    # The view and the maps, with a narrow empty column before each group.
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
    for number, example in enumerate(examples):
        _draw_view(figure.add_subplot(grid[number, 0]), example, number == 0)
        place = 1
        for group in groups:
            place += 1
            columns_of = {name: values.numpy() for name, values in example.line.panels[group].items()}
            for order, column in enumerate(columns_of):
                axes = figure.add_subplot(grid[number, place])
                _draw(axes, example.line, columns_of, column)
                if number == 0:
                    axes.set_title(_plain(column, 16), fontsize=8.5, color=INK, pad=3)
                if number == 0 and order == 0:
                    _title(axes, group)
                place += 1
    return figure


def _title(axes: Axes, group: str) -> None:
    style: dict[str, Any] = {"fontsize": 9.5, "color": INK, "weight": "bold"}
    axes.annotate(_plain(group, 60), (0, 1), (0, 18), "axes fraction", "offset points", **style)


def _plain(text: str, longest: int) -> str:
    """Printable and short; `$` would start a formula."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return (shown if len(shown) <= longest else f"{shown[: longest - 1]}…").replace("$", r"\$")


def _draw_view(axes: Axes, example: Example, first: bool) -> None:
    line, pixels = example.line, example.pixels
    if pixels is None:
        axes.text(0.5, 0.5, "no image", ha="center", va="center", fontsize=7.5, color=FAINT, transform=axes.transAxes)
    else:
        axes.imshow(pixels)
    if pixels is not None and line.query is not None:
        grid_rows = next(iter(next(iter(line.panels.values())).values())).shape[0]
        side = pixels.shape[0] / grid_rows
        row, column = line.query
        for colour, width in (("black", 3.2), ("white", 1.4)):
            box = Rectangle((column * side - 0.5, row * side - 0.5), side, side, fill=False, ec=colour, lw=width)
            axes.add_patch(box)
    if first:
        axes.set_title("view" if line.query is None else "view, query", fontsize=8.5, color=INK, pad=3)
    axes.set_ylabel(line.title, fontsize=7.5, color=FAINT, labelpad=2)
    _bare(axes)


def _draw(axes: Axes, line: PictureLine, columns: Mapping[str, Values], column: str) -> None:
    """Draw one panel: bars, colours or a heat map, by the number of its dimensions."""
    values = columns[column]
    if values.ndim == 1:
        _bars(axes, values, columns, line.labels)
    elif values.ndim == 3:
        axes.imshow(np.where(np.isnan(values), 0.85, values), interpolation="nearest")  # grey where nothing is stored
        _bare(axes)
    else:
        own_scale = column in line.own_scale
        exact = next((each for name, each in columns.items() if name not in line.own_scale), values)  # the teacher's
        scale = values if own_scale else exact
        low = 0.0 if own_scale else float(np.nanmin(scale))
        _heatmap(axes, values, (low, float(np.nanmax(scale))), line.query)


def _bars(axes: Axes, values: Values, columns: Mapping[str, Values], labels: Sequence[str]) -> None:
    places = np.arange(len(values))
    low = min(0.0, *(float(np.nanmin(each)) for each in columns.values()))
    high = max(0.0, *(float(np.nanmax(each)) for each in columns.values()))
    axes.set_ylim(low - 0.02 * (high - low), high + 0.02 * (high - low) or 1.0)
    if labels:
        axes.bar(places, values, color=COLOURS[0])
        for place, label in enumerate(labels):
            axes.text(place, high, label, rotation=90, ha="center", va="top", fontsize=5, color=FAINT)
    else:
        axes.fill_between(places, values, step="mid", color=COLOURS[0], linewidth=0)
    axes.set_box_aspect(1)
    _bare(axes)


def _heatmap(axes: Axes, values: Values, limits: tuple[float, float], query: tuple[int, int] | None) -> None:
    colours = colormaps["magma"].with_extremes(bad="#b9bdc8")  # where nothing is stored
    axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    if query is not None:
        axes.add_patch(Rectangle((query[1] - 0.5, query[0] - 0.5), 1, 1, fill=False, ec="white", lw=1.1))
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
