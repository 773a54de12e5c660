"""The stored manifest of a cache: the first writer creates it, later writers extend it."""

from tinymim.storage import layout
from tinymim.storage.layout import LEASES, METADATA
from tinymim.storage.leases import Leases
from tinymim.storage.manifest import Manifest, check_same, grown
from tinymim.storage.store import Store

MANIFEST_LEASE = "manifest"


def is_foreign(store: Store) -> bool:
    """Whether a place holds files but no cache. Leases may remain from a writer that died before its manifest."""
    occupied = any(not entry.path.startswith(f"{LEASES}/") and entry.path != ".lock" for entry in store.list())
    # Checked last: another writer may create the cache right now, and its manifest comes first.
    return occupied and not store.exists(METADATA)


def settle_manifest(store: Store, wanted: Manifest, leases: Leases) -> tuple[Manifest, list[str]]:
    """Store the wanted manifest in a new cache, else extend the stored one.

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


def _after_growth(stored: Manifest, wanted: Manifest) -> Manifest:
    result = grown(stored, wanted)
    layout.check_stems(shard.name for shard in result.source)
    return result
