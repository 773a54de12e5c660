"""Reading a cache: committed units only, whole arrays, nothing decoded before it was checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tinymim.storage import layout
from tinymim.storage.commit import (
    StoredFile,
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


@dataclass(frozen=True)
class UnitRecords:
    """A unit in memory.

    Attributes:
        unit: which one; `unit.row(image, view)` is a record's place on the first axis.
        keys: the I sample keys in tar order, none twice.
        arrays: by name, first axis R = I * unit.num_views records.
    """

    unit: UnitId
    keys: list[str]
    arrays: dict[str, npt.NDArray[Any]]

    @cached_property
    def index(self) -> dict[str, int]:
        """The position of every key among the images."""
        return {key: image for image, key in enumerate(self.keys)}


@dataclass(frozen=True)
class Coverage:
    """How much of what its manifest announces a cache holds.

    Attributes:
        num_shards: source shards.
        complete_shards: those with all views.
        num_views: source images times views per image.
        covered_views: those in committed units, unreadable images included.
        num_records: records stored; fewer than `covered_views` where images were unreadable.
    """

    num_shards: int
    complete_shards: int
    num_views: int
    covered_views: int
    num_records: int

    @property
    def complete(self) -> bool:
        """Whether every view of every shard is there."""
        return self.complete_shards == self.num_shards

    def __str__(self) -> str:
        return (
            f"{self.complete_shards:,} of {self.num_shards:,} shards complete, "
            f"{self.covered_views:,} of {self.num_views:,} views cached, {self.num_records:,} records"
        )


class CacheReader:
    """A cache as it is when opened: units committed later are seen by the next reader. Picklable.

    Args:
        place: the cache's folder, or its URL in an object store.

    Attributes:
        place: the same.
        store: the cache's files.
        manifest: compare it with `manifest.check_same` before using a record.

    Raises:
        UserError: there is no cache at `place`.
        StoreError: the object store refuses or fails.
        CacheMismatch: an unknown format version.
        CacheCorrupt: a damaged manifest or commit record, or a unit made with other constants than are there.
    """

    def __init__(self, place: str | Path) -> None:
        self.store = open_store(place)
        self.place = self.store.place
        self.manifest = layout.read_manifest(self.store)
        self._units = read_commits(self.store, self.manifest, constants_digest(self.store, self.manifest))

    def units(self) -> list[UnitInfo]:
        """The committed units in source order, then by view; not all need be there, see `coverage`."""
        return list(self._units)

    def coverage(self) -> Coverage:
        """What the committed units cover."""
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
        """Read one unit: its keys and whole arrays, each file in one contiguous read.

        Args:
            info: one of `units()`.
            arrays: names of the arrays to read; None: all.
            verify: compare the digest of every file read, beside its size and checksum; at 1.5 times the cost.

        Raises:
            CacheCorrupt: a file is missing or changed, or an array is not in the unit; names unit and array.
        """
        wanted = info.arrays if arrays is None else list(arrays)
        read = self._read_arrays(info, [*layout.KEY_ARRAYS, *wanted], verify)
        key_arrays = {name: read.pop(name) for name in layout.KEY_ARRAYS}
        if key_digest(key_arrays) != info.key_digest:
            raise corrupt_unit(self.place, info.unit, "the keys do not have the committed key_digest")
        try:
            keys = layout.decode_keys(key_arrays)
        except ValueError as error:
            raise corrupt_unit(self.place, info.unit, f"array key_bytes cannot be decoded: {error}") from error
        records = UnitRecords(info.unit, keys, read)
        if not len(keys) == len(records.index) == info.num_images:
            raise corrupt_unit(
                self.place, info.unit, "wrong number of keys", got=len(records.index), expected=info.num_images
            )
        return records

    def bytes_by_component(self) -> dict[str, int]:
        """Bytes on disk by array name, over all committed units; "overhead" for metadata and commits, "constants"."""
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

    def _read_arrays(self, info: UnitInfo, names: Sequence[str], verify: bool) -> dict[str, npt.NDArray[Any]]:
        """Arrays of a unit by name. From a distant store all are fetched at once, else one after the other."""
        folder, stored = layout.unit_folder(info.unit), {name: files_of(info.files, name) for name in names}
        arrays: dict[str, npt.NDArray[Any]] = {}
        fetched: dict[str, bytes] = {}
        if self.store.distant:
            everything = {path: file for files in stored.values() for path, file in files.items()}
            fetched = self._read_files(info, "files", folder, everything, verify)
        for name, files in stored.items():
            if not files:
                raise corrupt_unit(self.place, info.unit, f"there is no array {name}", expected=", ".join(info.arrays))
            if self.store.distant:
                data = {path: fetched.pop(path) for path in files}
            else:
                data = self._read_files(info, f"array {name}", folder, files, verify)
            try:
                num_records = None if name in layout.KEY_ARRAYS else info.num_records
                arrays[name] = layout.decode_array(name, data, num_records)
            except (ValueError, RuntimeError) as error:  # what the decompressor raises, too
                raise corrupt_unit(self.place, info.unit, f"array {name} is damaged: {error}") from error
        return arrays

    def _read_files(
        self, info: UnitInfo, what: str, folder: str, files: Mapping[str, StoredFile], verify: bool
    ) -> dict[str, bytes]:
        try:
            return read_files(self.store, folder, files, verify)
        except ValueError as error:
            raise corrupt_unit(self.place, info.unit, f"{what} is damaged: {error}") from error
