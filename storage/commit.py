"""The commit record: the one small file that makes a unit visible and holds the checksums a reader trusts (I7)."""

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy.typing as npt
from google_crc32c import value as crc32c
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinymim.configs.errors import CacheCorrupt
from tinymim.storage import layout
from tinymim.storage.atomic import canonical_json, digest_hex
from tinymim.storage.layout import UnitId
from tinymim.storage.manifest import FORMAT_VERSION, Manifest, Size, invalid_fields, require_format_version
from tinymim.storage.store import Store

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
View = Annotated[int, Field(ge=0, lt=2**31)]
# A group's metadata, or an array's metadata or payload, relative to the group. No such path can lead out of it.
FilePath = Annotated[str, Field(pattern=r"^(zarr\.json|[A-Za-z][A-Za-z0-9_]*/(zarr\.json|c(/0)+))$")]

REPAIR = "`tinymim cache repair RECIPE` computes it again"


@dataclass(frozen=True)
class StoredFile:
    """Size in bytes, digest (`digest_hex`) and crc32c of one file of a unit or of the constants.

    The first caches recorded no crc32c; readers compare the digest instead.
    """

    size_bytes: int
    blake2b: str
    crc32c: int | None = None


class _StoredFile(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    size_bytes: Size
    blake2b: Digest
    crc32c: Annotated[int, Field(ge=0, lt=2**32)] | None = None


class RecordBase(BaseModel):
    """The fields of every record except `record_digest`; strict, so that a reader may rely on them."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format_version: int
    spec_id: str
    files: dict[FilePath, _StoredFile]

    def stored_files(self) -> dict[str, StoredFile]:
        """`files` as dataclasses."""
        return {path: StoredFile(file.size_bytes, file.blake2b, file.crc32c) for path, file in self.files.items()}


Record = TypeVar("Record", bound=RecordBase)


class _Shard(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    content_hash: str


class _CommitRecord(RecordBase):
    shard: _Shard
    unit: str
    first_view: View
    num_views: Annotated[int, Field(ge=1, lt=2**31)]
    num_images: Size
    num_records: Size
    key_digest: Digest
    statistics: dict[str, Any]
    constants: Digest | None = None


@dataclass(frozen=True)
class UnitInfo:
    """The content of a commit record.

    Attributes:
        unit: the shard and views of the unit.
        spec_id: spec_id of the manifest under which it was written.
        content_hash: content hash of the source shard.
        num_images: readable images I; at most the shard's `num_samples`.
        num_records: I times `unit.num_views`.
        key_digest: digest of the keys in order (`key_digest`).
        files: every file of the unit by its path relative to the unit's folder.
        statistics: JSON values from the writer (fidelity, counts, ...).
        constants: digest of the constants that made the records; None if the codec has none.
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

    @property
    def arrays(self) -> list[str]:
        """The names of the record arrays, without the keys, sorted."""
        return sorted(set(array_names(self.files)).difference(layout.KEY_ARRAYS))


def array_names(files: Iterable[str]) -> list[str]:
    """The names of the arrays that a group's files belong to, sorted."""
    return sorted({name.partition("/")[0] for name in files if "/" in name})


def files_of(files: Mapping[str, StoredFile], array: str) -> dict[str, StoredFile]:
    """The files of one array of a group, metadata first."""
    names = sorted((name for name in files if name.startswith(f"{array}/")), reverse=True)
    return {name: files[name] for name in names}


def described(files: Mapping[str, bytes]) -> dict[str, StoredFile]:
    """The size, digest and checksum of every file."""
    return {path: StoredFile(len(data), digest_hex(data), crc32c(data)) for path, data in files.items()}


def stored_form(files: Mapping[str, StoredFile]) -> dict[str, dict[str, Any]]:
    """`files` as JSON values of a record."""
    return {
        name: {key: value for key, value in asdict(file).items() if value is not None} for name, file in files.items()
    }


def read_files(store: Store, folder: str, files: Mapping[str, StoredFile], verify: bool) -> dict[str, bytes]:
    """Read files of `folder` and compare their sizes and checksums.

    A crc32c of the whole file finds flipped bits and swapped files, at a ninth of the cost of blake2b.

    Args:
        store: the cache's store.
        folder: a folder, relative to the store.
        files: the recorded files by path relative to `folder`.
        verify: also compare the digests, which cannot be forged.

    Returns:
        The bytes by path relative to `folder`.

    Raises:
        ValueError: a file is missing or differs from its record; names the file.
        StoreError: the object store refuses or fails.
    """
    try:
        found = store.read_all({f"{folder}/{path}": file.size_bytes for path, file in files.items()})
    except FileNotFoundError as error:
        raise ValueError(f"a file is missing: {error.filename or error}") from error
    except OSError as error:
        raise ValueError(f"a file cannot be read: {error}") from error
    for path, file in files.items():
        data = found[f"{folder}/{path}"]
        if len(data) != file.size_bytes:
            raise ValueError(f"{path} has {len(data)} bytes, expected {file.size_bytes}")
        if file.crc32c is not None and crc32c(data) != file.crc32c:
            raise ValueError(f"{path} does not have its committed checksum")
        if (verify or file.crc32c is None) and digest_hex(data) != file.blake2b:
            raise ValueError(f"{path} does not have its committed digest")
    return {path: found[f"{folder}/{path}"] for path in files}


def key_digest(key_arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """`digest_hex` of the bytes of `key_ends` (little endian), then `key_bytes`."""
    return digest_hex(key_arrays["key_ends"].tobytes() + key_arrays["key_bytes"].tobytes())


def encode_commit(info: UnitInfo) -> bytes:
    """The stored bytes of a commit record."""
    unit = info.unit
    record = {
        "format_version": FORMAT_VERSION,
        "spec_id": info.spec_id,
        "shard": {"name": unit.shard, "content_hash": info.content_hash},
        "unit": layout.unit_folder(unit),
        "first_view": unit.first_view,
        "num_views": unit.num_views,
        "num_images": info.num_images,
        "num_records": info.num_records,
        "key_digest": info.key_digest,
        "files": stored_form(info.files),
        "statistics": dict(info.statistics),
    }
    if info.constants is not None:
        record["constants"] = info.constants
    return signed(record)


def read_commits(store: Store, manifest: Manifest, constants: str | None) -> list[UnitInfo]:
    """All committed units, in source order, then by view.

    Args:
        store: the cache's store.
        manifest: the cache's manifest.
        constants: digest of the cache's constants, None if there are none.

    Raises:
        CacheMismatch: a record has an unknown format version.
        CacheCorrupt: a record is damaged or belongs to another cache; two units share views; a unit was made with
            other constants than the cache's.
    """
    paths = {entry.path for entry in store.list(layout.COMMITS) if entry.path.endswith(".json")}
    found = store.read_all(dict.fromkeys(sorted(paths), layout.COMMIT_LIMIT_BYTES))
    units = in_source_order((parse_commit(store.place, path, data, manifest) for path, data in found.items()), manifest)
    for info in units:
        if info.constants != constants:
            raise CacheCorrupt(
                f"unit {info.unit} of {store.place} was made with other constants than those of the cache",
                got=f"constants {constants}" if constants else f"no {layout.CONSTANTS_RECORD}",
                expected=f"constants {info.constants}" if info.constants else "none",
                hint="restore constants.json and the folder constants/ from a copy, or by `tinymim cache repair`",
            )
    for before, after in pairs_sharing_views(units):
        raise CacheCorrupt(f"units {before} and {after} of {store.place} share views", hint=REPAIR)
    return units


def in_source_order(infos: Iterable[UnitInfo], manifest: Manifest) -> list[UnitInfo]:
    """Units in the order of the manifest's shards, then by view."""
    order = {name: position for position, name in enumerate(manifest.shards)}
    return sorted(infos, key=lambda info: (order[info.unit.shard], info.unit.first_view))


def pairs_sharing_views(infos: Iterable[UnitInfo]) -> list[tuple[UnitId, UnitId]]:
    """Neighbours among units in source order that share a view of one shard."""
    pairs = itertools.pairwise(info.unit for info in infos)
    return [
        (before, after) for before, after in pairs if before.shard == after.shard and after.first_view in before.views
    ]


def corrupt_unit(
    place: Path | str, unit: UnitId, what: str, got: object = None, expected: object = None
) -> CacheCorrupt:
    """The error for damage in `unit`, with the command that computes it again."""
    return CacheCorrupt(f"unit {unit} of {place}: {what}", got=got, expected=expected, hint=REPAIR)


def parse_commit(place: Path | str, path: str, data: bytes, manifest: Manifest) -> UnitInfo:
    """Parse the commit record `data`, stored at `path`.

    Raises:
        CacheMismatch: the record has an unknown format version.
        CacheCorrupt: it is damaged, or belongs to another manifest or another name.
    """
    try:
        record, _ = parse_record(data, _CommitRecord, f"{place}/{path}")
        unit = UnitId(record.shard.name, record.first_view, record.num_views)
        shard = manifest.shards.get(unit.shard)
        if record.spec_id != manifest.spec_id or shard is None or shard.content_hash != record.shard.content_hash:
            raise ValueError("it does not belong to the cache's manifest")
        if layout.commit_file(unit) != path or layout.unit_folder(unit) != record.unit:
            raise ValueError(f"it is about {unit}")
        if record.num_images > shard.num_samples or record.num_records != record.num_images * record.num_views:
            raise ValueError(
                f"it has {record.num_images} images and {record.num_records} records for {record.num_views} views of "
                f"{shard.num_samples} images"
            )
    except ValueError as error:
        raise CacheCorrupt(f"commit record {place}/{path} is damaged: {error}", hint=REPAIR) from error
    return UnitInfo(
        unit=unit,
        spec_id=record.spec_id,
        content_hash=record.shard.content_hash,
        num_images=record.num_images,
        num_records=record.num_records,
        key_digest=record.key_digest,
        files=record.stored_files(),
        statistics=record.statistics,
        constants=record.constants,
    )


def read_identity(data: bytes, path: str) -> tuple[str, UnitId, str]:
    """Read what a commit record belongs to, without a manifest to check it against.

    Returns:
        The spec_id, the unit, and the content hash of the unit's shard.

    Raises:
        CacheMismatch: the record has an unknown format version; names `path`.
        ValueError: it is damaged.
    """
    record, _ = parse_record(data, _CommitRecord, path)
    return record.spec_id, UnitId(record.shard.name, record.first_view, record.num_views), record.shard.content_hash


# ---- records: JSON with a digest of itself


def signed(record: Mapping[str, Any]) -> bytes:
    """The stored bytes of a record: canonical JSON with `record_digest` among its fields."""
    return canonical_json({**record, "record_digest": record_digest(record)})


def record_digest(record: Mapping[str, Any]) -> str:
    """The digest of a record without its `record_digest`, over its canonical JSON."""
    return digest_hex(canonical_json(record))


def parse_record(data: bytes, kind: type[Record], owner: str) -> tuple[Record, str]:
    """Parse a stored record.

    Returns:
        The record and its digest.

    Raises:
        CacheMismatch: its format version is unknown; names `owner`.
        ValueError: it is damaged.
    """
    try:
        record = json.loads(data)
        if not isinstance(record, dict) or "format_version" not in record:
            raise ValueError("there is no format_version")
        require_format_version(record["format_version"], owner)
        digest = str(record.pop("record_digest", None))
        # The stored bytes are canonical, so the digest covers them without this line. Encoding the record again would
        # take ten times as long, and a cache has thousands of records.
        line = f' "record_digest": "{digest}",\n'.encode("utf-8", "replace")
        if digest_hex(data.replace(line, b"", 1)) != digest:
            raise ValueError("its content does not have its record_digest")
        return kind.model_validate(record), digest
    except ValidationError as error:
        raise ValueError("; ".join(invalid_fields("", error))) from error
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
