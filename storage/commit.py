"""The commit record: the one small file that makes a unit visible, and what a reader trusts (I7)."""

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
# A file of a group, relative to it: its metadata, or an array's metadata or payload. Nothing that could lead outside.
FilePath = Annotated[str, Field(pattern=r"^(zarr\.json|[A-Za-z][A-Za-z0-9_]*/(zarr\.json|c(/0)+))$")]

REPAIR = "`tinymim cache repair RECIPE` computes it again"


@dataclass(frozen=True)
class StoredFile:
    """Size in bytes, digest (`digest_hex`) and crc32c of one file of a unit or of the constants."""

    size_bytes: int
    blake2b: str
    crc32c: int


class _StoredFile(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    size_bytes: Size
    blake2b: Digest
    crc32c: Annotated[int, Field(ge=0, lt=2**32)]


class RecordBase(BaseModel):
    """The fields that every record has (without `record_digest`); strict, so that a reader may rely on them."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format_version: int
    spec_id: str
    files: dict[FilePath, _StoredFile]

    def stored_files(self) -> dict[str, StoredFile]:
        """`files`, as the rest of storage holds them."""
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

    @property
    def arrays(self) -> list[str]:
        """The names of the record arrays (keys apart), sorted."""
        return sorted(set(array_names(self.files)).difference(layout.KEY_ARRAYS))


def array_names(files: Iterable[str]) -> list[str]:
    """The arrays that a group's files belong to, sorted."""
    return sorted({name.partition("/")[0] for name in files if "/" in name})


def files_of(files: Mapping[str, StoredFile], array: str) -> dict[str, StoredFile]:
    """Those of a group's files that belong to one array, metadata first."""
    names = sorted((name for name in files if name.startswith(f"{array}/")), reverse=True)
    return {name: files[name] for name in names}


def described(files: Mapping[str, bytes]) -> dict[str, StoredFile]:
    """Size, digest and checksum of every file."""
    return {path: StoredFile(len(data), digest_hex(data), crc32c(data)) for path, data in files.items()}


def read_files(store: Store, folder: str, files: Mapping[str, StoredFile], verify: bool) -> dict[str, bytes]:
    """The bytes of files of `folder`, by path relative to it, their sizes and checksums compared.

    A crc32c of the whole file finds flipped bits and files that took one another's place; it costs a ninth of blake2b.

    Args:
        store: of the cache.
        folder: relative to the store.
        files: what is recorded of them.
        verify: compare the digests, too, which also somebody who wants to could not forge.

    Raises:
        ValueError: a file is missing, or not what is recorded; names the file.
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
            raise ValueError(f"{path} has {len(data)} bytes, committed were {file.size_bytes}")
        if crc32c(data) != file.crc32c:
            raise ValueError(f"{path} does not have its committed checksum")
        if verify and digest_hex(data) != file.blake2b:
            raise ValueError(f"{path} does not have its committed digest")
    return {path: found[f"{folder}/{path}"] for path in files}


def key_digest(key_arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """Digest of the keys: `digest_hex` of the bytes of `key_ends` (little endian) then `key_bytes`."""
    return digest_hex(key_arrays["key_ends"].tobytes() + key_arrays["key_bytes"].tobytes())


def encode_commit(info: UnitInfo) -> bytes:
    """The record as it is stored."""
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
        "files": {name: asdict(file) for name, file in info.files.items()},
        "statistics": dict(info.statistics),
    }
    if info.constants is not None:
        record["constants"] = info.constants
    return signed(record)


def read_commits(store: Store, manifest: Manifest, constants: str | None) -> list[UnitInfo]:
    """All committed units, in the order of the source shards, then of views.

    Args:
        store: of the cache.
        manifest: of the cache.
        constants: digest of its constants, None if it has none.

    Raises:
        CacheMismatch: a record has an unknown format version.
        CacheCorrupt: a record is damaged or belongs to another cache; two units share views; a unit was made with
            other constants than the cache's.
    """
    paths = {entry.path for entry in store.list(layout.COMMITS) if entry.path.endswith(".json")}
    found = store.read_all(dict.fromkeys(sorted(paths), layout.COMMIT_LIMIT_BYTES))
    infos = [parse_commit(store.place, path, data, manifest) for path, data in found.items()]
    return checked_commits(store.place, infos, constants, manifest)


def checked_commits(
    place: Path | str, infos: Iterable[UnitInfo], constants: str | None, manifest: Manifest
) -> list[UnitInfo]:
    """The units in order, if they may stand in one cache; arguments and errors of `read_commits`."""
    order = {shard.name: position for position, shard in enumerate(manifest.source)}
    units = sorted(infos, key=lambda info: (order[info.unit.shard], info.unit.first_view))
    for info in units:
        if info.constants != constants:
            raise CacheCorrupt(
                f"unit {info.unit} of {place} was made with other constants than those of the cache",
                got=f"constants {constants}" if constants else f"no {layout.CONSTANTS_RECORD}",
                expected=f"constants {info.constants}" if info.constants else "none",
                hint="restore constants.json and the folder constants/ from a copy, or by `tinymim cache repair`",
            )
    for before, after in itertools.pairwise(units):
        if before.unit.shard == after.unit.shard and after.unit.first_view in before.unit.views:
            raise CacheCorrupt(f"units {before.unit} and {after.unit} of {place} share views", hint=REPAIR)
    return units


def corrupt_unit(
    place: Path | str, unit: UnitId, what: str, got: object = None, expected: object = None
) -> CacheCorrupt:
    """The error for damage in `unit`, with the way to have it computed again."""
    return CacheCorrupt(f"unit {unit} of {place}: {what}", got=got, expected=expected, hint=REPAIR)


def parse_commit(place: Path | str, path: str, data: bytes, manifest: Manifest) -> UnitInfo:
    """The unit that the record `data`, stored at `path`, is about.

    Raises:
        CacheMismatch: the record has an unknown format version.
        CacheCorrupt: it is damaged, or does not belong to the manifest or to its name.
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
            raise ValueError(f"{record.num_images} images, {record.num_records} records of {shard.num_samples} images")
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
    """What a commit record says of itself where there is no manifest to check it against.

    Returns:
        Its spec_id, its unit, and the content hash of the unit's shard.

    Raises:
        CacheMismatch: the record has an unknown format version.
        ValueError: it is damaged; `path` is named.
    """
    record, _ = parse_record(data, _CommitRecord, path)
    return record.spec_id, UnitId(record.shard.name, record.first_view, record.num_views), record.shard.content_hash


# ---- records: JSON with a digest of itself


def signed(record: Mapping[str, Any]) -> bytes:
    """A record as it is stored: canonical JSON, `record_digest` among its fields."""
    return canonical_json({**record, "record_digest": record_digest(record)})


def record_digest(record: Mapping[str, Any]) -> str:
    """Digest of a record without its `record_digest`, over its canonical JSON."""
    return digest_hex(canonical_json(record))


def parse_record(data: bytes, kind: type[Record], owner: str) -> tuple[Record, str]:
    """A stored record and its digest.

    Raises:
        CacheMismatch: its format version is unknown; `owner` is named.
        ValueError: it is damaged.
    """
    try:
        record = json.loads(data)
        if not isinstance(record, dict) or "format_version" not in record:
            raise ValueError("there is no format_version")
        require_format_version(record["format_version"], owner)
        digest = str(record.pop("record_digest", None))
        # What is stored is canonical, so its own bytes without that line are what the digest was taken of: to write the
        # record again in order to see that takes ten times as long, and a cache has thousands.
        line = f' "record_digest": "{digest}",\n'.encode("utf-8", "replace")
        if digest_hex(data.replace(line, b"", 1)) != digest:
            raise ValueError("its content does not have its record_digest")
        return kind.model_validate(record), digest
    except ValidationError as error:
        raise ValueError("; ".join(invalid_fields("", error))) from error
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
