"""Reading a cache: committed units only, whole arrays, nothing decoded before it was checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tinymim.configs.errors import CacheCorrupt
from tinymim.storage import layout
from tinymim.storage.commit import UnitInfo, corrupt_unit, key_digest, read_checked, read_commits
from tinymim.storage.constants import constants_bytes, constants_digest
from tinymim.storage.layout import UnitId


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

    Attributes:
        path: the cache's folder.
        manifest: compare it with `manifest.check_same` before using a record.

    Raises:
        UserError: there is no cache at `path`.
        CacheMismatch: an unknown format version.
        CacheCorrupt: a damaged manifest or commit record, or a unit made with other constants than are there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.manifest = layout.read_manifest(self.path)
        self._units = read_commits(self.path, self.manifest, constants_digest(self.path, self.manifest))

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

    def read_unit(self, info: UnitInfo, arrays: Sequence[str] | None = None, verify: bool = True) -> UnitRecords:
        """Read one unit: its keys and whole arrays, each file in one contiguous read.

        Args:
            info: one of `units()`.
            arrays: names of the arrays to read; None: all.
            verify: compare the digest of every payload file read. Without it, sizes, metadata, keys and
                zarr's crc32c are still checked.

        Raises:
            CacheCorrupt: a file is missing or changed, or an array is not in the unit; names unit and array.
        """
        wanted = info.arrays if arrays is None else list(arrays)
        key_arrays = {name: self._read_array(info, name, verify) for name in layout.KEY_ARRAYS}
        if key_digest(key_arrays) != info.key_digest:
            raise corrupt_unit(self.path, info.unit, "the keys do not have the committed key_digest")
        try:
            keys = layout.decode_keys(key_arrays)
        except ValueError as error:
            raise corrupt_unit(self.path, info.unit, f"array key_bytes cannot be decoded: {error}") from error
        values = {name: self._read_array(info, name, verify) for name in wanted}
        records = UnitRecords(info.unit, keys, values)
        if not len(keys) == len(records.index) == info.num_images:
            raise corrupt_unit(
                self.path, info.unit, "wrong number of keys", got=len(records.index), expected=info.num_images
            )
        for name, array in values.items():
            if len(array) != info.num_records:
                raise corrupt_unit(
                    self.path,
                    info.unit,
                    f"array {name} has a wrong number of records",
                    got=len(array),
                    expected=info.num_records,
                )
        return records

    def bytes_by_component(self) -> dict[str, int]:
        """Bytes on disk by array name, over all committed units; "overhead" for metadata and commits, "constants"."""
        metadata = [self.path / layout.METADATA, self.path / "units" / layout.METADATA]
        units = [info.unit for info in self._units]
        metadata += {layout.unit_folder(self.path, unit).parent / layout.METADATA for unit in units}
        metadata += [layout.commit_file(self.path, unit) for unit in units]
        total = {"overhead": sum(path.stat().st_size for path in metadata)}
        for info in self._units:
            for name, file in info.files.items():
                part = layout.component(name)
                total[part] = total.get(part, 0) + file.size_bytes
        if size_bytes := constants_bytes(self.path, self.manifest):
            total["constants"] = size_bytes
        return total

    def _read_array(self, info: UnitInfo, name: str, verify: bool) -> npt.NDArray[Any]:
        stored = info.files_of(name)
        if not stored:
            raise corrupt_unit(self.path, info.unit, f"there is no array {name}", expected=", ".join(info.arrays))
        folder = layout.unit_folder(self.path, info.unit)
        try:
            # zarr 3.1 reads a lost or empty file as zeros, so it is only given bytes that were checked.
            files = {
                path: read_checked(folder / path, file, verify or path.endswith(layout.METADATA))
                for path, file in stored.items()
            }
            return layout.decode_checked_array(name, files) if verify else layout.decode_array(name, files)
        except CacheCorrupt:
            raise
        except Exception as error:  # whatever zarr and its codecs raise on bytes they cannot decode
            raise corrupt_unit(self.path, info.unit, f"array {name} is damaged: {error}") from error
