"""Repair without a teacher: write group metadata again, remove damaged units and stray files.

Every change is made under the lease of its shard, after one more check, since another repair may have been first.
"""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.storage import layout
from tinymim.storage.check import SHARED_VIEWS, Finding, check_unit
from tinymim.storage.commit import parse_commit, read_identity
from tinymim.storage.layout import COMMITS, CONSTANTS, METADATA, UNITS, UnitId
from tinymim.storage.leases import Leases, shard_lease
from tinymim.storage.manifest import Manifest
from tinymim.storage.settle import MANIFEST_LEASE
from tinymim.storage.store import Store, explained_write_errors
from tinymim.storage.writer import CONSTANTS_LEASE


@dataclass
class Repaired:
    """The outcome of a repair.

    Attributes:
        rewritten: files written again.
        dropped: damaged units, removed.
        removed: files and folders that belonged to nothing, removed.
        uncommitted: the units that the removed folders were named after.
        held: findings about shards that a living writer works on, left as they are.
    """

    rewritten: list[str] = field(default_factory=list)
    dropped: list[UnitId] = field(default_factory=list)
    uncommitted: list[UnitId] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    held: list[Finding] = field(default_factory=list)


def repair(store: Store, manifest: Manifest, constants: str | None, findings: Iterable[Finding]) -> Repaired:
    """Repair all findings except those about constants.

    Args:
        store: the cache's store.
        manifest: the cache's manifest.
        constants: digest of the current constants, None if there are none.
        findings: results of `survey` and `check_unit`. Damaged units are removed; the caller computes them again.

    Raises:
        UserError, StoreError: the cache cannot be written.
    """
    done = Repaired()
    shards = {layout.shard_stem(name): name for name in manifest.shards}
    by_lease: defaultdict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_lease[_lease(finding, shards)].append(finding)
    leases = Leases(store)
    try:
        with explained_write_errors(store):
            for name, some in sorted(by_lease.items()):
                if not leases.claim(name):
                    done.held += some
                    continue
                _repair(store, manifest, constants, some, done)
                leases.release(name)
            store.remove_dead_writes(("", COMMITS, UNITS))
    finally:
        leases.close()
    return done


def rebuild_manifest(store: Store, wanted: Manifest) -> Manifest:
    """Replace a lost or damaged manifest by `wanted`, if it fits every readable commit record.

    Args:
        store: the cache's store.
        wanted: the manifest of the recipe that made the cache.

    Returns:
        The manifest as stored: `wanted`, with `num_views` raised to the views of the records.

    Raises:
        UserError: no commit record can be read, so the cache cannot be identified.
        CacheMismatch: a record belongs to another cache.
        StoreError: the object store refuses or fails.
    """
    records = []
    for path in sorted(entry.path for entry in store.list(COMMITS)):
        with suppress(FileNotFoundError, ValueError, CacheMismatch):
            records.append(read_identity(store.read(path, layout.COMMIT_LIMIT_BYTES), path))
    if not records:
        raise UserError(
            f"there is no cache at {store.place} that could be repaired",
            got="no manifest, and no commit record that can be read",
            hint="name another folder, or remove what is left and run `tinymim cache-teacher`",
        )
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
    manifest = replace(wanted, num_views=max(wanted.num_views, *(unit.views[-1] + 1 for _, unit, _ in records)))
    leases = Leases(store)
    try:
        with explained_write_errors(store), leases.exclusively(MANIFEST_LEASE):
            store.write(METADATA, layout.root_group(manifest))
    finally:
        leases.close()
    return manifest


def _repair(store: Store, manifest: Manifest, constants: str | None, findings: list[Finding], done: Repaired) -> None:
    """Repair findings under one lease, which the caller holds."""
    for unit in sorted({finding.unit for finding in findings if finding.unit and finding.kind in ("commit", "unit")}):
        if _is_bad(store, manifest, constants, unit, findings):
            store.remove([layout.commit_file(unit)])
            store.remove_tree(layout.unit_folder(unit))
            done.dropped.append(unit)
    for finding in findings:
        if finding.kind == "group" and finding.unit not in done.dropped:
            is_root = finding.path == METADATA  # read again below: another job may have extended the manifest
            store.write(
                finding.path, layout.root_group(layout.read_manifest(store)) if is_root else layout.plain_group()
            )
            done.rewritten.append(finding.path)
        if finding.kind == "stray" and not finding.path.endswith("/"):
            store.remove([finding.path])
            done.removed.append(finding.path)
        elif finding.kind == "stray" and not store.exists(_commit_of(finding.path)):
            store.remove_tree(finding.path[:-1])
            done.removed.append(finding.path)
            was = layout.parse_commit_file(_commit_of(finding.path), {layout.shard_stem(n): n for n in manifest.shards})
            done.uncommitted += [was] if was is not None else []


def _is_bad(store: Store, manifest: Manifest, constants: str | None, unit: UnitId, findings: list[Finding]) -> bool:
    """Whether a unit is still damaged."""
    path = layout.commit_file(unit)
    try:
        info = parse_commit(store.place, path, store.read(path, layout.COMMIT_LIMIT_BYTES), manifest)
    except FileNotFoundError:
        return False
    except (CacheCorrupt, CacheMismatch, ValueError, OSError):
        return True
    if any(finding.unit == unit and finding.what.startswith(SHARED_VIEWS) for finding in findings):
        return True
    damage = [finding for finding in check_unit(store, info) if finding.kind == "unit"]
    return bool(damage) or info.constants != constants


def _commit_of(folder: str) -> str:
    """The commit record of the unit in `folder`, "units/<stem>/<views>/"."""
    _, stem, views, _ = folder.split("/")
    return f"{COMMITS}/{stem}.{views}.json"


def _lease(finding: Finding, shards: dict[str, str]) -> str:
    """The lease under which a finding is repaired."""
    if finding.unit is not None:
        return shard_lease(finding.unit.shard)
    first, _, rest = finding.path.partition("/")
    stem = rest.partition("/")[0]
    if first == UNITS and stem in shards:
        return shard_lease(shards[stem])
    return CONSTANTS_LEASE if first == CONSTANTS else MANIFEST_LEASE
