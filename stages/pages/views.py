"""The contact sheet of `tinymim views`: every view of some images with its box, flip, operations, partner and mask."""

import html
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from tinymim.pipeline.operations.registry import Step
from tinymim.pipeline.pairs import Mix
from tinymim.pipeline.views import View
from tinymim.stages.pages.look import COLOURS, FAINT, INK, document, html_figure, png
from tinymim.stages.pages.numbers import format_value

Pixels = npt.NDArray[np.uint8]  # [3, H, W]
_CELL_INCHES, _LEAST_SIDE = 1.9, 96


class ViewCell(NamedTuple):
    """One view.

    Attributes:
        number: its index.
        view: box and flip.
        steps: its operations.
        pixels: uint8 [3, S, S], after mixing.
        hidden: bool [rows, columns], hidden patches; None: no mask.
        partner: key of the image that it is mixed with; None: the view is unmixed.
        mix: how they are mixed.
    """

    number: int
    view: View
    steps: Sequence[Step]
    pixels: Pixels
    hidden: npt.NDArray[np.bool_] | None
    partner: str | None = None
    mix: Mix | None = None


class ImageRow(NamedTuple):
    """One image: its sample key, why it cannot be read or None, its pixels, and its views."""

    key: str
    unreadable: str | None
    image: Pixels | None
    cells: Sequence[ViewCell]


def step_text(step: Step) -> str:
    """An operation with its arguments, e.g. `rotate(27, [124, 116, 104])`."""
    return f"{step.operation}({', '.join(map(format_value, step.arguments))})"


def mix_text(mix: Mix) -> str:
    """The kind of a mix and the share of the view's own image, e.g. `mixup 0.62` or `cutmix 0.75`."""
    return f"{'mixup' if mix.box is None else 'cutmix'} {mix.share:.2f}"


def masked(cell: ViewCell) -> Pixels:
    """The pixels of a view with its hidden patches in grey."""
    if cell.hidden is None:
        return cell.pixels
    size = cell.pixels.shape[1]
    hidden = cell.hidden.repeat(size // cell.hidden.shape[0], axis=0).repeat(size // cell.hidden.shape[1], axis=1)
    return np.where(hidden, np.uint8(128), cell.pixels)


def short(text: str, longest: int = 24) -> str:
    """Printable and in one line; `$` would start a formula in a picture."""
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text).replace("$", r"\$")
    return plain if len(plain) <= longest else f"…{plain[1 - longest :]}"


def sheet(rows: Sequence[ImageRow]) -> bytes:
    """All images and views as one PNG: a row per image, which starts with the whole image and its boxes."""
    columns = 1 + max(len(row.cells) for row in rows)
    most = max((len(cell.steps) + (cell.mix is not None) for row in rows for cell in row.cells), default=0)
    high = _CELL_INCHES + 0.3 + 0.13 * most
    figure = Figure(figsize=(_CELL_INCHES * columns, high * len(rows)), dpi=110, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, row in zip(grid, rows, strict=True):
        line[0].set_title(short(row.key), fontsize=7, color=INK, loc="left")
        if row.image is None:
            line[0].text(0, 0.5, f"unreadable: {short(row.unreadable or '', 40)}", fontsize=6, color=FAINT)
            continue
        line[0].imshow(row.image.transpose(1, 2, 0))
        for axes, cell in zip(line[1:], row.cells, strict=False):
            colour, (top, left, height, width, flip) = COLOURS[cell.number % len(COLOURS)], cell.view
            line[0].add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, ec=colour, lw=1.2))
            axes.imshow(masked(cell).transpose(1, 2, 0))
            axes.set_title(f"view {cell.number}{', flipped' if flip else ''}", fontsize=7, color=colour, loc="left")
            lines = [step.operation for step in cell.steps]
            if cell.mix is not None:
                lines.append(f"{mix_text(cell.mix)} + {short(cell.partner or '', 20)}")
                if cell.mix.box is not None:
                    top, left, height, width = cell.mix.box
                    axes.add_patch(
                        Rectangle((left - 0.5, top - 0.5), width, height, fill=False, ec=INK, lw=0.8, ls=":")
                    )
            text = "\n".join(lines)
            axes.text(0, -0.03, text, fontsize=6, color=INK, va="top", transform=axes.transAxes)
    return png(figure)


def sheet_page(rows: Sequence[ImageRow], law: str, source: str) -> str:
    """The page: every view with box, flip and operations in full. Names from outside are escaped."""
    parts = ["<h1>Views of a recipe</h1>\n", f"<p>Images of <code>{html.escape(source)}</code>.</p>\n"]
    parts.append(f"<p>Law: {html.escape(law)}.</p>\n")
    parts.append(
        '<p class="note">A view is a function of seed, sample key and view index. Teacher and student see these '
        "pixels. Mixed views have the share of their own image and the key of the other. Hidden patches are grey.</p>\n"
    )
    for row in rows:
        parts.append(f"<h2><code>{html.escape(row.key)}</code></h2>\n")
        if row.image is None:
            parts.append(f"<p>Unreadable: {html.escape(row.unreadable or '')}</p>\n")
            continue
        height, width = row.image.shape[1:]
        parts.append(f'<p class="note">{width} x {height} pixels</p>\n<div class="wide"><table class="w">\n')
        parts.append("<tr><th>view</th><th>pixels</th><th>box</th><th>flip</th><th>operations</th></tr>\n")
        parts += map(_table_row, row.cells)
        parts.append("</table></div>\n")
    return document("tinymim views", "".join(parts))


def _table_row(cell: ViewCell) -> str:
    steps = "<br>".join(html.escape(step_text(step)) for step in cell.steps) or "none"
    if cell.mix is not None:
        steps += f"<br>{mix_text(cell.mix)} with {html.escape(cell.partner or '')}"
        if cell.mix.box is not None:
            top, left, height, width = cell.mix.box
            steps += f", whose {width} x {height} pixels at ({left}, {top}) are shown"
    if cell.hidden is not None:
        steps += f"<br>mask: {int(cell.hidden.sum())} of {cell.hidden.size} patches hidden"
    top, left, height, width, flip = cell.view
    picture = html_figure(view_picture(masked(cell)), f"view {cell.number}")
    box = f"{width} x {height} at ({left}, {top})"
    return (
        f"<tr><td>{cell.number}</td><td>{picture}</td><td>{box}</td><td>{'yes' if flip else 'no'}</td>"
        f"<td><code>{steps}</code></td></tr>\n"
    )


def view_picture(pixels: Pixels) -> bytes:
    """PNG of the exact pixels, enlarged by a whole factor where they are few."""
    factor = max(1, math.ceil(_LEAST_SIDE / pixels.shape[1]))
    enlarged = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(enlarged.transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()
