"""The manifest of a format-1 cache, in the metadata of its root group."""

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetPydanticSchema
from pydantic_core import core_schema

from tinymim.configs.errors import UserError
from tinymim.configs.taps import Shapes
from tinymim.storage.atomic import canonical_json, digest_hex
from tinymim.storage.store import Store
from tinymim.storage.v1.checks import FORMAT_VERSION, Count, Exact, Number, Size, checked, damage

NO_CACHE = "name the cache that `tinymim cache-teacher` wrote"

METADATA, ATTRIBUTE, DIGEST_ATTRIBUTE = "zarr.json", "tinymim", "tinymim_digest"
GROUP_FIELDS = {"node_type": "group", "zarr_format": 3}
MANIFEST_LIMIT_BYTES = 2**28


class _Section(BaseModel):
    """The required keys of a section of the manifest. It may hold more."""

    model_config = ConfigDict(strict=True, extra="allow")

    @classmethod
    def as_stored(cls) -> GetPydanticSchema:
        """Check a field by this class and keep its value as it is, since `spec_id` is a digest of it."""

        def kept(value: Any, check: Callable[[Any], object]) -> Any:
            check(value)
            return value

        return GetPydanticSchema(
            lambda _, schema_of: core_schema.no_info_wrap_validator_function(
                kept, schema_of(cls), serialization=core_schema.simple_ser_schema("any")
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


class OldShard(Exact):
    """Identity of one source shard: a tar of `num_samples` images and `size_bytes` bytes."""

    name: str
    size_bytes: Size
    num_samples: Annotated[int, Field(ge=0, lt=2**40)]
    content_hash: str


class OldManifest(Exact):
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
    with damage(owner):
        root = json.loads(data)
        attributes = root.get("attributes") if isinstance(root, dict) else None
        if not isinstance(attributes, dict) or ATTRIBUTE not in attributes:
            raise UserError(f"{owner} is the metadata of a zarr group, not of a tinymim cache", hint=NO_CACHE)
        stored = attributes.pop(ATTRIBUTE)
        manifest = checked(stored, OldManifest, owner)
        # The first caches stored no digest of their manifest.
        digests: list[dict[str, str]] = [{DIGEST_ATTRIBUTE: digest_hex(canonical_json(stored))}, {}]
        if root not in [{"attributes": digest, **GROUP_FIELDS} for digest in digests]:
            raise ValueError(f"the manifest does not have its {DIGEST_ATTRIBUTE}")
        if len(manifest.shards) != len(manifest.source):
            raise ValueError("its source names a shard twice")
        return manifest
