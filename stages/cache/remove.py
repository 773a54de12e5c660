"""`tinymim cache remove`: delete a cache, or layers of one, and no other file."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tinymim.configs.errors import UserError
from tinymim.stages.pages.numbers import format_bytes, plural
from tinymim.stages.run.progress import Meter
from tinymim.storage import layout
from tinymim.storage.constants import constants_places
from tinymim.storage.entries import REQUESTS
from tinymim.storage.layout import LAYERS, LEASES, METADATA, is_commit, is_of_cache, is_views, layer_of
from tinymim.storage.leases import DEFAULT_LEASE_S, Leases
from tinymim.storage.manifest import Manifest
from tinymim.storage.store import Store, explained_write_errors, open_store

WATCH_S = 1.5 * DEFAULT_LEASE_S  # for a beat of writers on other machines


def plan(place: Path | str, layers: Sequence[str] | None = None) -> dict[str, Any]:
    """The files that `run` would remove, counted, and the `foreign` files that it would leave; as JSON values.

    Raises:
        UserError: `place` is no cache, or has no such layer; a root of caches is none.
        StoreError: the object store refuses or fails.
        CacheMismatch, CacheCorrupt: the manifest cannot be read, so it is unknown whether this is a cache.
    """
    store = _opened(place)
    manifest = layout.read_manifest(store)
    sizes = {entry.path: entry.size_bytes for entry in store.list()}
    present = sorted({name for path in sizes if is_of_cache(path) and (name := layer_of(path)) is not None})
    held = [name for name in present if not is_views(name)]
    if unknown := [name for name in layers or () if name not in held]:
        what = "a view layer goes with the layers on it only" if is_views(unknown[0]) else f"no layer {unknown[0]}"
        raise UserError(
            f"{store.place}: {what}",
            got=unknown[0],
            expected=f"one of {', '.join(held)}" if held else "a cache with target layers",
            hint="`tinymim cache info` shows the layers",
        )
    chosen = held if layers is None else list(dict.fromkeys(layers))
    views = [name for name in present if is_views(name)]
    if layers is not None:
        views = [name for name in views if name not in _view_layers(store, manifest, set(held) - set(chosen), views)]
    inside = [path for path in sizes if layers is None or layer_of(path) in (*chosen, *views)]
    own = [path for path in inside if is_of_cache(path)]
    return {
        "path": str(store.place),
        "spec_id": manifest.spec_id,
        "layers": chosen,
        "view_layers": views,
        "whole": layers is None,
        "units": sum(map(is_commit, own)),
        "files": len(own),
        "bytes": sum(sizes[path] for path in own),
        "foreign": sorted(set(inside) - set(own)),
    }


def run(place: Path | str, confirmed: bool, layers: Sequence[str] | None = None) -> dict[str, Any]:
    """Remove the cache at `place`, or target layers of it: commit records first, what describes them last.

    If it is stopped, a smaller cache remains, which the same command removes.

    Args:
        place: the cache itself, not a root.
        confirmed: True removes. False raises a UserError that states what would be removed.
        layers: the target layers to remove; None: the whole cache.

    Returns:
        JSON values: `path`, `spec_id`, `layers`, the number of `units`, `files` and `bytes`, and the `foreign` files,
        which were left alone.

    Raises:
        UserError: not confirmed; a writer is active; `place` is no cache or has no such layer.
        StoreError: the object store refuses or fails.
        CacheMismatch, CacheCorrupt: the manifest cannot be read, so it is unknown whether this is a cache.
    """
    planned = plan(place, layers)
    if not confirmed:
        raise UserError(
            f"this removes {_subject(planned)}",
            got=_amount(planned),
            hint="add --yes to do it",
        )
    store = _opened(place)
    refuse_writers(store)
    with explained_write_errors(store):
        gone = (*planned["layers"], *reversed(planned["view_layers"]))  # targets first: they rest on the views
        for name in gone:
            _remove_layer(store, name)
        if layers is not None:
            left = [entry.path for name in gone for entry in store.list(layout.layer_folder(name))]
            return planned | {"foreign": sorted(left)}
        refuse_writers(store)  # a writer that started meanwhile keeps its manifest
        rest = sorted(entry.path for entry in store.list() if is_of_cache(entry.path) and entry.path != METADATA)
        store.remove([*rest, METADATA])
        left = sorted(entry.path for entry in store.list())
        for folder in (*planned["view_layers"], LAYERS, LEASES):
            if not any(path.startswith(f"{folder}/") for path in left):
                store.remove_tree(folder)  # holds unfinished writes at most
        if not left:
            store.remove_tree("")
    return planned | {"foreign": left}


def _view_layers(store: Store, manifest: Manifest, layers: Iterable[str], present: list[str]) -> list[str]:
    """The view layers that target layers rest on; all that are present if a description cannot be read."""
    try:
        return layout.view_layers(manifest, [layout.read_layer(store, name, manifest) for name in sorted(layers)])
    except UserError:
        return present


def format_report(report: Mapping[str, Any]) -> str:
    """The report of `run` as text for a terminal."""
    lines = [f"removed     {_subject(report)}: {_amount(report)}"]
    return "\n".join([*lines, *(f"left alone  {path}: not part of a cache" for path in report["foreign"])])


def _subject(report: Mapping[str, Any]) -> str:
    if report["whole"]:
        return f"the cache {report['path']}, spec {report['spec_id']}"
    return f"{plural(len(report['layers']), 'layer')} of {report['path']}: {', '.join(report['layers'])}"


def _amount(report: Mapping[str, Any]) -> str:
    return f"{report['units']:,} units, {report['files']:,} files, {format_bytes(report['bytes'])}"


def _remove_layer(store: Store, name: str) -> None:
    """Remove the files of a layer. A record goes before the data that it describes; the layer's group goes last."""
    folder = layout.layer_folder(name)
    own = sorted(entry.path for entry in store.list(folder) if is_of_cache(entry.path))
    group, constants = f"{folder}/{METADATA}", constants_places(name)
    records = [path for path in own if is_commit(path)]
    files = [path for path in own if not is_commit(path) and path not in (group, *constants)]
    last = [path for path in (constants[1], constants[0], group) if path in own]
    with Meter("cache remove", len(own), "files") as meter:
        for some in (records, files):
            with ThreadPoolExecutor(REQUESTS if store.distant else 1) as pool:
                for _ in pool.map(lambda path: store.remove([path]), some):
                    meter.advance(1)
        store.remove(last)
    left = [entry.path for entry in store.list(folder)]
    if not left:
        store.remove_tree(folder)
    else:
        kept = {path.removeprefix(f"{folder}/").partition("/")[0] for path in left}
        for shard in {path.removeprefix(f"{folder}/").partition("/")[0] for path in records} - kept:
            store.remove_tree(f"{folder}/{shard}")


def _opened(place: Path | str) -> Store:
    """The store at `place`. A symbolic link is followed, so that the link itself is not removed."""
    return open_store(place.resolve() if isinstance(place, Path) else place)


def refuse_writers(store: Store) -> None:
    """Raises UserError if a writer may be active."""
    writers = Leases(store).living(WATCH_S)
    if writers:
        name, holder = sorted(writers.items(), key=str)[0]
        raise UserError(
            f"a writer is active in {store.place}",
            got=f"{holder or 'an unknown process'} holds {name}",
            hint="stop it first; if it died on another machine, run `tinymim cache-teacher` on this cache, which takes "
            "over its work",
        )
