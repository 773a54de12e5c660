"""Reading a cache: committed units only, whole arrays, checksums before decoding."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tinymim.storage import layout
from tinymim.storage.commit import (
    UnitInfo,
    corrupt_unit,
    encode_commit,
    files_of,
    key_digest,
    read_commits,
    read_files,
)
from tinymim.storage.constants import constants_bytes, constants_digest
from tinymim.storage.layout import UnitId
from tinymim.storage.store import open_store

_Fetched = dict[str, dict[str, bytes]]  # by array, then by path relative to the unit's folder


@dataclass(frozen=True)
class UnitRecords:
    """A unit in memory.

    Attributes:
        unit: its shard and views; `unit.row(image, view)` is a record's index on the first axis.
        keys: the I distinct sample keys in tar order.
        arrays: the arrays by name, first axis R = I * unit.num_views records.
    """

    unit: UnitId
    keys: list[str]
    arrays: dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Coverage:
    """The share of its manifest that a cache holds.

    Attributes:
        num_shards: source shards.
        complete_shards: source shards with all views.
        num_views: source images times views per image.
        covered_views: views in committed units, unreadable images included.
        num_records: stored records; fewer than `covered_views` if images were unreadable.
    """

    num_shards: int
    complete_shards: int
    num_views: int
    covered_views: int
    num_records: int

    @property
    def complete(self) -> bool:
        """Whether every view of every shard is in a committed unit."""
        return self.complete_shards == self.num_shards

    def __str__(self) -> str:
        return (
            f"{self.complete_shards:,} of {self.num_shards:,} shards complete, "
            f"{self.covered_views:,} of {self.num_views:,} views cached, {self.num_records:,} records"
        )


class CacheReader:
    """A snapshot of a cache; a later reader sees units that are committed later. Picklable.

    Args:
        place: the cache's folder, or its URL in an object store.

    Attributes:
        place: the folder as an absolute path, or the URL.
        store: the cache's store.
        manifest: the stored manifest; compare it with `manifest.check_same` before using a record.

    Raises:
        UserError: there is no cache at `place`.
        StoreError: the object store refuses or fails.
        CacheMismatch: a format version is unknown.
        CacheCorrupt: the manifest or a commit record is damaged, or a unit was made with other constants.
    """

    def __init__(self, place: str | Path) -> None:
        self.store = open_store(place)
        self.place = self.store.place
        self.manifest = layout.read_manifest(self.store)
        self._units = read_commits(self.store, self.manifest, constants_digest(self.store, self.manifest))

    def units(self) -> list[UnitInfo]:
        """The committed units in source order, then by view; `coverage` counts the missing ones."""
        return list(self._units)

    def coverage(self) -> Coverage:
        """Count the shards, views and records of the committed units."""
        views = dict.fromkeys(self.manifest.shards, 0)
        for info in self._units:
            views[info.unit.shard] += info.unit.num_views
        samples = {shard.name: shard.num_samples for shard in self.manifest.source}
        return Coverage(
            num_shards=len(samples),
            complete_shards=sum(count == self.manifest.num_views for count in views.values()),
            num_views=sum(samples.values()) * self.manifest.num_views,
            covered_views=sum(samples[name] * count for name, count in views.items()),
            num_records=sum(info.num_records for info in self._units),
        )

    def read_unit(self, info: UnitInfo, arrays: Sequence[str] | None = None, verify: bool = False) -> UnitRecords:
        """Read the keys and whole arrays of one unit, each file in one contiguous read.

        Args:
            info: one of `units()`.
            arrays: names of the arrays to read; None: all.
            verify: also compare the digest of every file, at 1.5 times the cost.

        Raises:
            CacheCorrupt: a file is missing or changed, or an array is not in the unit; names unit and array.
        """
        return self._unpack(info, self._fetch(info, arrays, verify))

    def read_units(
        self, infos: Iterable[UnitInfo] | None = None, arrays: Sequence[str] | None = None, verify: bool = False
    ) -> Iterator[UnitRecords]:
        """Read units in turn. A thread fetches the files of the next unit while the caller uses one.

        Two units are in memory at a time, one of them compressed.

        Args:
            infos: units to read; None: all, in source order.
            arrays: names of the arrays to read; None: all.
            verify: also compare digests.

        Raises:
            CacheCorrupt: as `read_unit`.
        """
        with ThreadPoolExecutor(1) as pool:
            ahead: deque[tuple[UnitInfo, Future[_Fetched]]] = deque()
            for info in self._units if infos is None else infos:
                ahead.append((info, pool.submit(self._fetch, info, arrays, verify)))
                if len(ahead) == 2:
                    before, fetched = ahead.popleft()
                    yield self._unpack(before, fetched.result())
            for info, fetched in ahead:
                yield self._unpack(info, fetched.result())

    def bytes_by_component(self) -> dict[str, int]:
        """Bytes on disk by array name over all committed units; "overhead" is metadata and commit records."""
        groups = 1 + len({info.unit.shard for info in self._units})
        overhead = len(layout.root_group(self.manifest)) + groups * len(layout.plain_group())
        total = {"overhead": overhead + sum(len(encode_commit(info)) for info in self._units)}
        for info in self._units:
            for name, file in info.files.items():
                part = layout.component(name)
                total[part] = total.get(part, 0) + file.size_bytes
        if size_bytes := constants_bytes(self.store, self.manifest):
            total["constants"] = size_bytes
        return total

    def _fetch(self, info: UnitInfo, arrays: Sequence[str] | None, verify: bool) -> _Fetched:
        """Read and check the files of arrays and keys, by array."""
        names = [*layout.KEY_ARRAYS, *(info.arrays if arrays is None else arrays)]
        stored = {name: files_of(info.files, name) for name in names}
        for name, files in stored.items():
            if not files:
                raise corrupt_unit(self.place, info.unit, f"there is no array {name}", expected=", ".join(info.arrays))
        everything = {path: file for files in stored.values() for path, file in files.items()}
        try:
            found = read_files(self.store, layout.unit_folder(info.unit), everything, verify)
        except ValueError as error:
            raise corrupt_unit(self.place, info.unit, str(error)) from error
        return {name: {path: found[path] for path in files} for name, files in stored.items()}

    def _unpack(self, info: UnitInfo, fetched: _Fetched) -> UnitRecords:
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name in list(fetched):
            try:
                num_records = None if name in layout.KEY_ARRAYS else info.num_records
                arrays[name] = layout.decode_array(name, fetched.pop(name), num_records)
            except (ValueError, RuntimeError) as error:  # RuntimeError comes from the decompressor
                raise corrupt_unit(self.place, info.unit, f"array {name} is damaged: {error}") from error
        key_arrays = {name: arrays.pop(name) for name in layout.KEY_ARRAYS}
        if key_digest(key_arrays) != info.key_digest:
            raise corrupt_unit(self.place, info.unit, "the keys do not have the committed key_digest")
        try:
            keys = layout.decode_keys(key_arrays)
        except ValueError as error:
            raise corrupt_unit(self.place, info.unit, f"array key_bytes cannot be decoded: {error}") from error
        if repeated := [key for key, count in Counter(keys).items() if count > 1]:
            raise corrupt_unit(self.place, info.unit, f"{len(repeated)} key(s) appear twice", got=repr(repeated[0]))
        if len(keys) != info.num_images:
            raise corrupt_unit(self.place, info.unit, "wrong number of keys", got=len(keys), expected=info.num_images)
        return UnitRecords(info.unit, keys, arrays)
