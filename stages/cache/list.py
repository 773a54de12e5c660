"""`tinymim cache list ROOT`: one line for each cache below a shared root."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.stages.pages.numbers import format_bytes
from tinymim.stages.pages.tables import plain_table
from tinymim.storage.catalog import FoundCache, caches_below
from tinymim.storage.reader import CacheReader


def run(root: Path | str) -> list[dict[str, Any]]:
    """Describe every cache directly below `root`, or `root` itself if it is one; a damaged cache has a `problem`.

    Raises:
        UserError: there is no such folder.
        StoreError: the object store refuses or fails.
    """
    if isinstance(root, Path) and not root.is_dir():
        raise UserError(
            "there is no such folder", got=root, hint="name the folder or URL under which caches are shared"
        )
    return [_described(found) for found in caches_below(root)]


def _described(found: FoundCache) -> dict[str, Any]:
    if found.manifest is None:
        return {"path": str(found.place), "problem": found.problem.what if found.problem else None}
    manifest = found.manifest
    row: dict[str, Any] = {
        "path": str(found.place),
        "spec_id": manifest.spec_id,
        "teacher": manifest.teacher["name"],
        "block": manifest.block,
        "codec": manifest.codec["name"],
        "num_views_per_image": manifest.num_views,
        "num_images": sum(shard.num_samples for shard in manifest.source),
    }
    try:
        reader = CacheReader(found.place)
    except (CacheCorrupt, CacheMismatch) as error:
        return row | {"problem": error.what}
    coverage = reader.coverage()
    share = coverage.covered_views / coverage.num_views if coverage.num_views else 1.0
    total_bytes = sum(reader.bytes_by_component().values())
    return row | {"covered_share": share, "complete": coverage.complete, "total_bytes": total_bytes}


def format_list(rows: Sequence[Mapping[str, Any]], root: Path | str) -> str:
    """The rows as a table for a terminal."""
    if not rows:
        return f"there is no cache directly below {root}"
    table: list[tuple[str, ...]] = [("spec", "teacher", "codec", "images x views", "cached", "size", "path")]
    for row in rows:
        if "spec_id" not in row:
            table.append(("?", "", "", "", "damaged", "", f"{row['path']}: {row['problem']}"))
            continue
        damaged = "problem" in row
        table.append(
            (
                row["spec_id"],
                f"{row['teacher']} block {row['block']}",
                row["codec"],
                f"{row['num_images']:,} x {row['num_views_per_image']}",
                "damaged" if damaged else f"{row['covered_share']:.1%}",
                "" if damaged else format_bytes(row["total_bytes"]),
                f"{row['path']}: {row['problem']}" if damaged else row["path"],
            )
        )
    return plain_table(table, {3, 4, 5})
