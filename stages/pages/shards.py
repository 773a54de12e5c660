"""The report of `tinymim make-shards`: what went in, what was left out and why, and the next commands for this set."""

import html
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinymim.stages.pages.numbers import format_bytes, plural
from tinymim.stages.pages.tables import html_table

_LARGE_SIDE, _LARGE_SET = 160, 10_000  # from here on a set is worth a large teacher
_LISTED = 50  # rows of a table on the page
_SHOWN = 8  # items of a line on the screen

Index = Mapping[str, Any]


def next_commands(index: Index, target: Path) -> list[str]:
    """The commands that make a cache of these shards and train a student from it, with a batch that fits the set."""
    count, short = index["num_samples"], index["report"]["short_side"].get("median", 0)
    large = count >= _LARGE_SET and short >= _LARGE_SIDE
    cache, student, most = (
        ("imagenet-mae-l-cache", "imagenet-tinymim-t", 4096) if large else ("own-cache", "own-student", 32)
    )
    name = target.name or "mine"
    shared = [f"source.shards={target}", f"cache=caches/{name}"]
    batch = min(most, 1 << (max(1, count // 2).bit_length() - 1))  # a power of two, at least two batches
    runs = [
        ("cache-teacher", cache, [*shared, f"run.folder=runs/{name}-cache"]),
        ("train-student", student, [*shared, f"optim.batch_size={batch}", f"run.folder=runs/{name}"]),
    ]
    return [
        " ".join(["tinymim", verb, recipe, *(f"--set {shlex.quote(setting)}" for setting in settings)])
        for verb, recipe, settings in runs
    ]


# ---------------------------------------------------------------- on the screen


def headline(index: Index) -> str:
    """The result in one line."""
    shards = plural(len(index["shards"]), "shard")
    return f"make-shards: {index['num_samples']:,} images in {shards}, {len(index['unreadable'])} unreadable"


def format_report(index: Index, target: Path) -> str:
    """The report as lines for a terminal."""
    rows = [(name, _shown(text)) for name, text in _lines(index)]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name.ljust(width)}  {text}" for name, text in rows]
    unreadable = [f"  unreadable: {_shown(row['origin'])}: {_shown(row['reason'])}" for row in index["unreadable"][:10]]
    commands = [f"    {_shown(line)}" for line in next_commands(index, target)]
    return "\n".join([*lines, *unreadable, "  next:", *commands])


def _lines(index: Index) -> Iterator[tuple[str, str]]:
    report = index["report"]
    if report["seen"]:
        yield "seen", _counted({f".{kind}" if kind[0] != "(" else kind: n for kind, n in report["seen"].items()})
    yield "taken", f"{_counted(report['taken_by_format'])}; {format_bytes(report['size_bytes'])}"
    for row in report["skipped"]:
        yield "left out", f"{row['count']:,} {row['reason']}; the first: {row['first']}"
    yield "labels", _labels(report)
    if report["classes"]:
        yield "classes", _counted(report["classes"], most_first=True)
    if report["near_empty_classes"]:
        yield "near empty", _listed([f"{name} ({report['classes'][name]})" for name in report["near_empty_classes"]])
    yield "sizes", _sizes(report)
    yield "colours", _counted(report["colours"])
    if turned := _turned(report):
        yield "turned", turned
    for note in report["notes"]:
        yield "note", note


def _labels(report: Mapping[str, Any]) -> str:
    number = len(report["classes"])
    text = str(report["labels"])
    if number:
        text += f", {plural(number, 'class', 'classes')}"
    if number == 1:
        text += ": all images are of one class"
    if number and report["unlabelled"]:
        text += f"; {report['unlabelled']:,} images have no label, so the set cannot be used where labels are needed"
    return text


def _sizes(report: Mapping[str, Any]) -> str:
    parts = (("width", report["width"]), ("height", report["height"]), ("short side", report["short_side"]))
    return "; ".join(
        f"{name} {each['min']:,} to {each['max']:,} px, median {each['median']:,}"
        if each["min"] < each["max"]
        else f"{name} {each['min']:,} px"
        for name, each in parts
    )


def _turned(report: Mapping[str, Any]) -> str:
    turned = sum(count for tag, count in report["orientations"].items() if tag != "1")
    if not turned:
        return ""
    return f"{plural(turned, 'image')} with an EXIF orientation, which every stage ignores: seen as stored"


def _counted(counts: Mapping[str, int], most_first: bool = False) -> str:
    items = sorted(counts.items(), key=lambda item: -item[1]) if most_first else list(counts.items())
    return _listed([f"{name} {count:,}" for name, count in items])


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN:,} more" if len(items) > _SHOWN else "")


def _shown(text: str) -> str:
    """A foreign text in one line, without what a terminal would act on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


# ---------------------------------------------------------------- as a page


def report_page(index: Index, target: Path) -> str:
    """The report as HTML. Every text is escaped."""
    from tinymim.stages.pages.look import document, prose  # matplotlib, for a page only

    report, images = index["report"], index["num_samples"]
    size_bytes = sum(row["size_bytes"] for row in index["shards"])
    left_out = sum(row["count"] for row in report["skipped"])
    source = _shown(str(index["made_by"]["source"]))
    body = [
        f"<h1>{images:,} images in {plural(len(index['shards']), 'shard')}</h1>\n",
        f"<p>{prose(f'From `{source}` to `{_shown(str(target))}`, {format_bytes(size_bytes)}.')} "
        f"{prose(f'Labels: {_shown(_labels(report))}.')}</p>\n",
        f"<p>{left_out:,} files or members were left out; the reasons are below.</p>\n" if left_out else "",
        *(f'<p class="note">{prose(_shown(note))}</p>\n' for note in [*report["notes"], _turned(report)] if note),
        "<h2>Next</h2>\n",
        *(_command(line) for line in next_commands(index, target)),
        *_table("Seen, by ending", ["ending", "files or members"], _rows(report["seen"])),
        *_table("Taken, by format", ["format", "images"], _rows(report["taken_by_format"])),
        *_table(
            "Left out",
            ["count", "reason", "the first"],
            [[f"{row['count']:,}", row["reason"], row["first"]] for row in report["skipped"]],
            numbers=(0,),
        ),
        *_table(
            "Unreadable images",
            ["image", "reason"],
            [[r["origin"], r["reason"]] for r in index["unreadable"]],
            numbers=(),
        ),
        *_classes(report),
        *_table(
            "Sizes in pixels",
            ["", "smallest", "median", "largest"],
            [
                [name, *(f"{report[key][of]:,}" for of in ("min", "median", "max"))]
                for name, key in (("width", "width"), ("height", "height"), ("short side", "short_side"))
            ],
            numbers=(1, 2, 3),
        ),
        *_table("Colours", ["colours", "images"], _rows(report["colours"])),
        *_table("EXIF orientation", ["tag (1: upright or none)", "images"], _rows(report["orientations"])),
    ]
    return document(f"{images:,} images", "".join(body))


def _classes(report: Mapping[str, Any]) -> Iterator[str]:
    counts = sorted(report["classes"].items(), key=lambda item: item[1])
    few = set(report["near_empty_classes"])
    rows = [[f"{count:,}", f"{name} (near empty)" if name in few else name] for name, count in counts]
    yield from _table("Classes, the smallest first", ["images", "class"], rows, numbers=(0,))


def _command(line: str) -> str:
    """A command, with one line for each setting."""
    text = html.escape(_shown(line)).replace(" --set ", " \\\n    --set ")
    return f'<div class="wide"><pre><code>{text}</code></pre></div>\n'


def _rows(counts: Mapping[str, int]) -> list[list[str]]:
    return [[name, f"{count:,}"] for name, count in counts.items()]


def _table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (1,)
) -> Iterator[str]:
    """A heading and a table of at most `_LISTED` rows; nothing for no rows."""
    if not rows:
        return
    shown = [[_shown(cell) for cell in row] for row in rows[:_LISTED]]
    yield f'<h2>{html.escape(title)}</h2>\n<div class="w">{html_table([header, *shown], numbers)}</div>\n'
    if len(rows) > _LISTED:
        yield f'<p class="note">and {len(rows) - _LISTED:,} more; <code>index.json</code> has all of them.</p>\n'
