"""A cache of format 1 as a whole.

It has one zarr group per source shard and range of views, a *unit*, and one commit record per unit. The record holds
the digest of every file of the unit, and `OldCache` compares each. This package shares no code with the current format,
which is free to change.

Shapes: I images of a unit, V its views, R = I * V records.
"""

import itertools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tinymim.configs.errors import CacheCorrupt, UserError
from tinymim.storage.atomic import canonical_json, digest_hex
from tinymim.storage.store import open_store
from tinymim.storage.v1.arrays import REQUIRED_ARRAYS, decode_array, decode_keys
from tinymim.storage.v1.checks import RESTORE, damage
from tinymim.storage.v1.manifest import GROUP_FIELDS, MANIFEST_LIMIT_BYTES, METADATA, NO_CACHE, parse_manifest
from tinymim.storage.v1.records import (
    COMMITS,
    KEY_ARRAYS,
    RECORD_LIMIT_BYTES,
    OldFile,
    OldUnit,
    Record,
    array_names,
    parse_record,
    parse_unit,
)

UPGRADE_HINT = "`tinymim cache copy SRC DST --format 2` upgrades it"
CONSTANTS, CONSTANTS_RECORD = "constants", "constants.json"
GROUP_BYTES = len(canonical_json({"attributes": {}, **GROUP_FIELDS}))


class OldCache:
    """A format-1 cache; committed units only.

    Args:
        place: the cache's folder, or its URL in an object store.

    Attributes:
        place: the folder as an absolute path, or the URL.
        store: the cache's store.
        manifest: the stored manifest.
        units: the committed units in source order, then by view.

    Raises:
        UserError: there is no cache at `place`.
        StoreError: the object store refuses or fails.
        CacheMismatch: a format version is not 1.
        CacheCorrupt: the manifest or a record is damaged, two units share views, or a unit was made with other
            constants; names the file or unit.
    """

    def __init__(self, place: Path | str) -> None:
        self.store = open_store(place)
        self.place = self.store.place
        try:
            with damage(f"{self.place}/{METADATA}"):
                data = self.store.read(METADATA, MANIFEST_LIMIT_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"there is no cache at {self.place}", hint=NO_CACHE) from None
        self.manifest = parse_manifest(data, f"{self.place}/{METADATA}")
        self._constants, self._constants_digest, self._constants_bytes = self._read_constants_record()
        paths = sorted(entry.path for entry in self.store.list(COMMITS) if entry.path.endswith(".json"))
        with damage(f"a commit record of {self.place}"):
            records = self.store.read_all(dict.fromkeys(paths, RECORD_LIMIT_BYTES))
        self._overhead_bytes = len(data) + sum(map(len, records.values()))
        order = {name: position for position, name in enumerate(self.manifest.shards)}
        units = (parse_unit(record, path, self.place, self.manifest) for path, record in records.items())
        self.units = sorted(units, key=lambda unit: (order[unit.shard], unit.first_view))
        self._require_one_family()

    def read_unit(self, unit: OldUnit) -> tuple[list[str], dict[str, npt.NDArray[Any]]]:
        """Read one of `units` whole. Every file of it is compared with its digest.

        Returns:
            The I keys in tar order, and the record arrays [R, ...] by name, `box`, `flip` and `digest` among them. The
            record of image i and view v is row i * V + v - first_view.

        Raises:
            CacheCorrupt: a file is missing or changed, or arrays and keys do not fit each other; names unit and array.
        """
        with damage(f"unit {unit} of {self.place}"):
            self._read_files(unit.folder, {path: file for path, file in unit.files.items() if path == METADATA})
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name in sorted(array_names(unit.files) | set(REQUIRED_ARRAYS)):
            with damage(f"unit {unit} of {self.place}: array {name}"):
                values = arrays[name] = self._read_array(unit.folder, name, unit.files)
                dtype, inner = REQUIRED_ARRAYS.get(name, (values.dtype.str, values.shape[1:]))
                if values.dtype.str != dtype or values.shape[1:] != inner:
                    raise ValueError(
                        f"it is {values.dtype} {list(values.shape)}, expected {dtype} [..., {list(inner)}]"
                    )
                if name not in KEY_ARRAYS and len(values) != unit.num_records:
                    raise ValueError(f"it has {len(values)} records, expected {unit.num_records}")
        with damage(f"unit {unit} of {self.place}: array key_bytes"):
            return decode_keys(arrays.pop("key_bytes"), arrays.pop("key_ends"), unit), arrays

    def constants(self) -> dict[str, npt.NDArray[Any]] | None:
        """The codec's constants by name, every byte checked; None if there are none.

        Raises:
            CacheCorrupt: a file is missing or changed; names array and file.
        """
        arrays = {}
        for name in sorted(array_names(self._constants or {})):
            with damage(f"array {name} of {self.place}/{CONSTANTS}"):
                arrays[name] = self._read_array(CONSTANTS, name, self._constants or {})
        return None if self._constants is None else arrays

    def coverage(self) -> dict[str, int | bool]:
        """What the committed units hold of the manifest, by the names of `cache info`."""
        views = dict.fromkeys(self.manifest.shards, 0)
        for unit in self.units:
            views[unit.shard] += unit.num_views
        complete = sum(count == self.manifest.num_views for count in views.values())
        covered = sum(self.manifest.shards[name].num_samples * count for name, count in views.items())
        records = sum(unit.num_records for unit in self.units)
        return {
            "complete": complete == len(views),
            "num_shards": len(views),
            "complete_shards": complete,
            "num_views": sum(shard.num_samples for shard in self.manifest.source) * self.manifest.num_views,
            "covered_views": covered,
            "num_records": records,
            "unreadable_views": covered - records,
        }

    def bytes_by_component(self) -> dict[str, int]:
        """Bytes on disk by array name; "overhead" is metadata and records, "constants" are the codec's."""
        groups = 1 + len({unit.shard for unit in self.units})
        total = Counter({"overhead": self._overhead_bytes + groups * GROUP_BYTES, "constants": self._constants_bytes})
        for path, file in (item for unit in self.units for item in unit.files.items()):
            name, _, rest = path.partition("/")
            total["overhead" if rest in ("", METADATA) else name] += file.size_bytes
        return dict(+total)

    def _read_constants_record(self) -> tuple[Mapping[str, OldFile] | None, str | None, int]:
        """The files of the constants, the digest of their record, and the bytes of all; None, None, 0 without any."""
        owner = f"{self.place}/{CONSTANTS_RECORD}"
        with damage(owner):
            try:
                data = self.store.read(CONSTANTS_RECORD, RECORD_LIMIT_BYTES)
            except FileNotFoundError:
                return None, None, 0
            record, digest = parse_record(data, Record, owner)
            if record.spec_id != self.manifest.spec_id:
                raise ValueError("it does not belong to the cache's manifest")
        return record.files, digest, len(data) + sum(file.size_bytes for file in record.files.values())

    def _require_one_family(self) -> None:
        """Refuse units that were made with other constants, or that share views."""
        held = self._constants_digest
        for unit in self.units:
            if unit.constants != held:
                raise CacheCorrupt(
                    f"unit {unit} of {self.place} was made with other constants than those of the cache",
                    got=f"constants {held}" if held else f"no {CONSTANTS_RECORD}",
                    expected=f"constants {unit.constants}" if unit.constants else "none",
                    hint=RESTORE,
                )
        for one, other in itertools.pairwise(self.units):
            if one.shard == other.shard and other.first_view < one.first_view + one.num_views:
                raise CacheCorrupt(f"units {one} and {other} of {self.place} share views", hint=RESTORE)

    def _read_array(self, folder: str, name: str, files: Mapping[str, OldFile]) -> npt.NDArray[Any]:
        """An array of a group, from its checked files; raises ValueError, RuntimeError."""
        wanted = {path: file for path, file in files.items() if path.startswith(f"{name}/")}
        if f"{name}/{METADATA}" not in wanted:
            raise ValueError(f"there is no {name}/{METADATA}")
        found = self._read_files(folder, wanted)
        return decode_array(found.pop(f"{name}/{METADATA}"), list(found.values()))

    def _read_files(self, folder: str, files: Mapping[str, OldFile]) -> dict[str, bytes]:
        """Read files of `folder` and compare them with their record; raises ValueError, which names the file."""
        try:
            found = self.store.read_all({f"{folder}/{path}": file.size_bytes for path, file in files.items()})
        except FileNotFoundError as error:
            raise ValueError(f"a file is missing: {error.filename or error}") from error
        except OSError as error:
            raise ValueError(f"a file cannot be read: {error}") from error
        for path, file in files.items():
            data = found[f"{folder}/{path}"]
            if len(data) != file.size_bytes:
                raise ValueError(f"{path} has {len(data)} bytes, expected {file.size_bytes}")
            # The recorded crc32c proves less: payloads end in a crc32c of their own, so many files share one value.
            if digest_hex(data) != file.blake2b:
                raise ValueError(f"{path} does not have its committed digest")
        return {path: found[f"{folder}/{path}"] for path in files}
