"""`tinymim cache info PATH`: identity, coverage, size, fidelity and authors of a cache."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from datetime import UTC
from pathlib import Path
from typing import Any

from tinymim.pipeline.views import DIGEST, VIEW_ARRAYS
from tinymim.stages.pages.numbers import format_bytes, format_value
from tinymim.stages.pages.tables import plain_table
from tinymim.storage.catalog import resolve
from tinymim.storage.layout import COMMITS, KEY_ARRAYS
from tinymim.storage.leases import Leases
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import Store

COMPONENTS = ("indices", "values", "boxes", "digests", "keys", "overhead")  # and "constants" if the cache has any


def describe(place: Path | str, more_views: int = 10) -> dict[str, Any]:
    """Everything that the manifest and the commit records contain, as JSON values. Reads no record.

    Args:
        place: a cache, or a root that holds exactly one.
        more_views: estimate also the bytes of this number of further views of every image.

    Raises:
        UserError: `place` holds no cache, or several.
        StoreError: the object store refuses or fails.
        CacheMismatch: the format version is unknown.
        CacheCorrupt: the manifest or a commit record is damaged, or a file of a unit is missing.
    """
    reader = CacheReader(resolve(place))
    manifest, coverage = reader.manifest, reader.coverage()
    total = bytes_by_component(reader)
    total_bytes, records = sum(total.values()), coverage.num_records
    num_images = sum(shard.num_samples for shard in manifest.source)
    # Constants are stored once, so further views do not add to them.
    further_view = (total_bytes - total.get("constants", 0)) / records if records else 0.0
    return {
        "path": str(reader.place),
        "format_version": manifest.format_version,
        "spec_id": manifest.spec_id,
        "teacher": dict(manifest.teacher),
        "codec": dict(manifest.codec),
        "views": dict(manifest.views),
        "num_images": num_images,
        "num_views_per_image": manifest.num_views,
        "coverage": {
            "complete": coverage.complete,
            "num_shards": coverage.num_shards,
            "complete_shards": coverage.complete_shards,
            "num_views": coverage.num_views,
            "covered_views": coverage.covered_views,
            "num_records": records,
            "unreadable_views": coverage.covered_views - records,
        },
        "total_bytes": total_bytes,
        "bytes_by_component": total,
        "bytes_per_view": total_bytes / records if records else 0.0,
        "bytes_to_complete": round(further_view * (coverage.num_views - coverage.covered_views)),
        "bytes_per_further_view_of_all_images": round(further_view * num_images),
        "more_views": {"views": more_views, "bytes": round(further_view * num_images * more_views)},
        "history": _history(reader.store),
        "writers": [
            {"lease": name, "holder": str(holder) if holder else None}
            for name, holder in sorted(Leases(reader.store).living().items())
        ],
        "fidelity": _fidelity(reader),
        "environment": dict(manifest.environment),
    }


def bytes_by_component(reader: CacheReader) -> dict[str, int]:
    """Bytes on disk of each of COMPONENTS, over all committed units."""
    total = dict.fromkeys(COMPONENTS, 0)
    for array, size_bytes in reader.bytes_by_component().items():
        total[component_of(array)] = total.get(component_of(array), 0) + size_bytes
    return total


def _history(store: Store) -> dict[str, Any]:
    """Times and owners of commits, from the store's listing: the cache itself contains no time and no name."""
    entries = list(store.list(COMMITS))
    times = sorted(entry.modified.astimezone(UTC).isoformat(timespec="seconds") for entry in entries)
    owners = Counter(entry.owner for entry in entries if entry.owner is not None)
    return {
        "first_commit": times[0] if times else None,
        "last_commit": times[-1] if times else None,
        "units_by_owner": dict(owners.most_common()),
    }


def component_of(array: str) -> str:
    """The component of the size table that counts an array of a unit; `overhead` and `constants` are their own."""
    if array in KEY_ARRAYS:
        return "keys"
    if array in VIEW_ARRAYS:
        return "boxes"
    if array == DIGEST:
        return "digests"
    if array in ("overhead", "constants"):
        return array
    return "indices" if array.endswith(("_gap", "_index")) else "values"


def _fidelity(reader: CacheReader) -> dict[str, float]:
    """Means of the statistics in the commit records, by dotted name, over heads and over units (weighted by records).

    `fidelity.views`, the number of audited views, is summed. `unreadable` is left out, as the coverage counts it.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    weights: defaultdict[str, int] = defaultdict(int)
    audited = 0.0
    for info in reader.units():
        for name, value in _numbers(info.statistics):
            if name == "fidelity.views":
                audited += value
            elif name != "unreadable":
                sums[name] += value * info.num_records
                weights[name] += info.num_records
    means = {name.removeprefix("fidelity."): sums[name] / weights[name] for name in sorted(sums) if weights[name]}
    return {"audited_views": audited, **means} if audited else means


def _numbers(statistics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(dotted name, value) of every number, and of every list of numbers with its mean as value."""
    for key, value in statistics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif _is_number(value):
            yield prefix + key, float(value)
        elif isinstance(value, list) and value and all(map(_is_number, value)):
            yield prefix + key, sum(value) / len(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---- as text


def format_info(info: Mapping[str, Any]) -> str:
    """The report of `describe` as text for a terminal, with the arithmetic of the size."""
    teacher, codec, coverage = info["teacher"], info["codec"], info["coverage"]
    views, fidelity = info["views"], info["fidelity"]
    parameters = ", ".join(
        f"{name} {format_value(value)}" for name, value in codec["parameters"].items() if name != "name"
    )
    state = "complete" if coverage["complete"] else "PARTIAL: a student trains on the views that are cached"
    lines = [
        f"cache     {info['path']}",
        f"spec      {info['spec_id']}, format version {info['format_version']}",
        f"teacher   {teacher['name']}, block {teacher['block']}, {teacher['heads']} heads, {teacher['tokens']} tokens, "
        f"{teacher['precision']}",
        f"weights   {teacher['weights_origin']}, sha256 {teacher['weights_sha256'][:12]}, license {teacher['license']}",
        f"codec     {codec['name']} version {codec['version']}: {parameters}",
        f"views     {views['size']} px, scale {format_value(views['scale'])}, ratio {format_value(views['ratio'])}, "
        f"{views['interpolation']}, flip {format_value(views['flip'])}, seed {views['seed']}",
        "",
        f"coverage  {state}",
        f"  shards  {coverage['complete_shards']:,} of {coverage['num_shards']:,} with all views",
        f"  views   {coverage['covered_views']:,} of {coverage['num_views']:,} "
        f"({info['num_images']:,} images x {info['num_views_per_image']} views)",
        f"  records {coverage['num_records']:,} ({coverage['unreadable_views']:,} views of unreadable images left out)",
        "",
        *_size_lines(info),
    ]
    if fidelity:
        lines += ["", *_fidelity_lines(fidelity)]
    return "\n".join([*lines, "", *_maker_lines(info)])


def _maker_lines(info: Mapping[str, Any]) -> list[str]:
    """Commits, library versions and active writers."""
    history = info["history"]
    lines = []
    if history["first_commit"]:
        owners = ", ".join(f"{name} ({count:,} units)" for name, count in history["units_by_owner"].items())
        by = f" by {owners}" if owners else ""
        lines.append(f"committed {history['first_commit']} to {history['last_commit']}{by}")
    lines.append(f"made with {', '.join(f'{name} {value}' for name, value in info['environment'].items())}")
    for writer in info["writers"]:
        lines.append(f"writer    {writer['holder'] or 'an unknown process'} holds {writer['lease']}")
    return lines


def _fidelity_lines(fidelity: Mapping[str, float]) -> list[str]:
    """A table with a row per quantity, and a column per relation and for all parameters together."""
    views = fidelity.get("audited_views", 0)
    lines = [f"fidelity  on {views:,.0f} views, against dense maps; means over heads, units weighted by records"]
    table: dict[str, dict[str, float]] = {}
    columns: list[str] = []
    for name, value in fidelity.items():
        column, dot, row = name.partition(".")
        if not dot:
            column, row = "all", name
        if name != "audited_views":
            table.setdefault(row, {})[column] = value
            columns += [column] if column not in columns else []
    if not columns:
        return lines
    cells = [[row, *(format_value(values.get(column, "")) for column in columns)] for row, values in table.items()]
    shown = plain_table([["mean", *columns], *cells], range(1, len(columns) + 1))
    return [*lines, *(f"  {line}" for line in shown.splitlines())]


def _size_lines(info: Mapping[str, Any]) -> list[str]:
    records = info["coverage"]["num_records"]
    if not records:
        return ["size      no records yet"]
    complete = records == info["num_images"] * info["num_views_per_image"]
    count = (
        f"{info['num_images']:,} images x {info['num_views_per_image']} views" if complete else f"{records:,} records"
    )
    lines = [f"size      {count} x {format_bytes(info['bytes_per_view'])} = {format_bytes(info['total_bytes'])}"]
    for name, size_bytes in info["bytes_by_component"].items():
        share = size_bytes / info["total_bytes"]
        lines.append(
            f"  {name:<10}{format_bytes(size_bytes / records):>12} a view {format_bytes(size_bytes):>12} {share:>6.1%}"
        )
    if info["bytes_to_complete"]:
        lines.append(f"  to complete it: about {format_bytes(info['bytes_to_complete'])}")
    further = info["bytes_per_further_view_of_all_images"]
    more = info["more_views"]
    lines.append(
        f"  N more views of every image: about N x {format_bytes(further)}; "
        f"{more['views']:,} are {format_bytes(more['bytes'])}"
    )
    return lines
