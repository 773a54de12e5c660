"""Writing a cache: any number of writers share its units. One atomic commit makes a unit visible (I7).

A writer claims a shard by a lease, writes a unit's file view by view and then its commit record. Files and records are
created, never replaced, so a writer that was wrongly taken for dead cannot change a committed unit. Nothing written
depends on time or chance: interruptions, resumes and the number of writers do not change a byte.
"""

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tinymim.configs.errors import InternalError, StoreError, UserError
from tinymim.storage import layout
from tinymim.storage.atomic import canonical_json
from tinymim.storage.blocks import VIEW_ARRAYS, Array, ArrayType, UnitFileWriter, UnitParts, key_arrays
from tinymim.storage.commit import UnitInfo, encode_commit, holds_keys, key_digest, list_units
from tinymim.storage.constants import constants_digest, constants_places, encode_constants, read_constants
from tinymim.storage.fitness import check_arrays, check_keys, problems_of
from tinymim.storage.layout import LAYERS, LEASES, VIEWS, UnitId
from tinymim.storage.leases import DEFAULT_LEASE_S, SHARDS, Holder, Leases, shard_lease
from tinymim.storage.manifest import Layer, Manifest
from tinymim.storage.settle import MANIFEST_LEASE, is_foreign, settle_layers, settle_manifest
from tinymim.storage.store import Draft, Store, explained_write_errors, open_store


class UnitTaken(UserError):
    """Another writer has taken over a unit that this writer claimed."""


class CacheGone(UserError):
    """The cache was removed or renamed while a writer was at work."""


CONSTANTS_LEASES = "constants"  # folder of the leases on the constants of a layer


def constants_lease(layer: str) -> str:
    """The lease on the constants of a layer."""
    return f"{CONSTANTS_LEASES}/{layer}"


class CacheWriter:
    """One of a cache's writers; a context manager. Create it with `CacheWriter.open`.

    One thread may claim units while another writes units claimed before.

    Attributes:
        place: the cache's folder or URL.
        store: the cache's store.
        manifest: the stored manifest, extended by the wanted shards.
        layers: the target layers that it writes, by name.
        view_layers: the view layer, then those of further sizes of these layers; it can write them all.
        environment_differences: a line for a warning per library version that differs from the stored one.
    """

    def __init__(self, store: Store, manifest: Manifest, layers: Sequence[Layer], leases: Leases) -> None:
        """Join the writers of the cache in `store`; use `open`."""
        self.store, self.place = store, store.place
        self._leases: Leases | None = leases
        # Guards `_claimed` and `_committed`. A unit being written must always be in one of them: a claim of other views
        # of its shard would else remove its files as leftovers, or release the lease that both share.
        self._lock = threading.RLock()
        self.manifest, warnings = settle_manifest(store, manifest, leases)
        self.layers, more = settle_layers(store, self.manifest, layers)
        self.view_layers = layout.view_layers(self.manifest, self.layers.values())
        self.environment_differences = list(dict.fromkeys(warnings + more))
        self._shard_of_stem = {layout.shard_stem(name): name for name in self.manifest.shards}
        self._constants = {name: constants_digest(store, layer) for name, layer in self.layers.items()}
        self._committed: dict[str, set[UnitId]] = {}
        self._claimed: set[UnitId] = set()
        groups = ("", *self.view_layers, LAYERS, *map(layout.layer_folder, self.layers))
        store.remove_dead_writes((*groups, LEASES, *(f"{LEASES}/{folder}" for folder in (SHARDS, CONSTANTS_LEASES))))
        self._clean_after_the_dead(leases)

    @classmethod
    def open(
        cls, place: str | Path, manifest: Manifest, layers: Sequence[Layer] = (), lease_s: float = DEFAULT_LEASE_S
    ) -> "CacheWriter":
        """Create the cache, or open it to write missing units. Other writers may be active.

        Manifest and layers are stored before the first unit. An existing manifest must pass `manifest.check_same` and
        is extended by new shards; existing layers must pass `check_same_layer`. Leftovers of dead writers are removed.

        Args:
            place: a folder, or the URL of a prefix in an object store.
            manifest: the wanted manifest.
            layers: the wanted target layers; others of the cache are left alone.
            lease_s: seconds without a beat after which other writers take over the units of this one.

        Raises:
            UserError: the place holds something else, or cannot be written.
            SourceError: two shards have the same name on disk.
            StoreError: the object store refuses or fails.
            CacheMismatch: the cache or the layer was made by something else.
            CacheCorrupt: its manifest or a description is damaged.
        """
        store = open_store(place)
        with explained_write_errors(store):
            if is_foreign(store):
                raise UserError(f"{store.place} is not empty and not a tinymim cache", hint="name a new folder")
            layout.check_stems(shard.name for shard in manifest.source)
            leases = Leases(store, lease_s)
            try:
                return cls(store, manifest, layers, leases)
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

    def committed(self, layer: str) -> set[UnitId]:
        """The committed units of a layer at the last `refresh`, and this writer's own since then."""
        with self._lock:
            return set(self._committed[layer] if layer in self._committed else self.refresh(layer))

    def refresh(self, layer: str) -> set[UnitId]:
        """List the committed units of a layer, of all writers.

        Raises:
            CacheGone: the cache was removed or renamed.
        """
        self._require_cache(layer)
        with self._lock:
            self._committed[layer] = set(list_units(self.store, layer, self.manifest))
            return set(self._committed[layer])

    def of_shard(self, layer: str, shard: str) -> list[UnitId]:
        """The committed units of one shard now, ascending by view; lists that shard's folder alone."""
        paths = (entry.path for entry in self.store.list(layout.shard_folder(layer, shard)))
        found = (layout.parse_commit_file(layer, path, self._shard_of_stem) for path in paths)
        return sorted(unit for unit in found if unit is not None)

    def claim(self, layer: str, unit: UnitId) -> bool:
        """`claim_for` a single layer. False if it does not lack the unit, or a living writer works on the shard."""
        return bool(self.claim_for([layer], unit))

    def claim_for(self, layers: Sequence[str], unit: UnitId) -> list[str]:
        """Claim a unit, which keeps living writers off its shard. May be called repeatedly.

        Its cost does not depend on the size of the cache.

        Returns:
            The layers that lack all views of the unit. Nothing is claimed where there are none, or where a living
            writer works on the same shard.

        Raises:
            CacheGone: the cache was removed or renamed.
            UserError, StoreError: the cache cannot be written.
        """
        self._check_unit(unit)
        leases = self._open_leases()
        with self._lock, explained_write_errors(self.store):
            new = unit not in self._claimed
            if new:
                for layer in layers:
                    self._require_cache(layer)
                if not leases.claim(shard_lease(unit.shard)):
                    return []
            lacking = [
                layer for layer in layers if not any(unit.overlaps(other) for other in self.of_shard(layer, unit.shard))
            ]
            if new and not lacking:
                self._release(unit)
            elif new:
                if not any(other.shard == unit.shard for other in self._claimed):
                    self._remove_leftovers(unit.shard)
                self._claimed.add(unit)
        return lacking

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
    def exclusively_constants(self, layer: str) -> Iterator[None]:
        """Hold the lease on a layer's constants during the block; waits while another writer holds it."""
        with explained_write_errors(self.store), self._open_leases().exclusively(constants_lease(layer)):
            yield

    # ---- constants

    def constants(self, layer: str) -> dict[str, Array] | None:
        """The current constants of a layer, None if there are none; errors of `read_constants`."""
        arrays = read_constants(self.store, self.layers[layer])
        self._constants[layer] = constants_digest(self.store, self.layers[layer])
        return arrays

    def write_constants(self, layer: str, arrays: Mapping[str, Array]) -> None:
        """Write the codec's constants before the layer's first unit, within `exclusively_constants`.

        They are durable on return. The commit records of later units hold the digest of their record.

        Args:
            layer: the target layer.
            arrays: the constants by name, each with at least one axis and a little-endian bool, integer or float dtype.

        Raises:
            UserError: the disk is full or fails.
            InternalError: an array cannot be stored, or the layer has units already; a bug of the caller.
        """
        if self._leases is None or self.committed(layer):
            raise InternalError("constants can only be written to a layer without units of an open cache")
        if problems := [problem for name, values in arrays.items() for problem in problems_of(name, values)]:
            raise InternalError(f"constants do not fit: {'; '.join(problems)}")
        self.put_constants(layer, *encode_constants(self.layers[layer], arrays))

    def put_constants(self, layer: str, data: bytes, record: bytes) -> None:
        """Write encoded constants, then their record."""
        path, record_path = constants_places(layer)
        with explained_write_errors(self.store):
            self.store.remove([record_path, path])  # the record first, so that it describes no missing file
            self.store.write(path, data)
            self.store.write(record_path, record)
        self._constants[layer] = constants_digest(self.store, self.layers[layer])

    # ---- units

    def arrays(self, layer: str) -> dict[str, ArrayType]:
        """Dtype and shape of every array of a record, by name."""
        return dict(VIEW_ARRAYS) if layout.is_views(layer) else self.layers[layer].arrays

    def begin(self, layer: str, unit: UnitId, keys: Sequence[str]) -> AbstractContextManager["UnitDraft"]:
        """A unit to be filled view by view, after a claim if there is none yet. Leaving the block drops what was not
        committed.

        Args:
            layer: one of `view_layers` or `layers`.
            unit: a shard of the manifest, and views that the layer does not hold yet.
            keys: the shard's readable sample keys, one per image, in tar order.

        Raises:
            SourceError: a key appears twice or is not Unicode.
            UserError: the disk is full or fails.
            UnitTaken: another writer holds the shard or has committed the unit.
        """
        self._check_unit(unit)
        check_keys(unit, keys)
        return self._begin(layer, unit, keys)

    @contextmanager
    def _begin(self, layer: str, unit: UnitId, keys: Sequence[str]) -> Iterator["UnitDraft"]:
        if not self.claim(layer, unit):
            raise self._taken(unit)
        with self._file(layer, unit) as file:
            yield UnitDraft(self, layer, unit, keys, file)

    @contextmanager
    def _file(self, layer: str, unit: UnitId) -> Iterator[Draft]:
        with explained_write_errors(self.store):
            self._require_lease(unit)
            with self.store.draft(layout.unit_file(layer, unit)) as file:
                yield file

    def copy_unit(self, info: UnitInfo, data: Iterable[bytes]) -> None:
        """Write the file of a unit from its bytes, which the caller has checked, and commit it; errors of `begin`."""
        if not self.claim(info.layer, info.unit):
            raise self._taken(info.unit)
        try:
            with self._file(info.layer, info.unit) as file:
                for part in data:
                    file.file.write(part)
                self.commit(info, file)
        finally:
            with suppress(OSError, StoreError, UserError):
                self.give_back(info.unit)

    def commit(self, info: UnitInfo, file: Draft) -> None:
        """Make a written file and then its commit record appear. The claim remains.

        Raises:
            UnitTaken: another writer has committed the unit, or has taken over its shard.
            CacheGone: the cache was removed or renamed.
        """
        unit, path = info.unit, layout.unit_file(info.layer, info.unit)
        self._require_cache(info.layer)
        self._require_lease(unit)
        try:
            if not file.create():
                # A writer that was taken for dead wrote it after the claim. Replace it once, if the unit is still ours.
                self._require_lease(unit)
                if self.store.exists(layout.commit_file(info.layer, unit)):
                    raise self._taken(unit)
                self.store.remove([path])
                if not file.create():
                    raise self._taken(unit)
            with self._lock:
                # Checked last, since a slow writer may have been taken over. Creation decides if both get here.
                self._require_lease(unit)
                if self.store.create_all({layout.commit_file(info.layer, unit): encode_commit(info)}):
                    raise self._taken(unit)
                self._committed.setdefault(info.layer, set()).add(unit)
        except (UnitTaken, CacheGone):
            raise
        except Exception:
            with suppress(OSError, StoreError):  # the next claim of the shard removes what is left
                self._require_lease(unit)
                self.store.remove([layout.commit_file(info.layer, unit), path])
            raise

    def drop_unit(self, layer: str, unit: UnitId) -> bool:
        """Remove a unit, its commit record first. False if a living writer works on its shard."""
        leases = self._open_leases()
        with explained_write_errors(self.store):
            if not leases.claim(shard_lease(unit.shard)):
                return False
            self.store.remove([layout.commit_file(layer, unit), layout.unit_file(layer, unit)])
            self._committed.get(layer, set()).discard(unit)
            self._release(unit)
        return True

    def constants_of(self, layer: str) -> str | None:
        """The digest of the constants that a layer's new units are made with."""
        return None if layout.is_views(layer) else self._constants[layer]

    def _require_cache(self, layer: str = VIEWS) -> None:
        for path in (layout.METADATA, f"{layout.layer_folder(layer)}/{layout.METADATA}"):
            if not self.store.exists(path):
                raise self._gone(layer, f"no {path}")
        if layer in self.layers:  # another job may have begun another cache in the same place
            stored, ours = layout.read_layer(self.store, layer, self.manifest).spec_id, self.layers[layer].spec_id
            if stored != ours:
                raise self._gone(layer, f"a layer of spec {stored}, expected {ours}")

    def _gone(self, layer: str, got: str) -> CacheGone:
        return CacheGone(
            f"the cache {self.place} is gone, or its layer {layer}",
            got=got,
            hint="it was removed or renamed during this run; restore it, or run the same command again",
        )

    def _require_lease(self, unit: UnitId) -> None:
        if not self._open_leases().holds(shard_lease(unit.shard)):
            self._require_cache()  # the lease is gone with it
            raise self._taken(unit)

    def _taken(self, unit: UnitId) -> UnitTaken:
        ours = self._open_leases().holds(shard_lease(unit.shard))
        holder = None if ours else next(iter(self.holders([unit])), None)
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
        if not 0 <= unit.first_view < unit.first_view + unit.num_views < 2**31:
            raise InternalError(f"unit {unit}: impossible views")

    # ---- leftovers of dead writers

    def _remove_leftovers(self, shard: str) -> None:
        """Remove the files of uncommitted units of a shard whose lease this writer holds, in every layer."""
        for layer in (*layout.view_layer_names(self.store), *layout.layer_names(self.store)):
            remove_uncommitted(self.store, layer, shard)

    def _clean_after_the_dead(self, leases: Leases) -> None:
        """Take over the leases of dead writers, remove their uncommitted units, and release the leases."""
        for name in sorted(leases.names()):
            if name == MANIFEST_LEASE:
                continue  # whoever needs it takes it over; here it could be that of a writer that opens right now
            shard = self._shard_of_stem.get(name.removeprefix(f"{SHARDS}/"))
            if leases.claim(name):
                if shard is not None:
                    self._remove_leftovers(shard)
                leases.release(name)


def remove_uncommitted(store: Store, layer: str, shard: str) -> None:
    """Remove what no commit record describes of a shard's units; the caller holds the shard's lease.

    Whoever held the lease before has lost it, so its unfinished writes go too, on whatever machine it ran. Files with
    other names are left alone.
    """
    folder, shards = layout.shard_folder(layer, shard), {layout.shard_stem(shard): shard}
    names = {entry.path for entry in store.list(folder)}
    records = {path: f"{path.removesuffix('.zip')}.json" for path in names if path.endswith(".zip")}
    store.remove(
        path
        for path, record in sorted(records.items())
        if record not in names and layout.parse_commit_file(layer, record, shards) is not None
    )
    store.remove_dead_writes([folder], of_the_living=True)


class UnitDraft:
    """A unit that is being written, a few views at a time; made by `CacheWriter.begin`.

    Attributes:
        unit: its shard and views.
        keys: the I sample keys.
    """

    def __init__(self, writer: CacheWriter, layer: str, unit: UnitId, keys: Sequence[str], file: Draft) -> None:
        self.layer, self.unit, self.keys = layer, unit, list(keys)
        self._writer, self._file = writer, file
        self._key_arrays = key_arrays(keys)
        self._kinds = writer.arrays(layer)
        held = self._key_arrays if holds_keys(layer, unit) else None
        self._out = UnitFileWriter(file.file, len(keys), unit.num_views, self._kinds, held)

    def add(self, arrays: Mapping[str, Array]) -> None:
        """Write the records of the next k views: by name, arrays [k, I, ...] of the layer's dtypes.

        Raises:
            UserError: the disk is full or fails.
            InternalError: the arrays do not fit; a bug of the caller.
        """
        views = check_arrays(self.unit, len(self.keys), arrays, self._kinds)
        if self._out.views_written + views > self.unit.num_views:
            raise InternalError(f"unit {self.unit}: more views than it has")
        with explained_write_errors(self._writer.store):
            for view in range(views):
                self._out.add({name: values[view] for name, values in arrays.items()})

    def commit(self, statistics: Mapping[str, Any]) -> UnitInfo:
        """Commit the unit after its last view. It is durable on return.

        Args:
            statistics: JSON values for the commit record.

        Raises:
            UserError: the disk is full or fails; the unit is not committed, and the others are intact.
            UnitTaken: another writer holds or has committed the unit.
            InternalError: views are missing; a bug of the caller.
        """
        try:
            statistics = json.loads(canonical_json(dict(statistics)))
        except (TypeError, ValueError) as error:
            raise InternalError(f"statistics of unit {self.unit} are not JSON: {error}") from error
        if self._out.views_written != self.unit.num_views:
            raise InternalError(f"unit {self.unit}: {self._out.views_written} views were added")
        writer = self._writer
        views = layout.is_views(self.layer)
        with explained_write_errors(writer.store):
            parts: UnitParts = self._out.close()
            info = UnitInfo(
                layer=self.layer,
                unit=self.unit,
                spec_id=(
                    layout.view_spec_id(self.layer, writer.manifest) if views else writer.layers[self.layer].spec_id
                ),
                content_hash=writer.manifest.shards[self.unit.shard].content_hash,
                num_images=len(self.keys),
                key_digest=key_digest(self._key_arrays),
                parts=parts,
                statistics=statistics,
                constants=writer.constants_of(self.layer),
            )
            writer.commit(info, self._file)
        return info
