"""`tinymim cache list ROOT`: the caches below a shared root and their layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinymim.configs.errors import CacheCorrupt, StoreError, UserError
from tinymim.configs.place import parse_place
from tinymim.stages.cache.info import format_views
from tinymim.stages.pages.numbers import format_bytes
from tinymim.stages.pages.tables import plain_table
from tinymim.storage.catalog import FoundCache, Listed, caches_below, listed
from tinymim.storage.layout import is_views
from tinymim.storage.manifest import Layer
from tinymim.storage.packed import open_cache_store


def run(root: Path | str) -> list[dict[str, Any]]:
    """Describe every cache directly below `root`, or `root` itself if it is one.

    Reads manifests, descriptions of layers and the names and sizes of files.

    Args:
        root: the folder or URL that holds the caches.

    Returns:
        A dict of JSON values for each cache: path, spec_id, layers. A cache that cannot be read has path and problem.

    Raises:
        UserError: there is no such folder.
        StoreError: the root cannot be listed.
    """
    root = parse_place(root)
    if isinstance(root, Path) and not root.is_dir():
        raise UserError(
            "there is no such folder", got=root, hint="name the folder or URL under which caches are shared"
        )
    return [_described(found) for found in caches_below(root)]


def _described(found: FoundCache) -> dict[str, Any]:
    path = str(found.place)
    if found.manifest is None:
        problem = found.problem
        hint = f"; {problem.hint}" if problem is not None and problem.hint and "upgrade" in problem.hint else ""
        return {"path": path, "problem": f"{problem.what}{hint}" if problem else "unknown"}
    try:
        layers = listed(open_cache_store(found.place).list(), found.manifest, found.layers)
    except (StoreError, CacheCorrupt, OSError) as error:
        return {"path": path, "problem": str(error).splitlines()[0]}
    num_shards = len(found.manifest.shards)
    return {
        "path": path,
        "spec_id": found.manifest.spec_id,
        "num_shards": num_shards,
        "num_images": sum(shard.num_samples for shard in found.manifest.source),
        "bytes": sum(layer.size_bytes for layer in layers.values()),
        "layers": [_layer(name, layer, found.layers.get(name), num_shards) for name, layer in layers.items()],
    }


def _layer(name: str, layer: Listed, described: Layer | None, num_shards: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": name,
        "begun_shards": layer.begun_shards,
        "views": layer.least_views,
        "most_views": layer.most_views,
        "complete": layer.begun_shards == num_shards and layer.least_views == layer.most_views,
        "bytes": layer.size_bytes,
    }
    if described is not None:
        row |= {
            "teacher": described.teacher["name"],
            "taps": list(described.target["taps"]),
            "codec": described.target["name"],
        }
    return row


def format_list(rows: Sequence[Mapping[str, Any]], root: Path | str) -> str:
    """The rows as a table for a terminal, a line per layer."""
    if not rows:
        return f"there is no cache directly below {root}"
    table: list[tuple[str, ...]] = [("spec", "layer", "codec", "images x views", "shards", "size", "path")]
    for row in rows:
        if "problem" in row:
            table.append(("?", "", "", "", "unreadable", "", f"{row['path']}: {row['problem']}"))
            continue
        first = True
        for layer in row["layers"]:
            if is_views(layer["name"]) and any(not is_views(other["name"]) for other in row["layers"]):
                continue  # small, and as complete as the layers on it
            table.append(
                (
                    row["spec_id"] if first else "",
                    layer["name"],
                    layer.get("codec", ""),
                    f"{row['num_images']:,} x {format_views(layer)}",
                    f"{layer['begun_shards']:,} of {row['num_shards']:,}",
                    format_bytes(layer["bytes"]),
                    row["path"] if first else "",
                )
            )
            first = False
    return plain_table(table, {3, 4, 5})
