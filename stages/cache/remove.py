"""`tinymim cache remove`: delete a cache and no other file."""

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
    """The files that `run` would remove, counted, and the `foreign` files that it would leave; as JSON values.

    Raises:
        UserError: `place` is no cache; a root of caches is none.
        StoreError: the object store refuses or fails.
        CacheMismatch, CacheCorrupt: the manifest cannot be read, so it is unknown whether this is a cache.
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

    If it is stopped, a smaller cache remains, which the same command removes.

    Args:
        place: the cache itself, not a root.
        confirmed: whether the user confirmed the removal; False raises UserError.

    Returns:
        The report of `plan`, with the `foreign` files that were left alone.

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
        # A record goes before the data that it describes, so that no record ever points at missing data.
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
        _refuse_writers(store)  # a writer that started meanwhile keeps its manifest
        store.remove([METADATA])
        left = sorted(entry.path for entry in store.list())
        for folder in (UNITS, COMMITS, CONSTANTS, LEASES):
            if not any(path.startswith(f"{folder}/") for path in left):
                store.remove_tree(folder)  # holds unfinished writes at most
        if not left:
            store.remove_tree("")
    return planned | {"foreign": left}


def format_report(report: Mapping[str, Any]) -> str:
    """The report of `run` as text for a terminal."""
    lines = [
        f"removed     {report['path']}, spec {report['spec_id']}: {report['units']:,} units, "
        f"{report['files']:,} files, {format_bytes(report['bytes'])}"
    ]
    return "\n".join([*lines, *(f"left alone  {path}: not part of a cache" for path in report["foreign"])])


def _opened(place: Path | str) -> Store:
    """The store at `place`. A symbolic link is followed, so that the link itself is not removed."""
    return open_store(place.resolve() if isinstance(place, Path) else place)


def _unit_folder(path: str) -> str | None:
    """The folder of the unit that contains a file."""
    parts = path.split("/")
    return "/".join(parts[:3]) if parts[0] == UNITS and len(parts) > 3 else None


def _whole_folders(paths: list[str]) -> set[str]:
    """Folders of units without foreign files; each can be removed with one request or one fsync."""
    folders = {folder for path in paths if (folder := _unit_folder(path)) is not None}
    return folders - {_unit_folder(path) for path in paths if not is_of_cache(path)}


def _refuse_writers(store: Store) -> None:
    writers = Leases(store).living()
    if writers:
        name, holder = sorted(writers.items(), key=str)[0]
        raise UserError(
            f"a writer is active in {store.place}",
            got=f"{holder or 'an unknown process'} holds {name}",
            hint="stop it first; if it died on another machine, run `tinymim cache-teacher` on this cache, which takes "
            "over its units, or wait: its claim expires after a day",
        )
