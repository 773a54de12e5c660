"""The stored manifest of a cache and its layers: the first writer creates them, later writers extend the source."""

from collections.abc import Iterable

from tinymim.configs.errors import CacheCorrupt
from tinymim.storage import layout
from tinymim.storage.layout import LAYERS, LEASES, METADATA
from tinymim.storage.leases import Leases
from tinymim.storage.manifest import Layer, Manifest, check_same, check_same_layer, grown
from tinymim.storage.store import Store

MANIFEST_LEASE = "manifest"


def is_foreign(store: Store) -> bool:
    """Whether a place holds files but no cache. Leases may remain from a writer that died before its manifest."""
    if store.exists(METADATA):
        return False
    occupied = any(not entry.path.startswith(f"{LEASES}/") for entry in store.list())
    # Checked again: another writer may create the cache right now, and its manifest comes first.
    return occupied and not store.exists(METADATA)


def settle_manifest(store: Store, wanted: Manifest, leases: Leases) -> tuple[Manifest, list[str]]:
    """Store the wanted manifest in a new cache, else extend the source of the stored one.

    Returns:
        The manifest now stored, and one line per difference of environment.
    """
    if not store.exists(METADATA):
        with leases.exclusively(MANIFEST_LEASE):
            if not store.create_all({METADATA: layout.root_group(wanted)}):
                return wanted, []
    stored = layout.read_manifest(store)
    warnings = check_same(stored, wanted)
    if _after_growth(stored, wanted) != stored:
        with leases.exclusively(MANIFEST_LEASE):
            stored = layout.read_manifest(store)  # another writer may have extended it
            check_same(stored, wanted)
            stored = _after_growth(stored, wanted)
            store.write(METADATA, layout.root_group(stored))
    return stored, warnings


def settle_layers(store: Store, manifest: Manifest, wanted: Iterable[Layer]) -> tuple[dict[str, Layer], list[str]]:
    """Store the descriptions of new layers, and compare those of existing ones.

    Returns:
        The layers as stored, and one line per difference of environment.
    """
    found: dict[str, Layer] = {}
    warnings: list[str] = []
    wanted = list(wanted)
    groups = {f"{name}/{METADATA}": layout.plain_group() for name in (*layout.view_layers(manifest, wanted), LAYERS)}
    store.create_all({path: data for path, data in groups.items() if not store.exists(path)})
    for layer in wanted:
        path = f"{layout.layer_folder(layer.name)}/{METADATA}"
        if layer.cache != manifest.spec_id:
            raise CacheCorrupt(f"layer {layer.name} is of another cache", got=layer.cache, expected=manifest.spec_id)
        if not store.exists(path):
            store.create_all({path: layout.layer_group(layer)})
        stored = layout.read_layer(store, layer.name, manifest)
        warnings += check_same_layer(stored, layer)
        found[layer.name] = stored
    return found, list(dict.fromkeys(warnings))


def _after_growth(stored: Manifest, wanted: Manifest) -> Manifest:
    result = grown(stored, wanted)
    layout.check_stems(shard.name for shard in result.source)
    return result
