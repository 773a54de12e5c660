"""Reading of format 1, for `cache info` and the upgrade by `cache copy`. No other module reads it, none writes it.

A format-1 cache has one zarr group per source shard and range of views, a *unit*, and one commit record per unit.
The record holds the digest of every file of the unit, and this module compares each. It shares no code with the
current format, which is free to change.

Shapes: I images of a unit, V its views, R = I * V records, K total bytes of its keys.
"""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from reprlib import Repr
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import numpy as np
import numpy.typing as npt
from numcodecs import Zstd
from pydantic import BaseModel, ConfigDict, Field, GetPydanticSchema, ValidationError
from pydantic_core import core_schema

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.configs.taps import Shapes
from tinymim.storage.atomic import canonical_json, digest_hex
from tinymim.storage.store import Store, open_store

FORMAT_VERSION = 1
UPGRADE_HINT = "`tinymim cache copy SRC DST --format 2` upgrades it"
RESTORE = "restore the cache from a copy, or make it again in a new place with `tinymim cache-teacher RECIPE`"
NO_CACHE = "name the cache that `tinymim cache-teacher` wrote"

METADATA, COMMITS, CONSTANTS, CONSTANTS_RECORD = "zarr.json", "commits", "constants", "constants.json"
ATTRIBUTE, DIGEST_ATTRIBUTE = "tinymim", "tinymim_digest"
GROUP_FIELDS = {"node_type": "group", "zarr_format": 3}
GROUP_BYTES = len(canonical_json({"attributes": {}, **GROUP_FIELDS}))
MANIFEST_LIMIT_BYTES, RECORD_LIMIT_BYTES = 2**28, 2**26
LISTED_PROBLEMS = 8
KEY_ARRAYS = ("key_bytes", "key_ends")
# The arrays of every unit: dtype and shape after the first axis.
REQUIRED_ARRAYS: Mapping[str, tuple[str, tuple[int, ...]]] = MappingProxyType(
    {
        "key_bytes": ("|u1", ()),  # [K], the keys joined in UTF-8
        "key_ends": ("<i8", ()),  # [I], where each key ends in key_bytes
        "box": ("<i4", (4,)),  # [R, 4], top, left, height, width in pixels of the image
        "flip": ("|u1", ()),  # [R]
        "digest": ("<u8", ()),  # [R], digest of the view's pixels
    }
)
# The outer codec, the codecs of its chunks and of its index, and the place of the index.
CODECS = ("sharding_indexed", [["bytes", "zstd", "crc32c"], ["bytes", "crc32c"]], "end")
CRC_BYTES = 4
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# A block of a zstd frame holds at most 128 KiB and takes at least 4 bytes (RFC 8878, 3.1.1.2).
ZSTD_MOST = 2**17 // 4

Count = Annotated[int, Field(ge=1, lt=2**40)]
Size = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[int, Field(ge=1, lt=2**31)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
# A group's metadata, or an array's metadata or payload, relative to the group. No such path can lead out of it.
FilePath = Annotated[str, Field(pattern=r"^(zarr\.json|[A-Za-z][A-Za-z0-9_]*/(zarr\.json|c(/0)+))$")]
Stored = TypeVar("Stored", bound=BaseModel)
_short = Repr()


# ---- the manifest


class _Exact(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Section(BaseModel):
    """The required keys of a section of the manifest. It may hold more."""

    model_config = ConfigDict(strict=True, extra="allow")

    @classmethod
    def as_stored(cls) -> GetPydanticSchema:
        """Check a field by this class and keep its value as it is, since `spec_id` is a digest of it."""

        def checked(value: Any, check: Callable[[Any], object]) -> Any:
            check(value)
            return value

        return GetPydanticSchema(
            lambda _, schema_of: core_schema.no_info_wrap_validator_function(
                checked, schema_of(cls), serialization=core_schema.simple_ser_schema("any")
            )
        )


class _Teacher(_Section):
    name: str
    arch: dict[str, Any]
    weights_sha256: str
    weights_origin: str | None
    license: str | None
    block: Count
    heads: Count
    head_dim: Count
    tokens: Count
    prefix_tokens: Size
    grid: Annotated[list[Count], Field(min_length=2, max_length=2)]
    precision: str
    mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    std: Annotated[list[float], Field(min_length=3, max_length=3)]


class _Views(_Section):
    size: Count
    scale: Annotated[list[float], Field(min_length=2, max_length=2)]
    ratio: Annotated[list[float], Field(min_length=2, max_length=2)]
    interpolation: str
    flip: float
    seed: int


class _Codec(_Section):
    name: str
    version: Count
    parameters: dict[str, Any]


class _Environment(_Section):
    tinymim: str
    canary: str


class OldShard(_Exact):
    """Identity of one source shard: a tar of `num_samples` images and `size_bytes` bytes."""

    name: str
    size_bytes: Size
    num_samples: Annotated[int, Field(ge=0, lt=2**40)]
    content_hash: str


class OldManifest(_Exact):
    """The identity of a format-1 cache. Each section is a mapping as stored."""

    format_version: int
    source: list[OldShard]
    teacher: Annotated[Mapping[str, Any], _Teacher.as_stored()]
    views: Annotated[Mapping[str, Any], _Views.as_stored()]
    num_views: Number
    codec: Annotated[Mapping[str, Any], _Codec.as_stored()]
    environment: Annotated[Mapping[str, Any], _Environment.as_stored()]

    @cached_property
    def shards(self) -> dict[str, OldShard]:
        """The source shards by name, in order."""
        return {shard.name: shard for shard in self.source}

    @property
    def block(self) -> int:
        """The tapped block of the teacher, counted from 1."""
        return int(self.teacher["block"])

    @property
    def tap(self) -> str:
        """The tap that format 1 implied: its caches held relations only."""
        return f"qkv@{self.block}"

    @property
    def shapes(self) -> Shapes:
        """Shapes of the teacher's output for a view."""
        rows, columns = self.teacher["grid"]
        heads, head_dim, tokens, prefix = (self.teacher[k] for k in ("heads", "head_dim", "tokens", "prefix_tokens"))
        return Shapes(heads, head_dim, tokens, prefix, (rows, columns))

    @cached_property
    def spec_id(self) -> str:
        """16 hex characters, a digest of format, views, codec, and teacher without the provenance of its weights."""
        teacher = {key: value for key, value in self.teacher.items() if key not in ("weights_origin", "license")}
        spec = {"format_version": FORMAT_VERSION, "teacher": teacher, "views": self.views, "codec": self.codec}
        return digest_hex(canonical_json(spec))[:16]


def is_v1(store: Store) -> bool:
    """Whether the store holds a cache of format 1, by the `format_version` of its manifest; checks nothing else.

    Raises:
        StoreError: the object store refuses or fails.
    """
    try:
        version = json.loads(store.read(METADATA, MANIFEST_LIMIT_BYTES))["attributes"][ATTRIBUTE]["format_version"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False
    return type(version) is int and version == FORMAT_VERSION


def parse_manifest(data: bytes, owner: str) -> OldManifest:
    """Parse the metadata of the root group, stored at `owner`; errors of `OldCache`."""
    with _damage(owner):
        root = json.loads(data)
        attributes = root.get("attributes") if isinstance(root, dict) else None
        if not isinstance(attributes, dict) or ATTRIBUTE not in attributes:
            raise UserError(f"{owner} is the metadata of a zarr group, not of a tinymim cache", hint=NO_CACHE)
        stored = attributes.pop(ATTRIBUTE)
        manifest = _checked(stored, OldManifest, owner)
        # The first caches stored no digest of their manifest.
        digests: list[dict[str, str]] = [{DIGEST_ATTRIBUTE: digest_hex(canonical_json(stored))}, {}]
        if root not in [{"attributes": digest, **GROUP_FIELDS} for digest in digests]:
            raise ValueError(f"the manifest does not have its {DIGEST_ATTRIBUTE}")
        if len(manifest.shards) != len(manifest.source):
            raise ValueError("its source names a shard twice")
        return manifest


# ---- records: JSON with a digest of itself


class OldFile(_Exact):
    """Size and digests of one file. The first caches recorded no crc32c."""

    size_bytes: Size
    blake2b: Digest
    crc32c: Annotated[int, Field(ge=0, lt=2**32)] | None = None


class _Record(_Exact):
    """The fields of every record except `record_digest`."""

    format_version: int
    spec_id: str
    files: dict[FilePath, OldFile]


class _RecordShard(_Exact):
    name: str
    content_hash: str


class OldUnit(_Record):
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
        return sorted(_array_names(self.files) - set(KEY_ARRAYS))


def parse_unit(data: bytes, path: str, place: Path | str, manifest: OldManifest) -> OldUnit:
    """Parse the commit record `data`, stored at `path` of the cache; errors of `OldCache`."""
    with _damage(f"commit record {place}/{path}"):
        unit, _ = _parse_record(data, OldUnit, f"{place}/{path}")
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


def _parse_record(data: bytes, kind: type[Stored], owner: str) -> tuple[Stored, str]:
    """A record and its digest; raises CacheMismatch for an unknown format version, ValueError for damage."""
    record = json.loads(data)
    digest = str(record.pop("record_digest", None)) if isinstance(record, dict) else ""
    parsed = _checked(record, kind, owner)
    # The stored bytes are canonical JSON, so without this line they are what the digest covers.
    line = f' "record_digest": "{digest}",\n'.encode("utf-8", "replace")
    if digest_hex(data.replace(line, b"", 1)) != digest:
        raise ValueError("its content does not have its record_digest")
    return parsed, digest


def _checked(stored: object, kind: type[Stored], owner: str) -> Stored:
    """Validate the JSON of a manifest or record; errors of `_parse_record`."""
    if not isinstance(stored, dict) or "format_version" not in stored:
        raise ValueError("there is no format_version")
    version = stored["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise CacheMismatch(
            f"format_version of {owner} is unknown",
            got=version,
            expected=FORMAT_VERSION,
            hint="use the version of tinymim that wrote it, or upgrade tinymim",
        )
    try:
        return kind.model_validate(stored)
    except ValidationError as error:
        raise ValueError("; ".join(_problems(error))) from error


def _problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors(include_url=False, include_context=False)[:LISTED_PROBLEMS]:
        place = ".".join(str(part) if str(part).isidentifier() else _short.repr(part) for part in problem["loc"])
        got = "" if problem["type"] == "missing" else f", got {_short.repr(problem['input'])}"
        yield f"{place}: {problem['msg']}{got}"


@contextmanager
def _damage(what: str) -> Iterator[None]:
    """Turn what the decoders raise into CacheCorrupt about `what`."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: JSON too deep, or the decompressor
        raise CacheCorrupt(f"{what} is damaged: {error}", hint=RESTORE) from error


def _array_names(files: Mapping[str, OldFile]) -> set[str]:
    return {path.partition("/")[0] for path in files if "/" in path}


# ---- the cache


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
            with _damage(f"{self.place}/{METADATA}"):
                data = self.store.read(METADATA, MANIFEST_LIMIT_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"there is no cache at {self.place}", hint=NO_CACHE) from None
        self.manifest = parse_manifest(data, f"{self.place}/{METADATA}")
        self._constants, self._constants_digest, self._constants_bytes = self._read_constants_record()
        paths = sorted(entry.path for entry in self.store.list(COMMITS) if entry.path.endswith(".json"))
        with _damage(f"a commit record of {self.place}"):
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
        with _damage(f"unit {unit} of {self.place}"):
            self._read_files(unit.folder, {path: file for path, file in unit.files.items() if path == METADATA})
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name in sorted(_array_names(unit.files) | set(REQUIRED_ARRAYS)):
            with _damage(f"unit {unit} of {self.place}: array {name}"):
                values = arrays[name] = self._read_array(unit.folder, name, unit.files)
                dtype, inner = REQUIRED_ARRAYS.get(name, (values.dtype.str, values.shape[1:]))
                if values.dtype.str != dtype or values.shape[1:] != inner:
                    raise ValueError(
                        f"it is {values.dtype} {list(values.shape)}, expected {dtype} [..., {list(inner)}]"
                    )
                if name not in KEY_ARRAYS and len(values) != unit.num_records:
                    raise ValueError(f"it has {len(values)} records, expected {unit.num_records}")
        with _damage(f"unit {unit} of {self.place}: array key_bytes"):
            return _decode_keys(arrays.pop("key_bytes"), arrays.pop("key_ends"), unit), arrays

    def constants(self) -> dict[str, npt.NDArray[Any]] | None:
        """The codec's constants by name, every byte checked; None if there are none.

        Raises:
            CacheCorrupt: a file is missing or changed; names array and file.
        """
        arrays = {}
        for name in sorted(_array_names(self._constants or {})):
            with _damage(f"array {name} of {self.place}/{CONSTANTS}"):
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
        with _damage(owner):
            try:
                data = self.store.read(CONSTANTS_RECORD, RECORD_LIMIT_BYTES)
            except FileNotFoundError:
                return None, None, 0
            record, digest = _parse_record(data, _Record, owner)
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


# ---- arrays


def _decode_keys(key_bytes: npt.NDArray[Any], key_ends: npt.NDArray[Any], unit: OldUnit) -> list[str]:
    data, ends = key_bytes.tobytes(), key_ends.tolist()
    if digest_hex(key_ends.tobytes() + data) != unit.key_digest:
        raise ValueError("the keys do not have the committed key_digest")
    starts = [0, *ends[:-1]]
    if (ends[-1] if ends else 0) != len(data) or any(a > b for a, b in zip(starts, ends, strict=False)):
        raise ValueError("key_ends does not fit it")
    keys = [data[start:end].decode() for start, end in zip(starts, ends, strict=False)]
    if repeated := [key for key, count in Counter(keys).items() if count > 1]:
        raise ValueError(f"{len(repeated)} key(s) appear twice, such as {repeated[0]!r}")
    if len(keys) != unit.num_images:
        raise ValueError(f"wrong number of keys: {len(keys)}, expected {unit.num_images}")
    return keys


def decode_array(metadata: bytes, payloads: list[bytes]) -> npt.NDArray[Any]:
    """Decode an array from its metadata and its payload files: one zarr shard, none if the array is empty.

    Raises:
        ValueError, RuntimeError: the metadata is not that of format 1, or the payload does not fit it.
    """
    shape, dtype, length = _described(metadata)
    if 0 in shape:
        return np.empty(shape, dtype)
    if len(payloads) != 1:
        raise ValueError(f"it has {len(payloads)} payload files, expected 1")
    payload = memoryview(payloads[0])
    chunks = -(-shape[0] // length)
    chunk_bytes = length * math.prod(shape[1:]) * dtype.itemsize
    # Checked before any allocation: a few bytes of metadata may claim any shape.
    if chunks * chunk_bytes > len(payload) * ZSTD_MOST:
        raise ValueError(f"{chunks} chunks of {[length, *shape[1:]]} cannot come out of {len(payload)} bytes")
    # The index at the end holds offset and size of each chunk as uint64, then its own crc32c.
    places = np.frombuffer(payload, "<u8", 2 * chunks, offset=len(payload) - 16 * chunks - CRC_BYTES).reshape(-1, 2)
    values = np.empty((chunks * length, *shape[1:]), dtype)
    for number, (offset, size_bytes) in enumerate(places.tolist()):
        if offset + size_bytes > len(payload) or size_bytes < CRC_BYTES:
            raise ValueError("a chunk lies outside its file")
        frame = payload[offset : offset + size_bytes - CRC_BYTES]
        if _content_bytes(frame) != chunk_bytes:  # a shorter one would leave the rest of the array unwritten
            raise ValueError(f"a chunk does not hold {chunk_bytes} bytes")
        Zstd().decode(frame, values[number * length : (number + 1) * length])
    return values[: shape[0]]


def _described(metadata: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, dtype and records per inner chunk; ValueError unless the metadata is that of format 1."""
    try:
        stored = json.loads(metadata)
        shape, kind = tuple(stored["shape"]), stored["data_type"]
        [sharding] = stored["codecs"]
        inner = sharding["configuration"]
        length, *rest = inner["chunk_shape"]
        chains = [[codec["name"] for codec in inner[key]] for key in ("codecs", "index_codecs")]
        order = inner["codecs"][0].get("configuration", {}).get("endian", "little")
        codecs = (sharding["name"], chains, inner["index_location"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{METADATA} is damaged: {error!r}") from error
    if any(type(size) is not int or not 0 <= size < 2**62 for size in (*shape, length)) or length < 1 or not shape:
        raise ValueError(f"shape {shape} in chunks of {length}")
    if not re.fullmatch("bool|u?int(8|16|32|64)|float(16|32|64)", str(kind)) or order != "little":
        raise ValueError(f"data type {kind!r} in {order}-endian order")
    if codecs != CODECS or rest != [max(size, 1) for size in shape[1:]]:
        raise ValueError(f"codecs {codecs}, chunks {[length, *rest]} are not those of format version 1")
    return shape, np.dtype(np.dtype(kind).newbyteorder("<").str), length


def _content_bytes(frame: memoryview) -> int | None:
    """The decompressed size that a zstd frame states (RFC 8878, 3.1.1.1); None if it states none."""
    flags = frame[4] if frame[:4] == ZSTD_MAGIC and len(frame) > 4 else 0
    single_segment, width = flags & 32, 1 << (flags >> 6)
    if width == 1 and not single_segment:
        return None
    start = (5 if single_segment else 6) + (0, 1, 2, 4)[flags & 3]
    return int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)
