"""The manifest of a cache: stored by the first of its writers, grown by others, and no stranger's files beside it."""

from tinymim.storage import layout
from tinymim.storage.layout import LEASES, METADATA
from tinymim.storage.leases import Leases
from tinymim.storage.manifest import Manifest, check_same, grown
from tinymim.storage.store import Store

MANIFEST_LEASE = "manifest"


def is_foreign(store: Store) -> bool:
    """Whether a place holds anything but what a writer that died before its manifest may have left."""
    strangers = any(not entry.path.startswith(f"{LEASES}/") and entry.path != ".lock" for entry in store.list())
    # Looked for last: another writer may be making the cache at this moment, and its manifest comes first.
    return strangers and not store.exists(METADATA)


def settle_manifest(store: Store, wanted: Manifest, leases: Leases) -> tuple[Manifest, list[str]]:
    """The manifest now stored: the wanted one in a new cache, else the stored one, grown."""
    if not store.exists(METADATA):
        with leases.exclusively(MANIFEST_LEASE):
            if not store.create_all({METADATA: layout.root_group(wanted)}):
                return wanted, []
    stored = layout.read_manifest(store)
    warnings = check_same(stored, wanted)
    if _after_growth(stored, wanted) != stored:
        with leases.exclusively(MANIFEST_LEASE):
            stored = layout.read_manifest(store)  # another writer may have let it grow meanwhile
            check_same(stored, wanted)
            stored = _after_growth(stored, wanted)
            store.write(METADATA, layout.root_group(stored))
    return stored, warnings


def _after_growth(stored: Manifest, wanted: Manifest) -> Manifest:
    result = grown(stored, wanted)
    layout.check_stems(shard.name for shard in result.source)
    return result
