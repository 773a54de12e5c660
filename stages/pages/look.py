"""The common look of all pages, each one self-contained HTML file: style, embedded pictures, axes of plots."""

import base64
import html
import io
import re
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, PercentFormatter

INK, FAINT = "#1f2430", "#8a90a0"
COLOURS = ("#3b6fb6", "#d1793b", "#4d9a6a", "#9a5ea8", "#b5485d", "#5aa0a8", "#8a7a3c", "#6b7080")
DASHES = ("-", "--", ":", "-.")

# ---- pictures


def png(figure: Figure) -> bytes:
    """The figure as PNG. It contains no date, so equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "tinymim"})
    return buffer.getvalue()


def dress(axes: Axes, title: str, label: str, below: str = "step") -> None:
    """Give axes the common look, with `label` on the vertical and `below` on the horizontal axis."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(below, fontsize=8.5, color=INK)
    axes.set_ylabel(label, fontsize=8.5, color=INK)
    axes.tick_params(labelsize=8, colors=INK, which="both")
    axes.set_axisbelow(True)
    axes.grid(True, color="#e4e6ec", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)


def log_scale(axes: Axes) -> None:
    """Make the vertical axis logarithmic, labelled with plain numbers. Call it after plotting."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # 1, 2, 5 alone may leave a short axis with a single label.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def keep_flat(axes: Axes, values: Sequence[float], share: bool = False) -> None:
    """Widen the vertical axis where its values hardly differ, so that noise does not look like progress.

    Args:
        axes: the axes, after plotting.
        values: the values plotted; losses span at least a fifth of their size, shares five points of percent.
        share: whether they are shares of one, which are then labelled in percent.
    """
    if share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if not values:
        return
    low, high = min(values), max(values)
    middle = (low + high) / 2
    least = 0.05 if share else 0.2 * abs(middle)
    if high - low < least:
        low, high = middle - least / 2, middle + least / 2
        axes.set_ylim((max(low, 0.0), min(high, 1.0)) if share else (low, high) if low < high else None)


def html_figure(picture: bytes, caption: str) -> str:
    """A figure element with the PNG embedded."""
    data = base64.b64encode(picture).decode("ascii")
    return f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}"></figure>'


# ---- the page

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1f2430; --soft: #5b6272; --line: #dfe2e8; --paper: #fbfbfa; --strong: #eef3fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6eb; --soft: #a3a9b6; --line: #363b46; --paper: #16181d; --strong: #1f2937; }
}
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 1rem; letter-spacing: -0.01em; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 0.6rem; }
p { max-width: 44rem; margin: 0.6rem 0; }
.note { color: var(--soft); font-size: 0.9rem; max-width: 48rem; }
.wide { overflow-x: auto; margin: 1rem 0; background:
  linear-gradient(to right, var(--paper) 40%, transparent) 0 / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 40%, transparent) 100% / 3rem 100% no-repeat local,
  linear-gradient(to right, #0003, transparent) 0 / 0.7rem 100% no-repeat,
  linear-gradient(to left, #0003, transparent) 100% / 0.7rem 100% no-repeat; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.38rem 0.9rem 0.38rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
td.n { white-space: nowrap; }
.r th { overflow-wrap: anywhere; }
.r td.n { white-space: normal; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 0 2rem; }
.curves img { width: 100%; }
input[type=radio] ~ label { margin-right: 1.2rem; }
.curves .by-epoch, #by-epoch:checked ~ .curves .by-step { display: none; }
#by-epoch:checked ~ .curves .by-epoch { display: block; }
td:first-child, th:first-child { padding-left: 0.6rem; }
.n { text-align: right; }
.s td { background: var(--strong); font-weight: 600; }
figure { margin: 1rem 0; overflow-x: auto; }
figure img { display: block; max-width: 100%; height: auto; box-sizing: border-box;
  background: #fff; border-radius: 6px; border: 1px solid var(--line); }
code, .k td:last-child { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 0.86em; }
.k td, .v td { overflow-wrap: anywhere; }
.v td, .v th { overflow-wrap: anywhere; min-width: 3.8rem; }
.w td { overflow-wrap: anywhere; }
.k td:first-child { overflow-wrap: normal; }
.v td:first-child { min-width: 6rem; }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --strong: #eee; }
  @page { margin: 15mm; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; margin-top: 1.5rem; }
  tr, figure, .job { break-inside: avoid; }
  thead { display: table-header-group; }
  .wide { overflow: visible; background: none; }
  figure { overflow: visible; display: block; }
  figure img { max-width: 100%; width: auto; }
  figure::after, input[type=radio], input[type=radio] ~ label { display: none; }
}
@media screen and (max-width: 40rem) {
  main { padding: 1.5rem 0.6rem 3rem; }
  table { font-size: 0.7rem; }
  th, td { padding-right: 0.4rem; }
  td:first-child, th:first-child { padding-left: 0.2rem; }
  figure { display: flex; }
  figure img { max-width: none; width: 46rem; }
  .w figure img { width: auto; }
  .curves figure { display: block; }
  .curves figure img { max-width: 100%; width: 100%; }
  .curves figure::after { display: none; }
  figure::after { content: ""; position: sticky; right: 0; flex: none; width: 0.9rem; margin-left: -0.9rem;
    background: linear-gradient(to left, #0005, transparent); }
}
"""


def document(title: str, body: str) -> str:
    """A complete HTML file. `title` is escaped, `body` is HTML already."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""


def prose(text: str) -> str:
    """Escape a text and turn `words in backticks` into code elements."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
