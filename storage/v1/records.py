"""The commit records of a format-1 cache: JSON with a digest of itself."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tinymim.storage.atomic import digest_hex
from tinymim.storage.v1.checks import Digest, Exact, Number, Size, Stored, checked, damage
from tinymim.storage.v1.manifest import OldManifest

COMMITS = "commits"
RECORD_LIMIT_BYTES = 2**26
KEY_ARRAYS = ("key_bytes", "key_ends")
# A group's metadata, or an array's metadata or payload, relative to the group. No such path can lead out of it.
FilePath = Annotated[str, Field(pattern=r"^(zarr\.json|[A-Za-z][A-Za-z0-9_]*/(zarr\.json|c(/0)+))$")]


class OldFile(Exact):
    """Size and digests of one file. The first caches recorded no crc32c."""

    size_bytes: Size
    blake2b: Digest
    crc32c: Annotated[int, Field(ge=0, lt=2**32)] | None = None


class Record(Exact):
    """The fields of every record except `record_digest`."""

    format_version: int
    spec_id: str
    files: dict[FilePath, OldFile]


class _RecordShard(Exact):
    name: str
    content_hash: str


class OldUnit(Record):
    """The commit record of a unit: one source shard's records for `num_views` views from `first_view` on.

    Attributes:
        spec_id: spec_id of the manifest.
        files: every file of the unit by its path relative to `folder`.
        source: name and content hash of the source shard.
        folder: the zarr group of the unit, relative to the cache.
        num_images: readable images I; at most the shard's `num_samples`.
        num_records: I times `num_views`.
        key_digest: digest of the bytes of `key_ends` (little endian), then `key_bytes`.
        statistics: JSON values from the writer (fidelity, counts, ...).
        constants: digest of the constants that made the records; None if the codec has none.
    """

    source: _RecordShard = Field(alias="shard")
    folder: str = Field(alias="unit")
    first_view: Annotated[int, Field(ge=0, lt=2**31)]
    num_views: Number
    num_images: Size
    num_records: Size
    key_digest: Digest
    statistics: dict[str, Any]
    constants: Digest | None = None

    def __str__(self) -> str:
        return f"{self.shard} v{self.first_view}-{self.first_view + self.num_views - 1}"

    @property
    def shard(self) -> str:
        """Name of the source shard."""
        return self.source.name

    @property
    def content_hash(self) -> str:
        """Content hash of the source shard."""
        return self.source.content_hash

    @property
    def arrays(self) -> list[str]:
        """The names of the record arrays, without the keys, sorted."""
        return sorted(array_names(self.files) - set(KEY_ARRAYS))


def parse_unit(data: bytes, path: str, place: Path | str, manifest: OldManifest) -> OldUnit:
    """Parse the commit record `data`, stored at `path` of the cache; errors of `OldCache`."""
    with damage(f"commit record {place}/{path}"):
        unit, _ = parse_record(data, OldUnit, f"{place}/{path}")
        shard = manifest.shards.get(unit.shard)
        if unit.spec_id != manifest.spec_id or shard is None or shard.content_hash != unit.content_hash:
            raise ValueError("it does not belong to the cache's manifest")
        stem = re.sub(r"[^A-Za-z0-9-]", "_", unit.shard.removesuffix(".tar"))
        stem = f"s{stem}" if not stem or stem.startswith("__") else stem
        views = str(unit).removeprefix(f"{unit.shard} ")
        if (path, unit.folder) != (f"{COMMITS}/{stem}.{views}.json", f"units/{stem}/{views}"):
            raise ValueError(f"it is about {unit}")
        if unit.num_images > shard.num_samples or unit.num_records != unit.num_images * unit.num_views:
            raise ValueError(
                f"it has {unit.num_images} images and {unit.num_records} records for {unit.num_views} views of "
                f"{shard.num_samples} images"
            )
        return unit


def parse_record(data: bytes, kind: type[Stored], owner: str) -> tuple[Stored, str]:
    """A record and its digest; raises CacheMismatch for an unknown format version, ValueError for damage."""
    record = json.loads(data)
    digest = str(record.pop("record_digest", None)) if isinstance(record, dict) else ""
    parsed = checked(record, kind, owner)
    # The stored bytes are canonical JSON, so without this line they are what the digest covers.
    line = f' "record_digest": "{digest}",\n'.encode("utf-8", "replace")
    if digest_hex(data.replace(line, b"", 1)) != digest:
        raise ValueError("its content does not have its record_digest")
    return parsed, digest


def array_names(files: Mapping[str, OldFile]) -> set[str]:
    """The names of the arrays that `files` belong to."""
    return {path.partition("/")[0] for path in files if "/" in path}
