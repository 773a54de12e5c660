"""`tinymim cache remove`: delete a cache, and nothing that is not of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinymim.configs.errors import UserError
from tinymim.stages.pages.numbers import format_bytes
from tinymim.stages.run.progress import Meter
from tinymim.storage import layout
from tinymim.storage.check import COMMIT_FILE, OTHER_FILES, is_of_cache
from tinymim.storage.layout import COMMITS, CONSTANTS, CONSTANTS_RECORD, LEASES, METADATA, UNITS
from tinymim.storage.leases import Leases
from tinymim.storage.store import Store, explained_write_errors, open_store


def plan(place: Path | str) -> dict[str, Any]:
    """What `run` would remove, as JSON values.

    Raises:
        UserError: there is no cache at `place`; a root of caches is none.
        StoreError: the object store refuses or fails.
        CacheMismatch, CacheCorrupt: the manifest cannot be read, so that nothing says what this is.
    """
    store = _opened(place)
    manifest = layout.read_manifest(store)
    sizes = {entry.path: entry.size_bytes for entry in store.list()}
    own = [path for path in sizes if is_of_cache(path)]
    return {
        "path": str(store.place),
        "spec_id": manifest.spec_id,
        "units": sum(1 for path in own if COMMIT_FILE.fullmatch(path)),
        "files": len(own),
        "bytes": sum(sizes[path] for path in own),
        "foreign": sorted(sizes.keys() - set(own)),
    }


def run(place: Path | str, confirmed: bool) -> dict[str, Any]:
    """Remove the cache at `place`: commit records first and the manifest last.

    Stopped at any moment it leaves a cache without the units that it had got to, which can be removed again.

    Args:
        place: the cache itself.
        confirmed: whether the user has said so.

    Returns:
        What was removed, as JSON values; `foreign` are files that are not of the cache and were left.

    Raises:
        UserError: not confirmed; a writer is at work; or the errors of `plan`.
    """
    planned = plan(place)
    if not confirmed:
        raise UserError(
            f"this removes the cache {planned['path']}",
            got=f"spec {planned['spec_id']}: {planned['units']:,} units, {planned['files']:,} files, "
            f"{format_bytes(planned['bytes'])}",
            hint="add --yes to do it",
        )
    store = _opened(place)
    _refuse_writers(store)
    with explained_write_errors(store):
        paths = [entry.path for entry in store.list()]
        # The record of the constants goes before what it describes, as a unit's does.
        records = [*sorted(path for path in paths if COMMIT_FILE.fullmatch(path)), CONSTANTS_RECORD]
        folders = _whole_folders(paths)
        files = [path for path in paths if OTHER_FILES.fullmatch(path) and _unit_folder(path) not in folders]
        with Meter("cache remove", len(records) + len(folders) + len(files), "files and folders") as meter:
            for path in records:
                store.remove([path])
                meter.advance(1)
            for folder in sorted(folders):
                store.remove_tree(folder)
                meter.advance(1)
            for path in files:
                store.remove([path])
                meter.advance(1)
        _refuse_writers(store)  # one that began meanwhile keeps its manifest
        store.remove([METADATA])
        left = sorted(entry.path for entry in store.list())
        for folder in (UNITS, COMMITS, CONSTANTS, LEASES):
            if not any(path.startswith(f"{folder}/") for path in left):
                store.remove_tree(folder)  # empty but for unfinished writes
        if not left:
            store.remove_tree("")
    return planned | {"foreign": left}


def format_report(report: Mapping[str, Any]) -> str:
    """What `run` returns as text for a terminal."""
    lines = [
        f"removed     {report['path']}, spec {report['spec_id']}: {report['units']:,} units, "
        f"{report['files']:,} files, {format_bytes(report['bytes'])}"
    ]
    return "\n".join([*lines, *(f"left alone  {path}: no file of a cache" for path in report["foreign"])])


def _opened(place: Path | str) -> Store:
    """The store at `place`; where that is a link, at what it leads to, and the link stays."""
    return open_store(place.resolve() if isinstance(place, Path) else place)


def _unit_folder(path: str) -> str | None:
    """The folder of the unit that a file is in."""
    parts = path.split("/")
    return "/".join(parts[:3]) if parts[0] == UNITS and len(parts) > 3 else None


def _whole_folders(paths: list[str]) -> set[str]:
    """The folders of units in which there is nothing but a cache's files: one request, or one fsync, removes them."""
    folders = {folder for path in paths if (folder := _unit_folder(path)) is not None}
    return folders - {_unit_folder(path) for path in paths if not is_of_cache(path)}


def _refuse_writers(store: Store) -> None:
    writers = Leases(store).living()
    if writers:
        name, holder = sorted(writers.items(), key=str)[0]
        raise UserError(
            f"a writer is at work in {store.place}",
            got=f"{holder or 'somebody'} holds {name}",
            hint="stop it first; where a process on another machine has died, `tinymim cache-teacher` on this cache "
            "takes over what it held, and its claim ends by itself after a day",
        )
