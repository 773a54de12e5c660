"""Numbers and view laws as text: bytes, times, rates, counts."""

from collections.abc import Mapping
from typing import Any


def format_bytes(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.2f} TiB"


def format_value(value: object) -> str:
    """A value of a report; floats have four significant digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(format_value, value)) + "]"
    return str(value)


def field_value(value: object) -> str:
    """The exact value of a recipe's field, as YAML spells null."""
    return "null" if value is None else str(value)


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def short_time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-4 else f"{1e6 * seconds:.3g} us"


def format_rate(per_s: float) -> str:
    return f"{per_s:,.0f} views/s" if per_s >= 10 else f"{per_s:.2f} views/s"


def exact_bytes(size_bytes: float) -> str:
    return f"{size_bytes:,.0f} B"


def format_cores(count: float) -> str:
    return f"{count:,.1f} cores keep it fed" if count >= 0.05 else "a small part of one core keeps it fed"


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def view_law(views: Mapping[str, Any]) -> str:
    """The view law of a manifest in one line."""
    parts = [
        f"{views['size']} px, scale {format_value(views['scale'])}, ratio {format_value(views['ratio'])}",
        f"{views['interpolation']}, flip {format_value(views['flip'])}, seed {views['seed']}",
    ]
    if operations := views.get("operations"):
        parts.append("operations " + operations_law(operations))
    if pairs := views.get("pairs"):
        parts.append("pairs " + pairs_law(pairs))
    return ", ".join(parts)


def operations_law(operations: Mapping[str, Any]) -> str:
    """The operations of a view law that are on, with their shares of the views, and the fill."""
    on = {
        "color_jitter": f"color jitter {format_value(operations['color_jitter'])}",
        "grayscale": "grayscale",
        "blur": f"blur {format_value(operations['blur_sigma'])}",
        "solarize": "solarize",
        "rand_augment": f"{operations['rand_augment']}",
        "erasing": f"erasing ({operations['erasing_mode']})",
    }
    shares = {name: operations[name] for name in on} | {"color_jitter": operations["color_jitter_share"]}
    if not any(operations["color_jitter"]):
        shares["color_jitter"] = 0
    named = [
        text if name == "rand_augment" else f"{text} in {format_value(shares[name])} of views"
        for name, text in on.items()
        if shares[name]
    ]
    return f"{' + '.join(named)}, fill {format_value(operations['fill'])}"


def pairs_law(pairs: Mapping[str, Any]) -> str:
    """How the views of a law are mixed."""
    on = [f"{name} {format_value(pairs[name])}" for name in ("mixup", "cutmix") if pairs[name]]
    share = f" ({format_value(pairs['cutmix_share'])} of pairs)" if len(on) == 2 else ""
    return f"{' or '.join(on)}{share} in {format_value(pairs['share'])} of views"
