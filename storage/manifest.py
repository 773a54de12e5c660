"""The manifest: source, teacher, views and codec of a cache, compared field by field before any use (I6)."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from reprlib import Repr
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from tinymim.configs.errors import CacheCorrupt, CacheMismatch
from tinymim.configs.taps import Shapes
from tinymim.storage.atomic import canonical_json, digest_hex

FORMAT_VERSION = 1
SPEC_ID_CHARS = 16
LISTED_DIFFERENCES = 8
ABSENT = "(absent)"
REPAIR = "`tinymim cache repair RECIPE` rebuilds it from the recipe"
_short = Repr()

Count = Annotated[int, Field(ge=1, lt=2**40)]
Size = Annotated[int, Field(ge=0, lt=2**63)]
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
PerChannel = Annotated[list[float], Field(min_length=3, max_length=3)]


class _Section(BaseModel):
    """The required keys of a section. Further keys are stored, compared and hashed like these."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


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
    mean: PerChannel
    std: PerChannel


class _Views(_Section):
    size: Count
    scale: Pair
    ratio: Pair
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


_SECTIONS: Mapping[str, type[_Section]] = MappingProxyType(
    {"teacher": _Teacher, "views": _Views, "codec": _Codec, "environment": _Environment}
)
# The place and licence of the weights change no number; `weights_sha256` identifies them.
PROVENANCE_KEYS = frozenset({"weights_origin", "license"})


@pydantic_dataclass(frozen=True, config=ConfigDict(strict=True))
class SourceShard:
    """Identity of one source shard: a tar of `num_samples` images and `size_bytes` bytes. Raises ValueError."""

    name: str
    size_bytes: Size
    num_samples: Annotated[int, Field(ge=0, lt=2**40)]
    content_hash: str


@dataclass(frozen=True)
class Manifest:
    """The identity of a cache. Sections are plain JSON mappings with the keys of the classes above.

    Attributes:
        source: the shards in order; new shards are appended.
        teacher: the network, its weights and the tapped block.
        views: the view law, without the number of views.
        num_views: wanted views per image; may be raised.
        codec: `name`, `version` and `parameters`.
        environment: library versions, and `canary`, a digest of one decoded and resized image.

    Raises:
        ValueError: a required key is missing or has another type, or two shards have one name.
        TypeError: a section holds a value that JSON cannot express.
    """

    source: tuple[SourceShard, ...]
    teacher: Mapping[str, Any]
    views: Mapping[str, Any]
    num_views: int
    codec: Mapping[str, Any]
    environment: Mapping[str, Any]
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for section, kind in _SECTIONS.items():
            # The round trip through JSON makes a manifest in memory equal to the same manifest read from disk.
            values = json.loads(canonical_json(dict(getattr(self, section))))
            try:
                kind.model_validate(values)
            except ValidationError as error:
                raise ValueError("; ".join(invalid_fields(f"{section}.", error))) from error
            object.__setattr__(self, section, values)
        if type(self.num_views) is not int or not 1 <= self.num_views < 2**31:
            raise ValueError(f"num_views is {self.num_views!r}, expected an integer of at least 1")
        if len(self.shards) != len(self.source):
            raise ValueError("manifest source names a shard twice")

    @cached_property
    def shards(self) -> dict[str, SourceShard]:
        """The source shards by name, in order."""
        return {shard.name: shard for shard in self.source}

    @property
    def block(self) -> int:
        """The tapped block of the teacher, counted from 1."""
        return int(self.teacher["block"])

    @property
    def shapes(self) -> Shapes:
        """Shapes of the teacher's output for a view."""
        heads, head_dim, tokens, prefix = (
            int(self.teacher[name]) for name in ("heads", "head_dim", "tokens", "prefix_tokens")
        )
        rows, columns = self.teacher["grid"]
        return Shapes(heads, head_dim, tokens, prefix, (int(rows), int(columns)))

    @cached_property
    def spec_id(self) -> str:
        """16 hex characters, a digest of everything that changes numbers: format, teacher, views and codec.

        It excludes the source list, the number of views, provenance and library versions. A growing cache keeps its
        spec_id.
        """
        return digest_hex(canonical_json(self._spec()))[:SPEC_ID_CHARS]

    def _spec(self) -> dict[str, Any]:
        teacher = {key: value for key, value in self.teacher.items() if key not in PROVENANCE_KEYS}
        return {
            "format_version": self.format_version,
            "teacher": teacher,
            "views": self.views,
            "codec": self.codec,
        }

    def to_json(self) -> dict[str, Any]:
        """The manifest in its stored form, JSON types only."""
        return json.loads(canonical_json(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, stored: object, owner: str) -> "Manifest":
        """The manifest from its stored form.

        Args:
            stored: the parsed JSON.
            owner: the file's place, for messages.

        Raises:
            CacheMismatch: its format version is unknown.
            CacheCorrupt: a section or key is missing, unknown or of the wrong type.
        """
        if not isinstance(stored, dict) or "format_version" not in stored:
            raise CacheCorrupt(f"the manifest in {owner} has no format_version", hint=REPAIR)
        require_format_version(stored["format_version"], owner)
        expected = set(cls.__dataclass_fields__)
        if stored.keys() != expected:
            raise CacheCorrupt(
                f"the manifest in {owner} has missing or unknown sections",
                got=", ".join(sorted(stored)),
                expected=", ".join(sorted(expected)),
                hint=REPAIR,
            )
        try:
            source = tuple(SourceShard(**shard) for shard in stored["source"])
            return cls(**{**stored, "source": source})
        except ValidationError as error:
            problems = "; ".join(invalid_fields("source.", error))
            raise CacheCorrupt(f"the manifest in {owner} is damaged: {problems}", hint=REPAIR) from error
        except (TypeError, ValueError, RecursionError) as error:
            raise CacheCorrupt(f"the manifest in {owner} is damaged: {error}", hint=REPAIR) from error


def require_format_version(version: object, owner: str) -> None:
    """Raises CacheMismatch for any other format version; names `owner`."""
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise CacheMismatch(
            f"format_version of {owner} is unknown",
            got=version,
            expected=FORMAT_VERSION,
            hint="use the version of tinymim that wrote it, or upgrade tinymim",
        )


def invalid_fields(prefix: str, error: ValidationError) -> Iterator[str]:
    """One line per field that pydantic refuses."""
    for problem in error.errors(include_url=False, include_context=False)[:LISTED_DIFFERENCES]:
        place = ".".join(str(part) if str(part).isidentifier() else _short.repr(part) for part in problem["loc"])
        lacks = problem["type"] in ("missing", "missing_argument")
        got = "" if lacks else f", got {_short.repr(problem['input'])}"
        yield f"{prefix}{place}: {problem['msg']}{got}"


def check_same(stored: Manifest, wanted: Manifest) -> list[str]:
    """Check that the cache of `stored` fits `wanted`.

    Teacher (without provenance), views and codec must be equal. A shard in both lists must have the same content.
    Either list may have more shards, and either `num_views` may be larger.

    Returns:
        One line per difference of environment, for warnings.

    Raises:
        CacheMismatch: fields differ; names the first one with both values, and the number of differing fields.
    """
    differences = list(_differences(stored._spec(), wanted._spec()))
    stored_shards, wanted_shards = stored.shards, wanted.shards
    for name in stored_shards.keys() & wanted_shards.keys() if stored.source != wanted.source else ():
        ours, theirs = asdict(stored_shards[name]), asdict(wanted_shards[name])
        differences += _differences(ours, theirs, f"source.{name}.")
    if differences:
        differences.sort(key=lambda difference: difference[0].startswith("source."))
        field, got, expected = differences[0]
        others = [name for name, _, _ in differences[1:LISTED_DIFFERENCES]]
        unlisted = len(differences) - 1 - len(others)
        listing = "".join(f", {name}" for name in others) + (f" and {unlisted} more" if unlisted else "")
        raise CacheMismatch(
            f"the cache was made by something else: {len(differences)} field(s) differ: {field}{listing}",
            got=f"{field} = {got!r} (stored)",
            expected=f"{field} = {expected!r} (wanted)",
            hint="change the recipe back, or give this recipe a cache folder of its own",
        )
    environment = _differences(stored.environment, wanted.environment, "environment.")
    return [f"{field}: cache has {got!r}, this run has {now!r}" for field, got, now in environment]


def grown(stored: Manifest, wanted: Manifest) -> Manifest:
    """`stored` with the new shards of `wanted` appended and the larger `num_views`. Call `check_same` first."""
    known = stored.shards
    new = tuple(shard for shard in wanted.source if shard.name not in known)
    return replace(stored, source=stored.source + new, num_views=max(stored.num_views, wanted.num_views))


def _differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted field, stored value, wanted value) of every leaf whose canonical JSON differs."""
    for key in sorted(stored.keys() | wanted.keys()):
        ours, theirs = stored.get(key, ABSENT), wanted.get(key, ABSENT)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _differences(ours, theirs, f"{prefix}{key}.")
        elif canonical_json(ours) != canonical_json(theirs):
            yield f"{prefix}{key}", ours, theirs
