"""Writing a cache: any number of writers share its units. One atomic commit makes a unit visible (I7).

A writer claims a unit by a lease on its shard, writes the unit's files and then its commit record. Files and records
are created, never replaced, so a writer that was wrongly taken for dead cannot change a committed unit. Nothing
written depends on time or chance: interruptions, resumes and the number of writers do not change a byte.
"""

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt

from tinymim.configs.errors import InternalError, StoreError, UserError
from tinymim.storage import layout
from tinymim.storage.atomic import canonical_json
from tinymim.storage.commit import UnitInfo, described, encode_commit, key_digest, read_commits
from tinymim.storage.constants import constants_digest, constants_files, read_constants
from tinymim.storage.fitness import check_arrays, check_keys, problems_of
from tinymim.storage.layout import COMMITS, CONSTANTS, CONSTANTS_RECORD, LEASES, METADATA, UNITS, UnitId
from tinymim.storage.leases import DEFAULT_LEASE_S, Holder, Leases, shard_lease
from tinymim.storage.manifest import Manifest
from tinymim.storage.settle import is_foreign, settle_manifest
from tinymim.storage.store import Store, explained_write_errors, open_store

CONSTANTS_LEASE = "constants"


class UnitTaken(UserError):
    """Another writer has taken over a unit that this writer claimed."""


class CacheWriter:
    """One of a cache's writers; a context manager. Create it with `CacheWriter.open`.

    One thread may claim units while another writes units claimed before.

    Attributes:
        place: the cache's folder or URL.
        store: the cache's store.
        manifest: the stored manifest, extended by the wanted shards and views.
        environment_differences: a line for a warning per library version that differs from the manifest's.
    """

    def __init__(self, store: Store, manifest: Manifest, leases: Leases) -> None:
        """Join the writers of the cache in `store`; use `open`."""
        self.store, self.place = store, store.place
        self._leases: Leases | None = leases
        # Guards `_claimed` and `_committed`. A unit being written must always be in one of them: a claim of other views
        # of its shard would else remove its files as leftovers, or release the lease that both share.
        self._lock = threading.RLock()
        self.manifest, self.environment_differences = settle_manifest(store, manifest, leases)
        self._shard_of_stem = {layout.shard_stem(name): name for name in self.manifest.shards}
        self._constants = constants_digest(store, self.manifest)
        self._committed = {info.unit for info in read_commits(store, self.manifest, self._constants)}
        self._claimed: set[UnitId] = set()
        store.remove_dead_writes(("", COMMITS, UNITS, LEASES, f"{LEASES}/{UNITS}"))
        self._clean_after_the_dead(leases)

    @classmethod
    def open(cls, place: str | Path, manifest: Manifest, lease_s: float = DEFAULT_LEASE_S) -> "CacheWriter":
        """Create the cache, or open it to write missing units. Other writers may be active.

        The manifest is stored before the first unit. An existing manifest must pass `manifest.check_same` and is
        extended by new shards and a larger `num_views`. Leftovers of dead writers are removed.

        Args:
            place: a folder, or the URL of a prefix in an object store.
            manifest: the wanted manifest.
            lease_s: seconds without a beat after which other writers take over the units of this one.

        Raises:
            UserError: the place holds something else, or cannot be written.
            SourceError: two shards have the same name on disk.
            StoreError: the object store refuses or fails.
            CacheMismatch: the cache was made by something else.
            CacheCorrupt: its manifest or a commit record is damaged.
        """
        store = open_store(place)
        with explained_write_errors(store):
            if is_foreign(store):
                raise UserError(f"{store.place} is not empty and not a tinymim cache", hint="name a new folder")
            layout.check_stems(shard.name for shard in manifest.source)
            leases = Leases(store, lease_s)
            try:
                return cls(store, manifest, leases)
            except BaseException:
                leases.close()
                raise

    def close(self) -> None:
        """Release all claims. May be called repeatedly."""
        if self._leases is not None:
            self._leases.close()
            self._leases = None

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- sharing the work

    def committed(self) -> set[UnitId]:
        """The committed units at the last `refresh`, and this writer's own since then."""
        return set(self._committed)

    def refresh(self) -> set[UnitId]:
        """List the committed units of all writers."""
        with self._lock:
            found = (layout.parse_commit_file(entry.path, self._shard_of_stem) for entry in self.store.list(COMMITS))
            self._committed = {unit for unit in found if unit is not None}
            return self.committed()

    def claim(self, unit: UnitId) -> bool:
        """Claim a unit, which keeps living writers off its shard. May be called repeatedly.

        Returns:
            False if a living writer works on the same shard, or some of the views are already committed.

        Raises:
            UserError, StoreError: the cache cannot be written.
        """
        self._check_unit(unit)
        if unit in self._claimed:
            return True
        leases = self._open_leases()
        with self._lock, explained_write_errors(self.store):
            if not leases.claim(shard_lease(unit.shard)):
                return False
            if any(other.shard == unit.shard and set(other.views) & set(unit.views) for other in self.refresh()):
                self._release(unit)
                return False
            self._remove_leftovers(unit.shard)
            self._claimed.add(unit)
        return True

    def give_back(self, unit: UnitId) -> None:
        """Release a claim, so that other writers can take the unit. May be called without a claim."""
        with self._lock, explained_write_errors(self.store):
            self._claimed.discard(unit)
            self._release(unit)

    def holders(self, units: Iterable[UnitId]) -> list[Holder]:
        """The lease owners of the shards of `units`, where they can be read."""
        leases = self._open_leases()
        found = (leases.holder(shard_lease(shard)) for shard in sorted({unit.shard for unit in units}))
        return sorted({holder for holder in found if holder is not None}, key=str)

    @contextmanager
    def exclusively_constants(self) -> Iterator[None]:
        """Hold the lease on the constants during the block; waits while another writer holds it."""
        with explained_write_errors(self.store), self._open_leases().exclusively(CONSTANTS_LEASE):
            yield

    # ---- writing

    def constants(self) -> dict[str, npt.NDArray[Any]] | None:
        """The cache's current constants, None if there are none; errors of `read_constants`."""
        arrays = read_constants(self.store, self.manifest)
        self._constants = constants_digest(self.store, self.manifest)
        return arrays

    def write_constants(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write the codec's constants before the first unit, within `exclusively_constants`.

        They are durable on return. The commit records of later units hold their digest.

        Args:
            arrays: the constants by name, each with at least one axis and a little-endian bool, integer or float dtype.

        Raises:
            UserError: the disk is full or fails.
            InternalError: an array cannot be stored, or the cache has units already; a bug of the caller.
        """
        if self._committed or self._leases is None:
            raise InternalError("constants can only be written to an open cache without units")
        if problems := [problem for name, values in arrays.items() for problem in problems_of(name, values)]:
            raise InternalError(f"constants do not fit: {'; '.join(problems)}")
        self.put_constants(*constants_files(self.manifest.spec_id, arrays))

    def put_constants(self, files: Mapping[str, bytes], record: bytes) -> None:
        """Write encoded constants: the group's files by path relative to it, then their record."""
        with explained_write_errors(self.store):
            self.store.remove([CONSTANTS_RECORD])  # first, so that no record describes missing files
            self.store.remove_tree(CONSTANTS)
            self.store.create_all({f"{CONSTANTS}/{name}": data for name, data in files.items()})
            self.store.write(CONSTANTS_RECORD, record)
        self._constants = constants_digest(self.store, self.manifest)

    def write_unit(
        self,
        unit: UnitId,
        keys: Sequence[str],
        arrays: Mapping[str, npt.NDArray[Any]],
        statistics: Mapping[str, Any],
    ) -> UnitInfo:
        """Write one unit and commit it, after a claim if there is none yet. It is durable on return.

        Args:
            unit: a shard of the manifest, and views that are not yet in the cache.
            keys: the shard's readable sample keys, one per image, in tar order.
            arrays: the arrays by name, first axis R = len(keys) * unit.num_views records; the views of one image are
                contiguous (`UnitId.row`). `layout.BASE_ARRAYS` are required; the codec's arrays are of any
                bool, integer or float dtype in little-endian order.
            statistics: JSON values for the commit record.

        Raises:
            SourceError: a key appears twice or is not Unicode.
            UserError: the disk is full or fails; the unit is not committed, and the others are intact.
            UnitTaken: another writer holds or has committed the unit.
            InternalError: the arguments do not fit each other; a bug of the caller.
        """
        self._check_unit(unit)
        check_keys(unit, keys)
        check_arrays(unit, len(keys) * unit.num_views, arrays)
        try:
            statistics = json.loads(canonical_json(dict(statistics)))
        except (TypeError, ValueError) as error:
            raise InternalError(f"statistics of unit {unit} are not JSON: {error}") from error
        key_arrays = layout.encode_keys(keys)
        info = UnitInfo(
            unit=unit,
            spec_id=self.manifest.spec_id,
            content_hash=self.manifest.shards[unit.shard].content_hash,
            num_images=len(keys),
            num_records=len(keys) * unit.num_views,
            key_digest=key_digest(key_arrays),
            files={},
            statistics=statistics,
            constants=self._constants,
        )
        encoded = (layout.encode_array(name, values) for name, values in (key_arrays | dict(arrays)).items())
        return self.put_unit(info, encoded)

    def put_unit(self, info: UnitInfo, parts: Iterable[Mapping[str, bytes]]) -> UnitInfo:
        """Write and commit an encoded unit; errors of `write_unit`.

        Args:
            info: the commit record; `files` is ignored.
            parts: the arrays' files by path relative to the unit's folder, in parts that are written in turn.

        Returns:
            `info` with its `files`.
        """
        unit, folder = info.unit, layout.unit_folder(info.unit)
        if not self.claim(unit):
            raise self._taken(unit)
        with explained_write_errors(self.store):
            try:
                group = layout.plain_group()
                self._create({f"{path}/{METADATA}": group for path in (UNITS, layout.shard_folder(unit.shard))}, unit)
                files = {METADATA: group}
                self._create({f"{folder}/{METADATA}": group}, unit)
                stored = described(files)
                for part in parts:
                    self._create({f"{folder}/{name}": data for name, data in part.items()}, unit)
                    stored |= described(part)
                info = replace(info, files=dict(sorted(stored.items())))
                with self._lock:
                    # Checked last, since a slow writer may have been taken over. Creation decides if both get here.
                    self._require_lease(unit)
                    if self.store.create_all({layout.commit_file(unit): encode_commit(info)}):
                        raise self._taken(unit)
                    self._committed.add(unit)
            except UnitTaken:
                raise
            except Exception:
                with suppress(OSError, StoreError):  # the next claim of the shard removes what is left
                    self._require_lease(unit)
                    self.store.remove([layout.commit_file(unit)])
                    self.store.remove_tree(folder)
                raise
            finally:
                with suppress(OSError, StoreError, UserError):
                    self.give_back(unit)
        return info

    def drop_unit(self, unit: UnitId) -> bool:
        """Remove a unit, its commit record first. False if a living writer works on its shard."""
        leases = self._open_leases()
        with explained_write_errors(self.store):
            if not leases.claim(shard_lease(unit.shard)):
                return False
            self.store.remove([layout.commit_file(unit)])
            self.store.remove_tree(layout.unit_folder(unit))
            self._committed.discard(unit)
            self._release(unit)
        return True

    def _create(self, files: Mapping[str, bytes], unit: UnitId) -> None:
        """Create files of `unit`."""
        self._require_lease(unit)
        if others := self.store.create_all(files):
            # A writer that was taken for dead wrote them after the claim. Replace them once, if the unit is still ours.
            self._require_lease(unit)
            self.store.remove(others)
            if self.store.create_all({path: files[path] for path in others}):
                raise self._taken(unit)

    def _require_lease(self, unit: UnitId) -> None:
        if not self._open_leases().holds(shard_lease(unit.shard)):
            raise self._taken(unit)

    def _taken(self, unit: UnitId) -> UnitTaken:
        holder = next(iter(self.holders([unit])), None)
        return UnitTaken(f"unit {unit} of {self.place} is another writer's", got=holder or "the unit is committed")

    def _release(self, unit: UnitId) -> None:
        if not any(other.shard == unit.shard for other in self._claimed):
            self._open_leases().release(shard_lease(unit.shard))

    def _open_leases(self) -> Leases:
        if self._leases is None:
            raise InternalError("the cache writer is closed")
        return self._leases

    def _check_unit(self, unit: UnitId) -> None:
        self._open_leases()
        if unit.shard not in self.manifest.shards:
            raise InternalError(f"unit {unit}: its shard is not in the manifest")
        if not 0 <= unit.first_view < unit.first_view + unit.num_views <= self.manifest.num_views:
            raise InternalError(f"unit {unit}: views outside 0..{self.manifest.num_views - 1}")

    # ---- leftovers of dead writers

    def _remove_leftovers(self, shard: str) -> None:
        """Remove uncommitted units of a shard whose lease this writer holds."""
        folder = layout.shard_folder(shard)
        kept = {unit.view_range for unit in self._committed | self._claimed if unit.shard == shard}
        for name in self.store.folders(folder) - kept:
            self.store.remove_tree(f"{folder}/{name}")
        self.store.remove_dead_writes([folder])

    def _clean_after_the_dead(self, leases: Leases) -> None:
        """Take over the leases of dead writers, remove their uncommitted units, and release the leases."""
        for name in sorted(leases.names()):
            shard = self._shard_of_stem.get(name.removeprefix(f"{UNITS}/"))
            if leases.claim(name):
                if shard is not None:
                    self.refresh()
                    self._remove_leftovers(shard)
                leases.release(name)
