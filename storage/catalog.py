"""The caches below a root, `<root>/<spec_id>/`: the same spec finds the same cache."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, StoreError, UserError
from tinymim.configs.place import joined
from tinymim.storage import layout
from tinymim.storage.entries import Entry
from tinymim.storage.layout import LAYERS, METADATA, UnitId, is_of_cache, layer_of
from tinymim.storage.manifest import Layer, Manifest
from tinymim.storage.packed import open_cache_store
from tinymim.storage.store import open_store


@dataclass(frozen=True)
class FoundCache:
    """A cache with its manifest and layers, or the problem that prevents their reading."""

    place: Path | str
    manifest: Manifest | None
    layers: Mapping[str, Layer] = field(default_factory=dict)
    problem: UserError | None = None

    def __str__(self) -> str:
        if self.manifest is None:
            return f"{self.place}: {self.problem.what if self.problem else 'unknown'}"
        return f"{self.place}: spec {self.manifest.spec_id}, layers {', '.join(self.layers) or 'none'}"


@dataclass(frozen=True)
class Listed:
    """What the names and sizes of files say about a layer; nothing is opened.

    Attributes:
        num_units: committed units.
        begun_shards: source shards with any view.
        least_views: the largest number of views, from view 0 on, that every begun shard has.
        most_views: the largest number of views, from view 0 on, that some shard has.
        num_records: committed views of all images, unreadable ones included.
        size_bytes: bytes of the layer's files.
        entries: the commit records in the listing.
    """

    num_units: int
    begun_shards: int
    least_views: int
    most_views: int
    num_records: int
    size_bytes: int
    entries: list[Entry]


def listed(entries: Iterable[Entry], manifest: Manifest, layers: Mapping[str, Layer]) -> dict[str, Listed]:
    """Coverage and size of the view layers and of `layers`, from a listing of the whole cache."""
    by_layer: dict[str, list[Entry]] = {name: [] for name in (*layout.view_layers(manifest, layers.values()), *layers)}
    for entry in entries:
        name = layer_of(entry.path)
        if name in by_layer:
            by_layer[name].append(entry)
    shards = {layout.shard_stem(name): name for name in manifest.shards}
    return {name: _listed(name, some, shards, manifest) for name, some in by_layer.items()}


def _listed(layer: str, entries: list[Entry], shards: Mapping[str, str], manifest: Manifest) -> Listed:
    commits = [
        (unit, entry)
        for entry in entries
        if entry.path.endswith(".json") and (unit := layout.parse_commit_file(layer, entry.path, shards)) is not None
    ]
    units: dict[str, list[UnitId]] = {}
    for unit, _ in commits:
        units.setdefault(unit.shard, []).append(unit)
    views = [_from_zero(some) for some in units.values()]
    return Listed(
        num_units=len(commits),
        begun_shards=len(units),
        least_views=min(views, default=0),
        most_views=max(views, default=0),
        num_records=sum(unit.num_views * manifest.shards[unit.shard].num_samples for unit, _ in commits),
        size_bytes=sum(entry.size_bytes for entry in entries if is_of_cache(entry.path)),
        entries=[entry for _, entry in commits],
    )


def _from_zero(units: list[UnitId]) -> int:
    """The number of views 0 .. n - 1 that the units of one shard hold without a gap."""
    held = 0
    for unit in sorted(units):
        if unit.first_view > held:
            break
        held = max(held, unit.first_view + unit.num_views)
    return held


def caches_below(root: Path | str) -> list[FoundCache]:
    """The caches directly in `root`, sorted by name, after `root` itself if it is a cache.

    Raises:
        StoreError, OSError: `root` cannot be listed.
    """
    own = _look(root)
    if own is not None:
        folders = open_store(root).folders() - {LAYERS, layout.LEASES}
        names = sorted(name for name in folders if not layout.is_views(name))
    else:
        names = sorted(open_store(root).folders())
    found = (_look(joined(root, name)) for name in names)
    return [cache for cache in (own, *found) if cache is not None]


def resolve(place: Path | str) -> Path | str:
    """The place of a cache: `place` itself, or the only cache directly in it.

    Raises:
        UserError: there is no cache, or there are several, which the message lists.
        StoreError: the object store refuses or fails.
    """
    if open_cache_store(place).exists(METADATA):
        return place
    match caches_below(place):
        case [only]:
            return only.place
        case []:
            layout.read_manifest(open_store(place))  # raises that there is none
            return place
        case several:
            listing = "\n    ".join(map(str, several))
            raise UserError(
                f"{place} holds {len(several)} caches",
                got=f"\n    {listing}",
                expected="one cache",
                hint="name one of them; `tinymim cache list` shows them",
            )


def _look(place: Path | str) -> FoundCache | None:
    """The cache at a place. Whatever prevents its reading is its problem, so that others can be listed."""
    try:
        store = open_cache_store(place)
        if not store.exists(METADATA):
            return None
        manifest = layout.read_manifest(store)
        layers = {name: layout.read_layer(store, name, manifest) for name in layout.layer_names(store)}
        return FoundCache(place, manifest, layers)
    except (CacheCorrupt, CacheMismatch, StoreError) as error:
        return FoundCache(place, None, problem=error)
    except UserError:
        return None  # a zarr group that is not a cache
    except OSError as error:
        return FoundCache(place, None, problem=StoreError(f"it cannot be read: {error.strerror or error}"))
