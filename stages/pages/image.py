"""The page of `tinymim look`: one image of a cache, its views with digests, and a picture for every layer."""

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from tinymim.stages.pages.look import INK, document, html_figure, png
from tinymim.stages.pages.numbers import format_value
from tinymim.stages.pages.pictures import Example, lines_figure
from tinymim.stages.pages.tables import html_table
from tinymim.stages.pages.views import ImageRow, ViewCell, sheet, short, step_text, view_picture


@dataclass(frozen=True)
class SeenView:
    """One view.

    Attributes:
        number: its index.
        stored, rendered: the low 32 bits of the digest of its pixels, in the cache and as drawn here; None: not drawn.
        cell: its pixels, box and operations; None: not drawn.
    """

    number: int
    stored: int
    rendered: int | None
    cell: ViewCell | None


@dataclass(frozen=True)
class LayerPicture:
    """What a layer stores of the image.

    Attributes:
        about: rows of a table.
        columns: the columns of the pictures.
        examples: the pictures' lines.
        losses: by student and loss, against the records.
    """

    about: Mapping[str, str]
    columns: Sequence[str]
    examples: Sequence[Example]
    losses: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class ImagePage:
    """The content of the page; `image` is uint8 [3, H, W], or None where it is not at hand."""

    key: str
    cache: str
    shard: str
    law: str
    image: npt.NDArray[np.uint8] | None
    views: Sequence[SeenView]
    layers: Mapping[str, LayerPicture]


_NO_IMAGE = (
    "The images are not at hand, so neither views, nor teacher, nor students can be shown: name them with --source."
)
_LEGEND = """A boxed patch is the query; bright is high. Exact columns share one colour scale per line. Random
draws have a scale of their own, because all draws have the same weight. Grey is not stored. The patches shown are the
most selective ones among those that are stored."""


def image_page(page: ImagePage) -> str:
    """The page, as HTML. Every text is escaped, every picture embedded."""
    parts = [
        f"<h1><code>{html.escape(page.key)}</code></h1>\n",
        f"<p>An image of the cache <code>{html.escape(page.cache)}</code>, in shard "
        f"<code>{html.escape(page.shard)}</code>.</p>\n",
        f'<p class="note">Views: {html.escape(page.law)}.</p>\n',
        "<h2>Views</h2>\n",
        _views_table(page.views),
    ]
    if page.image is None:
        parts.append(f'<p class="note">{_NO_IMAGE}</p>\n')
    for name, layer in page.layers.items():
        parts.append(f"\n<h2>Layer <code>{html.escape(name)}</code></h2>\n")
        parts.append(f'<div class="k">{html_table([("what", "value"), *layer.about.items()], ())}</div>\n')
        if layer.examples:
            parts.append(html_figure(png(lines_figure(layer.examples)), f"What layer {name} stores of the views"))
        if layer.losses:
            names = list(dict.fromkeys(loss for losses in layer.losses.values() for loss in losses))
            rows = [
                [who, *(format_value(losses.get(loss, "-")) for loss in names)] for who, losses in layer.losses.items()
            ]
            parts.append(html_table([["student", *names], *rows], range(1, len(names) + 1)))
            parts.append('\n<p class="note">Losses of these views against the records; lower is better.</p>\n')
    if any(layer.examples for layer in page.layers.values()):
        parts.append(f'<p class="note">{_LEGEND}</p>\n')
    return document(f"tinymim look: {page.key}", "".join(parts))


def _views_table(views: Sequence[SeenView]) -> str:
    header = "".join(f"<th>{name}</th>" for name in ("view", "pixels", "crop", "operations", "digest"))
    rows = "".join(map(_view_row, views))
    return f'<div class="wide"><table class="w"><tr>{header}</tr>\n{rows}</table></div>\n'


def _view_row(view: SeenView) -> str:
    cells = [str(view.number), "-", "-", "-"]
    if (cell := view.cell) is not None:
        top, left, height, width, flip = cell.view
        steps = "<br>".join(html.escape(step_text(step)) for step in cell.steps) or "none"
        box = f"{width} x {height} at ({left}, {top}){', flipped' if flip else ''}"
        picture = html_figure(view_picture(cell.pixels), f"view {view.number}")
        cells = [str(view.number), picture, box, f"<code>{steps}</code>"]
    digest = f"<code>{view.stored:08x}</code><br>"
    if view.rendered is None:
        digest += "stored"
    elif view.rendered == view.stored:
        digest += "the same pixels as the teacher saw"
    else:
        digest += f"<strong>OTHER PIXELS here: <code>{view.rendered:08x}</code></strong>"
    return f"<tr>{''.join(f'<td>{text}</td>' for text in [*cells, digest])}</tr>\n"


# ---- the picture


def image_png(page: ImagePage) -> bytes:
    """All pictures of the page below one another, as PNG."""
    cells = [view.cell for view in page.views if view.cell is not None]
    parts = [sheet([ImageRow(page.key, None, page.image, cells)])] if cells else [_heading(short(page.key, 60))]
    for name, layer in page.layers.items():
        parts.append(_heading(f"{short(name, 60)}: {layer.about['codec']}"))
        parts += [png(lines_figure(layer.examples))] if layer.examples else []
    images = [Image.open(io.BytesIO(part)).convert("RGB") for part in parts]
    whole = Image.new("RGB", (max(each.width for each in images), sum(each.height for each in images)), "white")
    top = 0
    for each in images:
        whole.paste(each, (0, top))
        top += each.height
    buffer = io.BytesIO()
    whole.save(buffer, "PNG")
    return buffer.getvalue()


def _heading(text: str) -> bytes:
    figure = Figure(figsize=(6.0, 0.32), dpi=130)
    figure.text(0.012, 0.25, text, fontsize=10, color=INK, weight="bold")
    return png(figure)
