"""`tinymim cache info PATH`: identity, coverage, size, fidelity and authors of a cache, layer by layer."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC
from pathlib import Path
from typing import Any

from tinymim.stages.pages.card import licence
from tinymim.stages.pages.numbers import format_bytes, format_value, plural, view_law
from tinymim.stages.pages.tables import plain_table
from tinymim.storage.catalog import listed, resolve
from tinymim.storage.commit import UnitInfo
from tinymim.storage.entries import Entry
from tinymim.storage.layout import is_views, size_of
from tinymim.storage.leases import Leases
from tinymim.storage.packed import open_cache_store
from tinymim.storage.reader import CacheReader, views_from_zero
from tinymim.storage.v1.cache import UPGRADE_HINT, OldCache
from tinymim.storage.v1.manifest import is_v1

TOP1 = "teacher_top1"  # among the statistics of a commit record


def describe(place: Path | str, more_views: int = 10) -> dict[str, Any]:
    """Everything that manifest, layers and commit records contain, as JSON values. Reads no record.

    Args:
        place: a cache, or a root that holds exactly one.
        more_views: estimate also the bytes of this number of further views of every image.

    Returns:
        `spec_id`, `views` (the law), `view_sizes` in pixels, `num_shards`, `num_images`, `bytes`, `writers`, and
        `layers`, a dict each with name, coverage, bytes by component and per view, fidelity, teacher and target.

    Raises:
        UserError: `place` holds no cache, or several.
        StoreError: the object store refuses or fails.
        CacheMismatch: the format version is unknown.
        CacheCorrupt: the manifest, the description of a layer or a commit record is damaged.
    """
    place = resolve(place)
    if is_v1(open_cache_store(place)):
        return _describe_old(OldCache(place))
    reader = CacheReader(place)
    manifest = reader.manifest
    entries = list(reader.store.list())
    files = listed(entries, manifest, reader.layers)
    names = (*reader.view_layers, *reader.layers)
    for name in names:
        reader.units(name, (entry.path for entry in entries))
    sizes = reader.bytes_by_component()
    num_images = sum(shard.num_samples for shard in manifest.source)
    layers = []
    for name in names:
        coverage, units = reader.coverage(name), reader.units(name)
        size_bytes = sum(sizes[name].values())
        layer: dict[str, Any] = {
            "name": name,
            "coverage": {
                "complete": coverage.complete,
                "begun_shards": coverage.begun_shards,
                "complete_shards": sum(
                    held >= coverage.most_views > 0 for held in _views_by_shard(reader, name).values()
                ),
                "views": coverage.complete_views,
                "most_views": coverage.most_views,
                "num_images": coverage.num_images,
                "num_records": coverage.num_records,
                "unreadable_images": _unreadable(reader, name),
            },
            "units": len(units),
            "bytes": size_bytes,
            "bytes_by_component": sizes[name],
            # Constants are stored once, so further views do not add to them.
            "bytes_per_view": (size_bytes - sizes[name].get("constants", 0)) / max(1, coverage.num_records),
            "fidelity": _means(units),
            "teacher_top1": _teacher_top1(units),
            "history": _history(files[name].entries),
        }
        if not is_views(name):
            described = reader.layers[name]
            layer |= {
                "spec_id": described.spec_id,
                "view_size": described.view_size or manifest.views["size"],
                "teacher": dict(described.teacher),
                "target": dict(described.target),
                "environment": dict(described.environment),
            }
        layers.append(layer)
    further_view = sum(layer["bytes_per_view"] for layer in layers)
    return {
        "path": str(reader.place),
        "format_version": manifest.format_version,
        "spec_id": manifest.spec_id,
        "views": dict(manifest.views),
        "view_sizes": [size_of(name, manifest) for name in reader.view_layers],
        "num_shards": len(manifest.shards),
        "num_images": num_images,
        "layers": layers,
        "bytes": sum(layer["bytes"] for layer in layers),
        "bytes_per_further_view_of_all_images": round(further_view * num_images),
        "more_views": {"views": more_views, "bytes": round(further_view * num_images * more_views)},
        "writers": [
            {"lease": name, "holder": str(holder) if holder else None}
            for name, holder in sorted(Leases(reader.store).living().items())
        ],
        "environment": dict(manifest.environment),
    }


def _views_by_shard(reader: CacheReader, layer: str) -> dict[str, int]:
    return {shard: views_from_zero(infos) for shard, infos in reader.by_shard(layer).items()}


def _unreadable(reader: CacheReader, layer: str) -> int:
    """Images of the begun shards that no unit holds a record of."""
    shards = reader.manifest.shards
    return sum(shards[shard].num_samples - infos[0].num_images for shard, infos in reader.by_shard(layer).items())


def _history(entries: Sequence[Entry]) -> dict[str, Any]:
    """Times and owners of commits, from the store's listing: the cache itself contains no time and no name."""
    times = [entry.modified for entry in entries if entry.modified.timestamp()]  # a packed cache has none
    owners = Counter(entry.owner for entry in entries if entry.owner is not None)
    return {
        "first_commit": min(times).astimezone(UTC).isoformat(timespec="seconds") if times else None,
        "last_commit": max(times).astimezone(UTC).isoformat(timespec="seconds") if times else None,
        "units_by_owner": dict(owners.most_common()),
    }


def _means(units: Sequence[UnitInfo]) -> dict[str, float]:
    """Means of the statistics in the commit records, by dotted name, over heads and over units (weighted by records).

    `fidelity.views`, the number of audited views, is summed. `unreadable` is left out, as the coverage counts it.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    weights: defaultdict[str, int] = defaultdict(int)
    audited = 0.0
    for info in units:
        for name, value in _numbers({k: v for k, v in info.statistics.items() if k != TOP1}):
            if name == "fidelity.views":
                audited += value
            elif name != "unreadable":
                sums[name] += value * info.num_records
                weights[name] += info.num_records
    means = {name.removeprefix("fidelity."): sums[name] / weights[name] for name in sorted(sums) if weights[name]}
    return {"audited_views": audited, **means} if audited else means


def _teacher_top1(units: Sequence[UnitInfo]) -> dict[str, Any] | None:
    """The share of labelled views whose label is the teacher's first class; None where no unit counted any."""
    sums: Counter[str] = Counter()
    for info in units:
        counted = info.statistics.get(TOP1)
        hits, labelled = (counted.get(n) if isinstance(counted, Mapping) else None for n in ("hits", "labelled"))
        if isinstance(hits, int) and isinstance(labelled, int) and 0 <= hits <= labelled:
            sums.update(hits=hits, labelled=labelled)
    return (
        {"accuracy": sums["hits"] / sums["labelled"], "labelled_views": sums["labelled"]} if sums["labelled"] else None
    )


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
    # A record may hold any number, and the sums over all units must stay finite: JSON has no word for infinity.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e200


def _describe_old(old: OldCache) -> dict[str, Any]:
    """The summary of a format-1 cache."""
    manifest = old.manifest
    sizes = old.bytes_by_component()
    return {
        "path": str(old.place),
        "format_version": manifest.format_version,
        "spec_id": manifest.spec_id,
        "teacher": dict(manifest.teacher),
        "codec": dict(manifest.codec),
        "views": dict(manifest.views),
        "num_images": sum(shard.num_samples for shard in manifest.source),
        "num_views_per_image": manifest.num_views,
        "coverage": old.coverage(),
        "bytes": sum(sizes.values()),
        "bytes_by_component": sizes,
        "upgrade": UPGRADE_HINT,
    }


# ---- as text


def format_info(info: Mapping[str, Any]) -> str:
    """The report of `describe` as text for a terminal, with the arithmetic of the size."""
    if "layers" not in info:
        return _format_old(info)
    layers = info["layers"]
    lines = [
        f"cache     {info['path']}",
        f"spec      {info['spec_id']}, format version {info['format_version']}",
        f"views     {view_law(info['views'])}",
        *(
            f"also at   {size} px: {', '.join(each['name'] for each in layers if each.get('view_size') == size)}"
            for size in info["view_sizes"][1:]
        ),
        f"source    {plural(info['num_shards'], 'shard')}, {info['num_images']:,} images",
        "",
        *_layer_table(info),
        "",
        *_size_lines(info),
    ]
    for layer in layers:
        if not is_views(layer["name"]):
            lines += ["", *_layer_lines(layer)]
    return "\n".join([*lines, "", *_maker_lines(info)])


def format_views(coverage: Mapping[str, Any]) -> str:
    """`10`, or `3 to 10` where some shards have more views than others."""
    least, most = coverage["views"], coverage["most_views"]
    return f"{least}" if least == most else f"{least} to {most}"


def _layer_table(info: Mapping[str, Any]) -> list[str]:
    table: list[Sequence[str]] = [("layer", "shards", "views", "records", "bytes a view", "size", "complete")]
    for layer in info["layers"]:
        coverage = layer["coverage"]
        table.append(
            (
                layer["name"],
                f"{coverage['complete_shards']:,} of {info['num_shards']:,}",
                format_views(coverage),
                f"{coverage['num_records']:,}",
                f"{layer['bytes_per_view']:,.1f}",
                format_bytes(layer["bytes"]),
                "yes" if coverage["complete"] else "PARTIAL",
            )
        )
    lines = plain_table(table, {1, 2, 3, 4, 5}).splitlines()
    unreadable = info["layers"][0]["coverage"]["unreadable_images"]
    if unreadable:
        lines.append(f"{plural(unreadable, 'image')} of these shards cannot be read and have no records")
    if any(not layer["coverage"]["complete"] for layer in info["layers"]):
        lines.append("`shards` counts those with all views; a student trains on the views that its shards have")
    return lines


def _layer_lines(layer: Mapping[str, Any]) -> list[str]:
    teacher, target, shapes = layer["teacher"], layer["target"], layer["teacher"]["shapes"]
    parameters = ", ".join(
        f"{name} {format_value(value)}" for name, value in target["parameters"].items() if name != "name"
    )
    lines = [
        f"layer     {layer['name']}, spec {layer['spec_id']}",
        f"teacher   {teacher['name']}, {', '.join(target['taps'])}, {shapes['heads']} heads, "
        f"{shapes['tokens']} tokens, {teacher['precision']}",
        f"weights   {teacher['weights_origin']}, sha256 {teacher['weights_sha256'][:12]}, license {licence(teacher)}",
        f"codec     {target['name']} version {target['version']}: {parameters}",
    ]
    if top1 := layer["teacher_top1"]:
        lines.append(
            f"labels    the teacher's first class is the label of {top1['accuracy']:.2%} of "
            f"{plural(top1['labelled_views'], 'labelled view')}"
        )
    if mask := target.get("mask"):
        lines.append("mask      " + ", ".join(f"{name} {format_value(value)}" for name, value in mask.items()))
    return lines + (_fidelity_lines(layer["fidelity"]) if layer["fidelity"] else [])


def _maker_lines(info: Mapping[str, Any]) -> list[str]:
    """Commits, library versions and active writers."""
    lines = []
    for layer in info["layers"]:
        history = layer["history"]
        if history["first_commit"]:
            owners = ", ".join(f"{name} ({plural(n, 'unit')})" for name, n in history["units_by_owner"].items())
            by = f" by {owners}" if owners else ""
            lines.append(f"committed {layer['name']}: {history['first_commit']} to {history['last_commit']}{by}")
    # Canaries of operations are for machines: stages name those that differ.
    shown = {name: value for name, value in info["environment"].items() if not name.startswith("canary.")}
    lines.append(f"made with {', '.join(f'{name} {value}' for name, value in shown.items())}")
    for writer in info["writers"]:
        lines.append(f"writer    {writer['holder'] or 'an unknown process'} holds {writer['lease']}")
    return lines


def _fidelity_lines(fidelity: Mapping[str, float]) -> list[str]:
    """A table with a row per quantity, and a column per relation and for all parameters together."""
    views = fidelity.get("audited_views", 0)
    lines = [f"fidelity  on {views:,.0f} views, against dense targets; means over parts, units weighted by records"]
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
    """Bytes by layer and component, and the price of more views."""
    table = [("size", "component", "a view", "all", "share")]
    for layer in info["layers"]:
        records = layer["coverage"]["num_records"]
        shown = layer["name"]
        for name, size_bytes in layer["bytes_by_component"].items():
            if size_bytes and records:
                share = size_bytes / info["bytes"]
                table.append(
                    (shown, name, f"{size_bytes / records:,.1f} B", format_bytes(size_bytes), f"{share:.1%}"),
                )
                shown = ""
    table.append(("all", "", "", format_bytes(info["bytes"]), "100.0%"))
    lines = plain_table(table, {2, 3, 4}).splitlines()
    further, more = info["bytes_per_further_view_of_all_images"], info["more_views"]
    if further:
        lines.append(
            f"N more views of every image: about N x {format_bytes(further)}; "
            f"{more['views']:,} are {format_bytes(more['bytes'])}"
        )
    return lines


def _format_old(info: Mapping[str, Any]) -> str:
    teacher, codec, coverage = info["teacher"], info["codec"], info["coverage"]
    return "\n".join(
        [
            f"cache     {info['path']}",
            f"spec      {info['spec_id']}, format version 1, which is only read to be upgraded",
            f"teacher   {teacher['name']}, block {teacher['block']}, license {licence(teacher)}",
            f"codec     {codec['name']} version {codec['version']}",
            f"views     {view_law(info['views'])}",
            f"coverage  {coverage['complete_shards']:,} of {coverage['num_shards']:,} shards with all "
            f"{info['num_views_per_image']} views, {coverage['num_records']:,} records",
            f"size      {format_bytes(info['bytes'])}",
            f"upgrade   {info['upgrade']}",
        ]
    )
