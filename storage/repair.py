"""Repair without a teacher: write group metadata again, remove damaged units and stray files.

Every change is made under the lease of its shard, after one more check, since another repair may have been first.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.storage import layout
from tinymim.storage.blocks import VIEW_ARRAYS
from tinymim.storage.check import OTHER_KEYS, SHARED_VIEWS, Finding, check_unit, lease_of, uncommitted_unit
from tinymim.storage.commit import parse_commit, read_identity
from tinymim.storage.layout import LAYERS, METADATA, VIEWS, UnitId
from tinymim.storage.leases import Leases
from tinymim.storage.manifest import Layer, Manifest
from tinymim.storage.settle import MANIFEST_LEASE
from tinymim.storage.store import Store, explained_write_errors

LayerUnit = tuple[str, UnitId]  # a layer and one of its units


@dataclass
class Repaired:
    """The outcome of a repair.

    Attributes:
        rewritten: files written again.
        dropped: damaged units, removed.
        removed: files that belonged to nothing, removed.
        uncommitted: the units that the removed files were named after.
        held: findings about shards that a living writer works on, left as they are.
    """

    rewritten: list[str] = field(default_factory=list)
    dropped: list[LayerUnit] = field(default_factory=list)
    uncommitted: list[LayerUnit] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    held: list[Finding] = field(default_factory=list)


def repair(
    store: Store,
    manifest: Manifest,
    layers: Mapping[str, Layer],
    constants: Mapping[str, str | None],
    findings: Iterable[Finding],
) -> Repaired:
    """Repair all findings except those about constants, descriptions of layers and missing views.

    Args:
        store: the cache's store.
        manifest: the cache's manifest.
        layers: its target layers.
        constants: by layer, the digest of the current constants, None if there are none.
        findings: results of `survey` and `check_unit`. Damaged units are removed; the caller computes them again.

    Raises:
        UserError, StoreError: the cache cannot be written.
    """
    done = Repaired()
    by_lease: defaultdict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_lease[lease_of(finding, manifest) or MANIFEST_LEASE].append(finding)
    leases = Leases(store)
    job = _Repair(store, manifest, layers, constants, done)
    try:
        with explained_write_errors(store):
            for name, some in sorted(by_lease.items()):
                if not leases.claim(name):
                    done.held += some
                    continue
                job.run(some)
                leases.release(name)
            store.remove_dead_writes(("", *layout.view_layer_names(store), LAYERS, *map(layout.layer_folder, layers)))
    finally:
        leases.close()
    return done


def rebuild_manifest(store: Store, wanted: Manifest) -> None:
    """Replace a lost or damaged manifest by `wanted`, if it fits every readable commit record.

    Args:
        store: the cache's store.
        wanted: the manifest of the recipe that made the cache.

    Raises:
        UserError: no commit record can be read, so the cache cannot be identified.
        CacheMismatch: a record belongs to another cache.
        StoreError: the object store refuses or fails.
    """
    records = _identities(store, VIEWS)
    if not records:
        raise UserError(
            f"there is no cache at {store.place} that could be repaired",
            got="no manifest, and no commit record of the view layer that can be read",
            hint="name another folder, or remove what is left and run `tinymim cache-teacher`",
        )
    for name in sorted(store.folders(LAYERS)):
        records += [(wanted.spec_id, unit, content_hash) for _, unit, content_hash in _identities(store, name)]
    for spec_id, unit, content_hash in records:
        shard = wanted.shards.get(unit.shard)
        got = f"unit {unit} of spec {spec_id}, shard {content_hash}"
        expected = f"spec {wanted.spec_id}, shard {shard.content_hash if shard else 'in the source of the recipe'}"
        if spec_id != wanted.spec_id or shard is None or shard.content_hash != content_hash:
            raise CacheMismatch(
                f"the manifest of {store.place} cannot be rebuilt from this recipe: its units belong to another cache",
                got=got,
                expected=expected,
                hint="name the recipe that made the cache, with all its shards",
            )
    _write(store, METADATA, layout.root_group(wanted))


def rebuild_layer(store: Store, wanted: Layer) -> None:
    """Replace the lost or damaged description of a layer by `wanted`, if it fits every readable commit record of it.

    Raises:
        CacheMismatch: a record belongs to another layer.
        StoreError: the object store refuses or fails.
    """
    for spec_id, unit, _ in _identities(store, wanted.name):
        if spec_id != wanted.spec_id:
            raise CacheMismatch(
                f"layer {wanted.name} of {store.place} cannot be rebuilt from this recipe: its units are of another",
                got=f"unit {unit} of spec {spec_id}",
                expected=f"spec {wanted.spec_id}",
                hint="name the recipe that made the layer",
            )
    _write(store, f"{layout.layer_folder(wanted.name)}/{METADATA}", layout.layer_group(wanted))


def _identities(store: Store, layer: str) -> list[tuple[str, UnitId, str]]:
    """Spec, unit and content hash of every readable commit record of a layer."""
    found = []
    paths = sorted(entry.path for entry in store.list(layout.layer_folder(layer)) if entry.path.endswith(".json"))
    for path in paths:
        with suppress(OSError, ValueError, CacheMismatch):
            found.append(read_identity(store.read(path, layout.COMMIT_LIMIT_BYTES), path))
    return found


def _write(store: Store, path: str, data: bytes) -> None:
    leases = Leases(store)
    try:
        with explained_write_errors(store), leases.exclusively(MANIFEST_LEASE):
            store.write(path, data)
    finally:
        leases.close()


@dataclass
class _Repair:
    store: Store
    manifest: Manifest
    layers: Mapping[str, Layer]
    constants: Mapping[str, str | None]
    done: Repaired

    def run(self, findings: list[Finding]) -> None:
        """Repair findings under one lease, which the caller holds."""
        damaged = {(f.layer, f.unit) for f in findings if f.layer and f.unit and f.kind in ("commit", "unit")}
        for layer, unit in sorted(damaged):
            if self._is_bad(layer, unit, findings):
                self.store.remove([layout.commit_file(layer, unit), layout.unit_file(layer, unit)])
                self.done.dropped.append((layer, unit))
        for finding in findings:
            if finding.kind == "group":
                self.store.write(finding.path, self._group(finding.path))
                self.done.rewritten.append(finding.path)
            elif finding.kind == "stray":
                self._remove_stray(finding)

    def _group(self, path: str) -> bytes:
        if path == METADATA:  # read again: another job may have extended the manifest
            return layout.root_group(layout.read_manifest(self.store))
        described = [layer for name, layer in self.layers.items() if path == f"{LAYERS}/{name}/{METADATA}"]
        return layout.layer_group(described[0]) if described else layout.plain_group()

    def _remove_stray(self, finding: Finding) -> None:
        unit = uncommitted_unit(finding, self.manifest)
        if unit is not None and finding.layer is not None:
            if self.store.exists(layout.commit_file(finding.layer, unit)):
                return  # committed meanwhile
            self.done.uncommitted.append((finding.layer, unit))
        self.store.remove([finding.path])
        self.done.removed.append(finding.path)

    def _is_bad(self, layer: str, unit: UnitId, findings: list[Finding]) -> bool:
        """Whether a unit is still damaged."""
        views = layout.is_views(layer)
        spec_id = layout.view_spec_id(layer, self.manifest) if views else self.layers[layer].spec_id
        arrays = VIEW_ARRAYS if views else self.layers[layer].arrays
        try:
            data = self.store.read(layout.commit_file(layer, unit), layout.COMMIT_LIMIT_BYTES)
            info = parse_commit(self.store.place, layer, unit, data, spec_id, self.manifest)
        except FileNotFoundError:
            return False
        except (CacheCorrupt, CacheMismatch, ValueError, OSError):
            return True
        about = [finding for finding in findings if (finding.layer, finding.unit) == (layer, unit)]
        if any(finding.what.startswith((SHARED_VIEWS, OTHER_KEYS)) for finding in about):
            return True
        sizes = {entry.path: entry.size_bytes for entry in self.store.list(layout.shard_folder(layer, unit.shard))}
        wanted = None if views else self.constants.get(layer)
        return bool(check_unit(self.store, info, arrays, sizes.get(info.path))) or info.constants != wanted
