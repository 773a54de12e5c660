"""The commit record: the one small file that makes a unit visible and holds the checksums a reader trusts (I7)."""

import gc
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinymim.configs.errors import CacheCorrupt
from tinymim.storage import layout
from tinymim.storage.atomic import canonical_json, digest_hex
from tinymim.storage.blocks import Array, Block, UnitParts
from tinymim.storage.layout import UnitId
from tinymim.storage.manifest import FORMAT_VERSION, Manifest, Size, invalid_fields, require_format_version
from tinymim.storage.store import Store

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
View = Annotated[int, Field(ge=0, lt=2**31)]
Crc = Annotated[int, Field(ge=0, lt=2**32)]

REPAIR = "`tinymim cache repair RECIPE` computes it again"


class RecordBase(BaseModel):
    """The fields of every record except `record_digest`; strict, so that a reader may rely on them."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format_version: int
    spec_id: str


Record = TypeVar("Record", bound=RecordBase)


class _Shard(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    content_hash: str


class _Block(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    size_bytes: Size
    crc32c: Crc


class _Views(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    size_bytes: list[Size]
    crc32c: list[Crc]


class _CommitRecord(RecordBase):
    layer: str
    shard: _Shard
    first_view: View
    num_views: Annotated[int, Field(ge=1, lt=2**31)]
    num_images: Size
    key_digest: Digest
    head: _Block
    keys: _Block | None = None
    views: _Views
    tail: _Block
    blake2b: Digest
    statistics: dict[str, Any]
    constants: Digest | None = None


@dataclass(frozen=True)
class UnitInfo:
    """The content of a commit record.

    Attributes:
        layer: the unit's layer.
        unit: its shard and views.
        spec_id: spec_id of the layer, or of the manifest for the view layer.
        content_hash: content hash of the source shard.
        num_images: readable images I; at most the shard's `num_samples`.
        key_digest: digest of the keys in order (`key_digest`), the same in every unit of a shard.
        parts: sizes and checksums of the unit's file.
        statistics: JSON values from the writer (fidelity, counts, ...).
        constants: digest of the constants that made the records; None if the codec has none.
        record_bytes: size of the commit record, where it was read.
    """

    layer: str
    unit: UnitId
    spec_id: str
    content_hash: str
    num_images: int
    key_digest: str
    parts: UnitParts
    statistics: Mapping[str, Any]
    constants: str | None = None
    record_bytes: int = field(default=0, compare=False)

    @property
    def num_records(self) -> int:
        """Views of readable images."""
        return self.num_images * self.unit.num_views

    @property
    def size_bytes(self) -> int:
        """Size of the unit's file."""
        return self.parts.size_bytes

    @property
    def path(self) -> str:
        """The unit's file, relative to the cache."""
        return layout.unit_file(self.layer, self.unit)

    def __str__(self) -> str:
        return str(self.unit) if self.layer == layout.VIEWS else f"{self.layer}: {self.unit}"


def key_digest(key_arrays: Mapping[str, Array]) -> str:
    """`digest_hex` of the bytes of `key_ends` (little endian), then `key_bytes`."""
    return digest_hex(key_arrays["key_ends"].tobytes() + key_arrays["key_bytes"].tobytes())


def encode_commit(info: UnitInfo) -> bytes:
    """The stored bytes of a commit record."""
    unit, parts = info.unit, info.parts
    record = {
        "format_version": FORMAT_VERSION,
        "spec_id": info.spec_id,
        "layer": info.layer,
        "shard": {"name": unit.shard, "content_hash": info.content_hash},
        "first_view": unit.first_view,
        "num_views": unit.num_views,
        "num_images": info.num_images,
        "key_digest": info.key_digest,
        "head": _stored(parts.head),
        "views": {
            "size_bytes": [block.size_bytes for block in parts.views],
            "crc32c": [block.crc32c for block in parts.views],
        },
        "tail": _stored(parts.tail),
        "blake2b": parts.blake2b,
        "statistics": dict(info.statistics),
    }
    if parts.keys is not None:
        record["keys"] = _stored(parts.keys)
    if info.constants is not None:
        record["constants"] = info.constants
    return signed(record)


def _stored(block: Block) -> dict[str, int]:
    return {"size_bytes": block.size_bytes, "crc32c": block.crc32c}


def holds_keys(layer: str, unit: UnitId) -> bool:
    """Whether a unit holds its shard's keys: the view layer's unit that begins at view 0."""
    return layer == layout.VIEWS and unit.first_view == 0


def list_units(store: Store, layer: str, manifest: Manifest, paths: Iterable[str] | None = None) -> list[UnitId]:
    """The committed units of a layer in source order, then by view, from names alone; `paths` as `read_commits`."""
    shards = {layout.shard_stem(name): name for name in manifest.shards}
    folder = f"{layout.layer_folder(layer)}/"
    if paths is None:
        paths = (entry.path for entry in store.list(layout.layer_folder(layer)))
    found = (layout.parse_commit_file(layer, path, shards) for path in paths if path.startswith(folder))
    return in_source_order((unit for unit in found if unit is not None), manifest)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Keep the cycle collector off: it would search a million new objects again and again, and none is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_commits(
    store: Store,
    layer: str,
    spec_id: str,
    manifest: Manifest,
    constants: str | None,
    paths: Iterable[str] | None = None,
) -> list[UnitInfo]:
    """All committed units of a layer, in source order, then by view.

    Args:
        store: the cache's store.
        layer: the layer.
        spec_id: its spec_id.
        manifest: the cache's manifest.
        constants: digest of the layer's constants, None if there are none.
        paths: the paths of the cache's files, where they have been listed.

    Raises:
        CacheMismatch: a record has an unknown format version.
        CacheCorrupt: a record is damaged or belongs to another cache; two units share views; a unit was made with
            other constants than the layer's.
    """
    names = list_units(store, layer, manifest, paths)
    named = {layout.commit_file(layer, unit): unit for unit in names}
    with _no_collector():
        found = store.read_all(dict.fromkeys(named, layout.COMMIT_LIMIT_BYTES))
        units = [parse_commit(store.place, layer, named[path], data, spec_id, manifest) for path, data in found.items()]
    for info in units:
        if info.constants != constants:
            raise CacheCorrupt(
                f"unit {info} of {store.place} was made with other constants than those of its layer",
                got=f"constants {constants}" if constants else f"no {layout.CONSTANTS_RECORD}",
                expected=f"constants {info.constants}" if info.constants else "none",
                hint="restore constants.json and constants.zip from a copy, or by `tinymim cache repair`",
            )
    for before, after in pairs_sharing_views(names):
        raise CacheCorrupt(f"units {before} and {after} of layer {layer} of {store.place} share views", hint=REPAIR)
    return units


def in_source_order(units: Iterable[UnitId], manifest: Manifest) -> list[UnitId]:
    """Units in the order of the manifest's shards, then by view."""
    order = {name: position for position, name in enumerate(manifest.shards)}
    return sorted(units, key=lambda unit: (order[unit.shard], unit.first_view, unit.num_views))


def pairs_sharing_views(units: Iterable[UnitId]) -> list[tuple[UnitId, UnitId]]:
    """Neighbours among units in source order that share a view of one shard."""
    return [(before, after) for before, after in itertools.pairwise(units) if before.overlaps(after)]


def corrupt_unit(
    place: Path | str, unit: UnitInfo | UnitId, what: str, got: object = None, expected: object = None
) -> CacheCorrupt:
    """The error for damage in `unit`, with the command that computes it again."""
    owner = f"{unit.unit} of layer {unit.layer}" if isinstance(unit, UnitInfo) else unit
    return CacheCorrupt(f"unit {owner} of {place}: {what}", got=got, expected=expected, hint=REPAIR)


def parse_commit(
    place: Path | str, layer: str, unit: UnitId, data: bytes, spec_id: str, manifest: Manifest
) -> UnitInfo:
    """Parse the commit record `data` of `unit`.

    Raises:
        CacheMismatch: the record has an unknown format version.
        CacheCorrupt: it is damaged, or belongs to another manifest or another name.
    """
    path = layout.commit_file(layer, unit)
    try:
        record, _ = parse_record(data, _CommitRecord, f"{place}/{path}")
        shard = manifest.shards.get(unit.shard)
        if record.spec_id != spec_id or shard is None or shard.content_hash != record.shard.content_hash:
            raise ValueError("it does not belong to the cache's manifest")
        named = UnitId(record.shard.name, record.first_view, record.num_views)
        if named != unit or record.layer != layer:
            raise ValueError(f"it is about {named} of layer {record.layer}")
        if record.num_images > shard.num_samples:
            raise ValueError(f"it has {record.num_images} images of {shard.num_samples}")
        if not record.num_views == len(record.views.size_bytes) == len(record.views.crc32c):
            raise ValueError(f"it describes {len(record.views.size_bytes)} of {record.num_views} views")
        if (record.keys is not None) != holds_keys(layer, unit):
            raise ValueError("the unit that begins at view 0 of the view layer holds the keys, and no other")
        if sum(record.views.size_bytes) >= 2**62:
            raise ValueError(f"its views have {sum(record.views.size_bytes)} bytes")
    except ValueError as error:
        raise CacheCorrupt(f"commit record {place}/{path} is damaged: {error}", hint=REPAIR) from error
    head, tail = (Block(block.size_bytes, block.crc32c) for block in (record.head, record.tail))
    keys = None if record.keys is None else Block(record.keys.size_bytes, record.keys.crc32c)
    views = tuple(map(Block, record.views.size_bytes, record.views.crc32c))
    return UnitInfo(
        layer=layer,
        unit=unit,
        spec_id=record.spec_id,
        content_hash=record.shard.content_hash,
        num_images=record.num_images,
        key_digest=record.key_digest,
        parts=UnitParts(head, keys, views, tail, record.blake2b),
        statistics=record.statistics,
        constants=record.constants,
        record_bytes=len(data),
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
