"""The commit record: the one small file that makes a unit visible, and what a reader trusts (I7)."""

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tinymim.configs.errors import CacheCorrupt
from tinymim.storage import layout
from tinymim.storage.atomic import canonical_json, digest_hex, fsync_folder, write_json_atomic
from tinymim.storage.layout import UnitId
from tinymim.storage.manifest import FORMAT_VERSION, Manifest, require_format_version


@dataclass(frozen=True)
class StoredFile:
    """Size in bytes and digest (`digest_hex`) of one file of a unit or of the constants."""

    size_bytes: int
    blake2b: str


@dataclass(frozen=True)
class UnitInfo:
    """What a commit record says of a unit.

    Attributes:
        spec_id: of the manifest under which it was written.
        content_hash: of the source shard.
        num_images: readable images I; at most the shard's `num_samples`.
        num_records: I times `unit.num_views`.
        key_digest: over the keys in order, see `key_digest`.
        files: every file of the unit by its path relative to the unit's folder.
        statistics: JSON values the writer was given (fidelity, counts, ...).
        constants: digest of the cache's constants with which the records were made; None: made without.
    """

    unit: UnitId
    spec_id: str
    content_hash: str
    num_images: int
    num_records: int
    key_digest: str
    files: Mapping[str, StoredFile]
    statistics: Mapping[str, Any]
    constants: str | None = None

    def files_of(self, array: str) -> dict[str, StoredFile]:
        """The files of one array, metadata first."""
        return files_of(self.files, array)

    @property
    def arrays(self) -> list[str]:
        """The names of the record arrays (keys apart), sorted."""
        names = {name.partition("/")[0] for name in self.files if "/" in name}
        return sorted(names.difference(layout.KEY_ARRAYS))


def files_of(files: Mapping[str, StoredFile], array: str) -> dict[str, StoredFile]:
    """Those of a group's files that belong to one array, metadata first."""
    names = sorted((name for name in files if name.startswith(f"{array}/")), reverse=True)
    return {name: files[name] for name in names}


def sync_and_digest(folder: Path, root: Path) -> dict[str, StoredFile]:
    """Make all below `folder`, and its way up to `root`, durable; size and digest of every file."""
    files: dict[str, StoredFile] = {}
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        with open(path, "rb") as file:
            data = file.read()
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = StoredFile(len(data), digest_hex(data))
    for inner in [item for item in folder.rglob("*") if item.is_dir()]:
        fsync_folder(inner)
    outer = folder
    while outer != root.parent:
        fsync_folder(outer)
        outer = outer.parent
    return files


def read_checked(path: Path, stored: StoredFile, verify: bool = True) -> bytes:
    """The bytes of a file, with ValueError if its size or (with `verify`) its digest are not the recorded ones."""
    data = path.read_bytes()
    if len(data) != stored.size_bytes:
        raise ValueError(f"{path.name} has {len(data)} bytes, committed were {stored.size_bytes}")
    if verify and digest_hex(data) != stored.blake2b:
        raise ValueError(f"{path.name} does not have its committed digest")
    return data


def key_digest(key_arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """Digest of the keys: `digest_hex` of the bytes of `key_ends` (little endian) then `key_bytes`."""
    return digest_hex(key_arrays["key_ends"].tobytes() + key_arrays["key_bytes"].tobytes())


def write_commit(root: Path, info: UnitInfo) -> None:
    """Write the record, atomically: the moment in which the unit comes to be."""
    unit = info.unit
    record = {
        "format_version": FORMAT_VERSION,
        "spec_id": info.spec_id,
        "shard": {"name": unit.shard, "content_hash": info.content_hash},
        "unit": layout.unit_folder(root, unit).relative_to(root).as_posix(),
        "first_view": unit.first_view,
        "num_views": unit.num_views,
        "num_images": info.num_images,
        "num_records": info.num_records,
        "key_digest": info.key_digest,
        "files": {name: asdict(file) for name, file in info.files.items()},
        "statistics": dict(info.statistics),
    }
    if info.constants is not None:
        record["constants"] = info.constants
    write_json_atomic(layout.commit_file(root, unit), record | {"record_digest": record_digest(record)})


def read_commits(root: Path, manifest: Manifest, constants: str | None) -> list[UnitInfo]:
    """All committed units, in the order of the source shards, then of views.

    Args:
        root: the cache's folder.
        manifest: of the cache.
        constants: digest of its constants, None if it has none.

    Raises:
        CacheMismatch: a record has an unknown format version.
        CacheCorrupt: a record is damaged or belongs to another cache; two units share views; a unit was made with
            other constants than the cache's.
    """
    order = {shard.name: position for position, shard in enumerate(manifest.source)}
    paths = sorted(layout.commits_folder(root).glob("*.json"))
    infos = [_read_commit(root, path, manifest) for path in paths]
    for info in infos:
        if info.constants != constants:
            raise CacheCorrupt(
                f"unit {info.unit} of {root} was made with other constants than those of the cache",
                got=f"constants {constants}" if constants else f"no {layout.constants_file(root)}",
                expected=f"constants {info.constants}" if info.constants else "none",
                hint="restore constants.json and the folder constants/ from a copy, or write the cache anew",
            )
    infos.sort(key=lambda info: (order[info.unit.shard], info.unit.first_view))
    for before, after in itertools.pairwise(infos):
        if before.unit.shard == after.unit.shard and after.unit.first_view in before.unit.views:
            raise CacheCorrupt(
                f"units {before.unit} and {after.unit} share views",
                hint=f"delete {layout.commit_file(root, after.unit)}",
            )
    return infos


def corrupt_unit(root: Path, unit: UnitId, what: str, got: object = None, expected: object = None) -> CacheCorrupt:
    """The error for damage in `unit`, with the way to have it computed again."""
    hint = f"delete {layout.commit_file(root, unit)} and run cache-teacher again: it recomputes the unit"
    return CacheCorrupt(f"unit {unit} of {root}: {what}", got=got, expected=expected, hint=hint)


def _read_commit(root: Path, path: Path, manifest: Manifest) -> UnitInfo:
    try:
        record = json.loads(path.read_bytes())
        require_format_version(record["format_version"], str(path))
        digest = record.pop("record_digest")
        if digest != record_digest(record):
            raise ValueError("its content does not have its record_digest")
        info = UnitInfo(
            unit=UnitId(record["shard"]["name"], record["first_view"], record["num_views"]),
            spec_id=record["spec_id"],
            content_hash=record["shard"]["content_hash"],
            num_images=record["num_images"],
            num_records=record["num_records"],
            key_digest=record["key_digest"],
            files={name: StoredFile(**file) for name, file in record["files"].items()},
            statistics=record["statistics"],
            constants=record.get("constants"),
        )
        if layout.commit_file(root, info.unit) != path:
            raise ValueError(f"it is about {info.unit}")
        shard = manifest.shards.get(info.unit.shard)
        if info.spec_id != manifest.spec_id or shard is None or shard.content_hash != info.content_hash:
            raise ValueError("it does not belong to the cache's manifest")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheCorrupt(
            f"commit record {path} is damaged: {error}",
            hint="delete it and run cache-teacher again: it recomputes the unit",
        ) from error
    return info


def record_digest(record: Mapping[str, Any]) -> str:
    """Digest of a record without its `record_digest`, over its canonical JSON."""
    return digest_hex(canonical_json(record))
