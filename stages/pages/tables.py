"""Tables for terminals, HTML and Markdown."""

import html
from collections.abc import Collection, Sequence

from tinymim.configs.errors import printable


def plain_table(rows: Sequence[Sequence[str]], numbers: Collection[int]) -> str:
    """A table for a terminal. The first row is the header, `numbers` are the columns to align right."""
    rows = [[printable(cell, line_feeds="\n") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * width for width in widths), *map(line, rows[1:])])


def html_table(rows: Sequence[Sequence[str]], numbers: Collection[int], strong: Collection[int] = ()) -> str:
    """A table for a page, with all cells escaped. The first row is the header.

    Args:
        rows: the cells; a long path may break after each slash.
        numbers: the columns to align right.
        strong: the rows to highlight, counted from 0 below the header.
    """

    def cells(row: Sequence[str], tag: str) -> str:
        classes = (' class="n"' if column in numbers else "" for column in range(len(row)))
        texts = (html.escape(cell).replace("/", "/<wbr>") for cell in row)
        return "".join(f"<{tag}{cls}>{text}</{tag}>" for cls, text in zip(classes, texts, strict=True))

    classes = (' class="s"' if number in strong else "" for number in range(len(rows) - 1))
    body = "\n".join(f"<tr{cls}>{cells(row, 'td')}</tr>" for cls, row in zip(classes, rows[1:], strict=True))
    head = cells(rows[0], "th")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table that also reads well as text. All columns but the first are aligned right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = [(cell, width) for cell, width in zip(cells, widths, strict=True)]
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [line(header), rule, *map(line, rows)]
