"""Reading a cache: committed units only, by view, checksums before decoding.

A reader opens the manifest and the layers' descriptions. Commit records are listed and parsed when a layer is first
asked for its units.
"""

import itertools
import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from google_crc32c import value as crc32c

from tinymim.configs.errors import CacheCorrupt, UserError
from tinymim.storage import layout
from tinymim.storage.blocks import VIEW_ARRAYS, ZSTD_MOST, Array, ArrayType, Block, decode_keys, decode_view
from tinymim.storage.commit import (
    UnitInfo,
    corrupt_unit,
    holds_keys,
    key_digest,
    parse_commit,
    read_commits,
    signed,
)
from tinymim.storage.constants import constants_digest, read_constants, read_record
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.manifest import Layer, Manifest
from tinymim.storage.packed import open_cache_store
from tinymim.storage.store import Store

_RUN_BYTES: Final = 2**25  # of views that are fetched together


@dataclass(frozen=True)
class Coverage:
    """The share of its source that a layer holds.

    Attributes:
        num_shards: source shards of the manifest.
        begun_shards: source shards with any view.
        complete_shards: source shards with the views 0 .. `complete_views` - 1.
        complete_views: the largest number of views, from view 0 on, that every begun shard has.
        most_views: the largest number of views, from view 0 on, that some shard has.
        num_images: readable images of the shards that hold view 0.
        num_records: stored records.
    """

    num_shards: int
    begun_shards: int
    complete_shards: int
    complete_views: int
    most_views: int
    num_images: int
    num_records: int

    @property
    def complete(self) -> bool:
        """Whether every shard has every view that some shard has."""
        return self.begun_shards == self.num_shards and self.complete_views == self.most_views

    def __str__(self) -> str:
        views = (
            f"{self.complete_views}"
            if self.complete_views == self.most_views
            else (f"{self.complete_views} to {self.most_views}")
        )
        return (
            f"{self.begun_shards:,} of {self.num_shards:,} shards with {views} views of each image, "
            f"{self.num_records:,} records"
        )


def views_from_zero(infos: Sequence[UnitInfo]) -> int:
    """The number of views 0 .. n - 1 that units of one shard, ascending by view, hold without a gap."""
    held = 0
    for info in infos:
        if info.unit.first_view > held:
            break
        held = max(held, info.unit.first_view + info.unit.num_views)
    return held


class CacheReader:
    """A snapshot of a cache; a later reader sees units that are committed later. Picklable; threads may share it.

    Args:
        place: the cache's folder, or its URL in an object store.

    Attributes:
        place: the folder as an absolute path, or the URL.
        store: the cache's store.
        manifest: the stored manifest; compare it with `manifest.check_same` before using a record.
        layers: the target layers by name.
        view_layers: the view layer, then those of further sizes.

    Raises:
        UserError: there is no cache at `place`.
        StoreError: the object store refuses or fails.
        CacheMismatch: a format version is unknown.
        CacheCorrupt: the manifest or a layer's description is damaged.
    """

    def __init__(self, place: str | Path) -> None:
        self.store: Store = open_cache_store(place)
        self.place = self.store.place
        self.manifest: Manifest = layout.read_manifest(self.store)
        names = layout.layer_names(self.store)
        self.layers: dict[str, Layer] = {name: layout.read_layer(self.store, name, self.manifest) for name in names}
        self.view_layers: list[str] = layout.view_layers(self.manifest, self.layers.values())
        self._units: dict[str, list[UnitInfo]] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def layer(self, name: str | None = None) -> Layer:
        """The target layer of that name; None: the only one.

        Raises:
            UserError: there is no such layer, or there are several; lists them.
        """
        if name is None and len(self.layers) == 1:
            return next(iter(self.layers.values()))
        if name in self.layers:
            return self.layers[name]
        listing = ", ".join(self.layers) or "no target layer"
        if name is None:
            raise UserError(
                f"the cache {self.place} has {len(self.layers)} target layers",
                got=listing,
                expected="one, or a recipe that names one",
                hint="name it with `layer` in the recipe" if self.layers else "run `tinymim cache-teacher`",
            )
        raise UserError(f"the cache {self.place} has no layer {name}", got=listing, hint="name one of these layers")

    def units(self, layer: str = VIEWS, paths: Iterable[str] | None = None) -> list[UnitInfo]:
        """The committed units of a layer in source order, then by view; read once.

        Args:
            layer: the view layer or a target layer.
            paths: the paths of the cache's files, where they have been listed.

        Raises:
            CacheMismatch, CacheCorrupt: as `read_commits`.
        """
        with self._lock:
            if layer not in self._units:
                self._units[layer] = self._committed(layer, paths)
            return list(self._units[layer])

    def of_shard(self, layer: str, shard: str) -> list[UnitInfo]:
        """The units of one shard as they are now, ascending by view; errors of `units`.

        A shard that the manifest did not have is looked for in the manifest as it is now.
        """
        if shard not in self.manifest.shards:
            self.manifest = layout.read_manifest(self.store)
            if shard not in self.manifest.shards:
                return []
        return self._committed(layer, [entry.path for entry in self.store.list(layout.shard_folder(layer, shard))])

    def _committed(self, layer: str, paths: Iterable[str] | None) -> list[UnitInfo]:
        constants = None if layout.is_views(layer) else constants_digest(self.store, self.layer(layer))
        return read_commits(self.store, layer, self._spec_id(layer), self.manifest, constants, paths)

    def unit(self, layer: str, unit: UnitId) -> UnitInfo:
        """One committed unit as it is now, also if it was committed after the others were listed.

        Raises:
            CacheMismatch, CacheCorrupt: as `parse_commit`; also where the record is missing.
        """
        try:
            data = self.store.read(layout.commit_file(layer, unit), layout.COMMIT_LIMIT_BYTES)
        except FileNotFoundError as error:
            raise corrupt_unit(self.place, unit, f"layer {layer} holds no record of it") from error
        return parse_commit(self.place, layer, unit, data, self._spec_id(layer), self.manifest)

    def _spec_id(self, layer: str) -> str:
        return layout.view_spec_id(layer, self.manifest) if layout.is_views(layer) else self.layer(layer).spec_id

    def by_shard(self, layer: str = VIEWS) -> dict[str, list[UnitInfo]]:
        """The committed units of a layer by shard name, ascending by view."""
        groups = itertools.groupby(self.units(layer), key=lambda info: info.unit.shard)
        return {shard: list(infos) for shard, infos in groups}

    def coverage(self, layer: str = VIEWS) -> Coverage:
        """Count the shards, views and records of a layer's committed units."""
        units = self.by_shard(layer)
        views = {shard: views_from_zero(infos) for shard, infos in units.items()}
        least = min(views.values(), default=0)
        return Coverage(
            num_shards=len(self.manifest.shards),
            begun_shards=len(units),
            complete_shards=sum(held >= least > 0 for held in views.values()),
            complete_views=least,
            most_views=max(views.values(), default=0),
            num_images=sum(infos[0].num_images for infos in units.values() if infos[0].unit.first_view == 0),
            num_records=sum(info.num_records for infos in units.values() for info in infos),
        )

    def arrays(self, layer: str) -> dict[str, ArrayType]:
        """Dtype and shape of every array of a record, by name."""
        return dict(VIEW_ARRAYS) if layout.is_views(layer) else self.layer(layer).arrays

    def constants(self, layer: str) -> dict[str, Array] | None:
        """The constants of a target layer; errors of `read_constants`."""
        return read_constants(self.store, self.layer(layer))

    def read_views(
        self, info: UnitInfo, views: Sequence[int] | None = None, arrays: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Read the records of some views of a unit; nothing else of its file is read or checked.

        Args:
            info: one of `units(layer)`.
            views: k view indices of the unit, ascending; None: all.
            arrays: names of the arrays to decode; None: all.

        Returns:
            By name, arrays [k, I, ...]. Adjacent views cost one request to an object store. Memory grows with k; a
            pass over many views takes `each_view`.

        Raises:
            CacheCorrupt: the file is missing, or these bytes of it changed; names unit and view.
            StoreError: the object store refuses or fails.
        """
        chosen, wanted = self._wanted(info, views, arrays)
        found: dict[str, Array] = {}
        for row, (view, block) in enumerate(zip(chosen, self._blocks(info, chosen), strict=True)):
            if not found:  # not before the first block is here: sizes may be forged
                found = _empty(wanted, len(chosen), info.num_images)
            self._decode(info, view, block, {name: values[row] for name, values in found.items()})
        return found or _empty(wanted, 0, info.num_images)

    def each_view(
        self, info: UnitInfo, views: Sequence[int] | None = None, arrays: Sequence[str] | None = None
    ) -> Iterator[tuple[int, dict[str, Array]]]:
        """Read views one after the other, for passes over many: one decoded view is in memory.

        Arguments and errors are those of `read_views`; an object store gets one request per 32 MiB of adjacent views.

        Yields:
            A view index, and by name arrays [I, ...].
        """
        chosen, wanted = self._wanted(info, views, arrays)
        for run in _runs(chosen, {view: self._block(info, view).size_bytes for view in chosen}):
            for view, block in zip(run, self._blocks(info, run), strict=True):
                found = _empty(wanted, info.num_images)
                self._decode(info, view, block, found)
                yield view, found

    def read_keys(self, info: UnitInfo) -> list[str]:
        """The I distinct sample keys in tar order.

        Args:
            info: a unit of the view layer that begins at view 0.

        Raises:
            CacheCorrupt: as `read_views`.
        """
        assert holds_keys(info.layer, info.unit) and info.parts.keys is not None, info
        begin = info.parts.head.size_bytes
        [block] = self._parts(info, [(begin, begin + info.parts.keys.size_bytes)])
        self._check(info, block, info.parts.keys, "the keys")
        try:
            self._refuse_more(info, 8 * info.num_images, len(block), "the keys")
            arrays, keys = decode_keys(block.data, info.num_images)
        except (ValueError, RuntimeError) as error:
            raise corrupt_unit(self.place, info, f"the keys cannot be decoded: {error}") from error
        if key_digest(arrays) != info.key_digest:
            raise corrupt_unit(self.place, info, "the keys do not have the committed key_digest")
        if repeated := [key for key, count in Counter(keys).items() if count > 1]:
            raise corrupt_unit(self.place, info, f"{len(repeated)} key(s) appear twice", got=repr(repeated[0]))
        return keys

    def keys(self, shard: str) -> list[str]:
        """The sample keys of a shard in tar order, from the view layer.

        Raises:
            CacheCorrupt: the view layer does not hold view 0 of the shard; or as `read_keys`.
        """
        for info in self.by_shard().get(shard, ()):
            if holds_keys(info.layer, info.unit):
                return self.read_keys(info)
        raise CacheCorrupt(
            f"the view layer of {self.place} holds no keys of shard {shard}",
            got="no unit that begins at view 0",
            hint="run `tinymim cache-teacher` with the recipe that made the cache",
        )

    def bytes_by_component(self) -> dict[str, dict[str, int]]:
        """Bytes on disk by layer, and by component: "records", "keys", "overhead" (metadata and commit records)."""
        found: dict[str, dict[str, int]] = {}
        for layer in (*self.view_layers, *self.layers):
            total = Counter(records=0, keys=0, overhead=0)
            views = layout.is_views(layer)
            group = layout.plain_group() if views else layout.layer_group(self.layers[layer])
            total["overhead"] += len(group)
            if not views and (record := read_record(self.store, self.layers[layer])[0]) is not None:
                total["constants"] = record.size_bytes
                total["overhead"] += len(signed(record.model_dump()))
            for info in self.units(layer):
                parts = info.parts
                total["records"] += sum(block.size_bytes for block in parts.views)
                total["keys"] += 0 if parts.keys is None else parts.keys.size_bytes
                total["overhead"] += parts.head.size_bytes + parts.tail.size_bytes + info.record_bytes
            found[layer] = dict(total)
        root = self.store.read(layout.METADATA, layout.MANIFEST_LIMIT_BYTES)
        found[VIEWS]["overhead"] += len(root) + len(layout.plain_group())  # of `layers`
        return found

    def _wanted(
        self, info: UnitInfo, views: Sequence[int] | None, arrays: Sequence[str] | None
    ) -> tuple[list[int], dict[str, ArrayType]]:
        """The views and the arrays to read."""
        chosen = list(info.unit.views if views is None else views)
        kinds = self.arrays(info.layer)
        unknown = set(arrays or ()) - kinds.keys()
        if unknown or not set(chosen) <= set(info.unit.views):
            raise corrupt_unit(self.place, info, f"it does not hold {sorted(unknown) or chosen}", expected=list(kinds))
        return chosen, {name: kinds[name] for name in (kinds if arrays is None else arrays)}

    def _block(self, info: UnitInfo, view: int) -> Block:
        return info.parts.views[view - info.unit.first_view]

    def _blocks(self, info: UnitInfo, views: Sequence[int]) -> Iterator[Array]:
        """The checked bytes of views in turn; a folder's are in memory one at a time."""
        places, first = info.parts.places(), info.unit.first_view
        raw = info.num_images * sum(
            math.prod(shape) * dtype.itemsize for dtype, shape in self.arrays(info.layer).values()
        )
        parts = self._parts(info, [(places[view - first], places[view - first + 1]) for view in views])
        for view, data in zip(views, parts, strict=True):
            self._check(info, data, self._block(info, view), f"view {view}")
            # The sizes may be forged; the bytes are here. So no record can ask for more memory than they can fill.
            self._refuse_more(info, raw, len(data), f"view {view}")
            yield data

    def _decode(self, info: UnitInfo, view: int, block: Array, into: Mapping[str, Array]) -> None:
        try:
            decode_view(block.data, view - info.unit.first_view, info.num_images, into, self.arrays(info.layer))
        except (ValueError, RuntimeError) as error:  # RuntimeError comes from the decompressor
            raise corrupt_unit(self.place, info, f"view {view} cannot be decoded: {error}") from error

    def _parts(self, info: UnitInfo, ranges: Sequence[tuple[int, int]]) -> Iterator[Array]:
        """Ranges of a unit's file in turn, as uint8 arrays."""
        try:
            for part in self.store.read_ranges(info.path, ranges):
                yield np.frombuffer(part, np.uint8)
        except FileNotFoundError as error:
            raise corrupt_unit(self.place, info, f"its file {info.path} is missing") from error
        except OSError as error:
            raise corrupt_unit(self.place, info, f"its file {info.path} cannot be read: {error}") from error

    def _check(self, info: UnitInfo, data: Array, block: Block, what: str) -> None:
        if len(data) != block.size_bytes:
            got = f"{len(data)} bytes"
            raise corrupt_unit(self.place, info, f"{what} is cut short", got=got, expected=f"{block.size_bytes} bytes")
        if crc32c(data) != block.crc32c:
            raise corrupt_unit(self.place, info, f"{what} does not have its committed checksum")

    def _refuse_more(self, info: UnitInfo, raw: int, held: int, what: str) -> None:
        if raw > held * ZSTD_MOST:
            raise corrupt_unit(self.place, info, f"{what}: {raw} bytes cannot come out of {held}")


def _empty(kinds: Mapping[str, ArrayType], *rows: int) -> dict[str, Array]:
    """Arrays [*rows, ...] to be filled."""
    return {name: np.empty((*rows, *shape), dtype) for name, (dtype, shape) in kinds.items()}


def _runs(views: Sequence[int], sizes: Mapping[int, int]) -> Iterator[list[int]]:
    """Cut views into runs of at most `_RUN_BYTES`, but of at least one view."""
    run: list[int] = []
    room = _RUN_BYTES
    for view in views:
        if run and sizes[view] > room:
            yield run
            run, room = [], _RUN_BYTES
        run.append(view)
        room -= sizes[view]
    if run:
        yield run
