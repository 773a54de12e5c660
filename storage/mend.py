"""What can be mended in a cache without computing anything: groups written again, damaged units and strays removed.

Everything is done under the lease of its shard, and looked at once more before it goes: another repair may have put
it right meanwhile.
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
class Mended:
    """What was done, and what was not.

    Attributes:
        rewritten: files written again.
        dropped: units removed because they were damaged.
        removed: files and folders removed because they belonged to nothing.
        uncommitted: those of the folders that are named like units.
        held: findings about shards at which a living writer is at work; nothing was done about them.
    """

    rewritten: list[str] = field(default_factory=list)
    dropped: list[UnitId] = field(default_factory=list)
    uncommitted: list[UnitId] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    held: list[Finding] = field(default_factory=list)


def mend(store: Store, manifest: Manifest, constants: str | None, findings: Iterable[Finding]) -> Mended:
    """Mend all findings but those about constants.

    Args:
        store: of the cache.
        manifest: of the cache.
        constants: digest of its constants as they are now, None if it has none.
        findings: of `survey` and `check_unit`. Units among them are dropped: whoever calls can have them made again.

    Raises:
        UserError, StoreError: the cache cannot be written.
    """
    done = Mended()
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
                _mend(store, manifest, constants, some, done)
                leases.release(name)
            store.remove_dead_writes(("", COMMITS, UNITS))
    finally:
        leases.close()
    return done


def rebuild_manifest(store: Store, wanted: Manifest) -> Manifest:
    """Write a manifest again that is lost or damaged, from one that fits every commit record that can be read.

    Args:
        store: of the cache.
        wanted: of the recipe that the cache was made by.

    Returns:
        The manifest as stored: `wanted`, with as many views as the records speak of.

    Raises:
        UserError: no commit record can be read, so that nothing says what this was.
        CacheMismatch: a record belongs to something else.
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
                f"the manifest of {store.place} cannot be rebuilt from this recipe: its units are of something else",
                got=got,
                expected=expected,
                hint="name the recipe that the cache was made by, with all its shards",
            )
    manifest = replace(wanted, num_views=max(wanted.num_views, *(unit.views[-1] + 1 for _, unit, _ in records)))
    leases = Leases(store)
    try:
        with explained_write_errors(store), leases.exclusively(MANIFEST_LEASE):
            store.write(METADATA, layout.root_group(manifest))
    finally:
        leases.close()
    return manifest


def _mend(store: Store, manifest: Manifest, constants: str | None, findings: list[Finding], done: Mended) -> None:
    """Mend findings of which one lease is held."""
    for unit in sorted({finding.unit for finding in findings if finding.unit and finding.kind in ("commit", "unit")}):
        if _is_bad(store, manifest, constants, unit, findings):
            store.remove([layout.commit_file(unit)])
            store.remove_tree(layout.unit_folder(unit))
            done.dropped.append(unit)
    for finding in findings:
        if finding.kind == "group" and finding.unit not in done.dropped:
            is_root = finding.path == METADATA  # another job may have let the manifest grow since
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
    """Whether a unit is (still) not as it must be."""
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
    """The record that makes the unit in `folder`, "units/<stem>/<views>/", visible."""
    _, stem, views, _ = folder.split("/")
    return f"{COMMITS}/{stem}.{views}.json"


def _lease(finding: Finding, shards: dict[str, str]) -> str:
    """The lease under which a finding is mended."""
    if finding.unit is not None:
        return shard_lease(finding.unit.shard)
    first, _, rest = finding.path.partition("/")
    stem = rest.partition("/")[0]
    if first == UNITS and stem in shards:
        return shard_lease(shards[stem])
    return CONSTANTS_LEASE if first == CONSTANTS else MANIFEST_LEASE
