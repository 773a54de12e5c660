"""The manifest of a cache and of its layers, compared field by field before any use (I6).

The manifest holds what all layers share: the source, and the view law. A layer's description holds its teacher and its
target. Neither says how many views there are: that follows from the commit records.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from reprlib import Repr
from types import MappingProxyType
from typing import Annotated, Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, ViewMismatch
from tinymim.configs.sections.masks import MaskConfig
from tinymim.configs.sections.values import LAYER_NAME, Seed
from tinymim.configs.taps import Shapes, Tap
from tinymim.storage.atomic import canonical_json, digest_hex
from tinymim.storage.identity import LISTED_DIFFERENCES, Difference, differences, named

FORMAT_VERSION = 2
SPEC_ID_CHARS = 16
REPAIR = "`tinymim cache repair RECIPE` rebuilds it from the recipe"
UPGRADE = "`tinymim cache copy SRC DST --format 2` upgrades it"
_DTYPES = frozenset({"bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}) | {
    f"float{bits}" for bits in (16, 32, 64)
}
_short = Repr()

Count = Annotated[int, Field(ge=1, lt=2**40)]
Size = Annotated[int, Field(ge=0, lt=2**63)]
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
PerChannel = Annotated[list[float], Field(min_length=3, max_length=3)]


class _Section(BaseModel):
    """The required keys of a section. Further keys are stored, compared and hashed like these."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class _Shapes(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    heads: Count
    head_dim: Count
    tokens: Count
    prefix_tokens: Size
    grid: Annotated[list[Count], Field(min_length=2, max_length=2)]


class _Teacher(_Section):
    name: str
    arch: dict[str, Any]
    shapes: _Shapes
    weights_sha256: str
    weights_origin: str | None
    license: str | None
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


class _Array(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    dtype: Annotated[str, Field(pattern=f"^({'|'.join(sorted(_DTYPES))})$")]
    shape: list[Count]


class _Mask(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    version: Count
    ratio: Annotated[float, Field(gt=0, lt=1)]
    unit: Annotated[int, Field(ge=1, le=8192)]
    seed: Seed


class _Target(_Section):
    taps: Annotated[list[Annotated[str, Field(pattern=r"^[a-z_]+@[0-9]{1,4}$")]], Field(min_length=1)]
    name: str
    version: Count
    parameters: dict[str, Any]
    mask: _Mask | None = None
    arrays: Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")], _Array], Field(min_length=1)]


class _Environment(_Section):
    tinymim: str
    canary: str


_CANARY: Final = "canary."
# The place and licence of the weights change no number; `weights_sha256` identifies them.
PROVENANCE_KEYS = frozenset({"weights_origin", "license"})


@pydantic_dataclass(frozen=True, config=ConfigDict(strict=True))
class SourceShard:
    """Identity of one source shard: a tar of `num_samples` images and `size_bytes` bytes. Raises ValueError."""

    name: str
    size_bytes: Size
    num_samples: Annotated[int, Field(ge=0, lt=2**40)]
    content_hash: str


class _Described:
    """What the manifest and the layers share: sections that are checked, and a stored form."""

    _sections: Mapping[str, type[_Section]]
    format_version: int

    def _check_sections(self) -> None:
        for section, kind in self._sections.items():
            # The round trip through JSON makes an object in memory equal to the same object read from disk.
            values = json.loads(json.dumps(dict(getattr(self, section)), allow_nan=False))
            try:
                kind.model_validate(values)
            except ValidationError as error:
                raise ValueError("; ".join(invalid_fields(f"{section}.", error))) from error
            object.__setattr__(self, section, values)


@dataclass(frozen=True)
class Manifest(_Described):
    """The identity of a cache. Sections are plain JSON mappings with the keys of the classes above.

    Attributes:
        source: the shards in order; new shards are appended.
        views: the view law.
        environment: library versions; `canary`, a digest of one decoded and resized image; `canary.OPERATION`, one
            for every operation of the view law.

    Raises:
        ValueError: a required key is missing or has another type, or two shards have one name.
        TypeError: a section holds a value that JSON cannot express.
    """

    source: tuple[SourceShard, ...]
    views: Mapping[str, Any]
    environment: Mapping[str, Any]
    format_version: int = FORMAT_VERSION

    _sections = MappingProxyType({"views": _Views, "environment": _Environment})

    def __post_init__(self) -> None:
        self._check_sections()
        if len(self.shards) != len(self.source):
            raise ValueError("manifest source names a shard twice")

    @cached_property
    def shards(self) -> dict[str, SourceShard]:
        """The source shards by name, in order."""
        return {shard.name: shard for shard in self.source}

    @cached_property
    def spec_id(self) -> str:
        """16 hex characters, a digest of what fixes every pixel of a view: format and view law.

        It excludes the source and library versions. A growing cache keeps its spec_id.
        """
        return _spec_id(self._spec())

    def spec_id_at(self, size: int) -> str:
        """The `spec_id` that a cache of the same view law at another size would have."""
        return _spec_id({"format_version": self.format_version, "views": {**self.views, "size": size}})

    def _spec(self) -> dict[str, Any]:
        return {"format_version": self.format_version, "views": self.views}

    def to_json(self) -> dict[str, Any]:
        """The manifest in its stored form, JSON types only."""
        return {
            "format_version": self.format_version,
            "source": [dict(vars(shard)) for shard in self.source],
            "views": self.views,
            "environment": self.environment,
        }

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
        with _damage_named(owner):
            values = _fields(stored, cls, owner)
            return cls(**{**values, "source": tuple(SourceShard(**shard) for shard in values["source"])})


@dataclass(frozen=True)
class Layer(_Described):
    """The identity of a target layer: what said something about the views, and how that was stored.

    Attributes:
        name: the layer's name in the cache.
        cache: `spec_id` of the cache, whose views these are.
        teacher: the network, its weights and the shapes of its output.
        target: the taps that are read; name, version and parameters of the codec; the arrays of a record; `mask`, the
            law of masks, where the teacher saw visible patches alone.
        environment: library versions.

    Raises:
        ValueError: a required key is missing or has another type, or the name is not one.
        TypeError: a section holds a value that JSON cannot express.
    """

    name: str
    cache: str
    teacher: Mapping[str, Any]
    target: Mapping[str, Any]
    environment: Mapping[str, Any]
    format_version: int = FORMAT_VERSION

    _sections = MappingProxyType({"teacher": _Teacher, "target": _Target, "environment": _Environment})

    def __post_init__(self) -> None:
        self._check_sections()
        texts: tuple[object, ...] = (self.cache, self.name)  # read from a file
        if not all(isinstance(text, str) for text in texts) or not re.fullmatch(LAYER_NAME, self.name):
            raise ValueError(f"layer {self.name!r} of {self.cache!r}: not the name of a layer")
        size = self.view_size
        if size is not None and (type(size) is not int or not 1 <= size < 10_000):
            raise ValueError(f"teacher.arch.img_size is no size of views: {size!r}")

    @property
    def shapes(self) -> Shapes:
        """Shapes of the teacher's output for a view."""
        shapes = self.teacher["shapes"]
        return Shapes(**{**shapes, "grid": tuple(shapes["grid"])})

    @property
    def view_size(self) -> int | None:
        """Width and height of the views that the teacher saw; None: those of the manifest."""
        size: int | None = self.teacher["arch"].get("img_size")
        return size

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The places in the teacher that the target was read from."""
        return tuple(map(Tap.parse, self.target["taps"]))

    @property
    def mask(self) -> MaskConfig | None:
        """The law of masks; None for a teacher that saw whole views. Raises CacheMismatch for an unknown version."""
        stored = self.target.get("mask")
        if stored is None:
            return None
        if stored["version"] != 1:
            raise CacheMismatch(
                f"layer {self.name} has a mask of an unknown version",
                got=stored["version"],
                expected=1,
                hint="use the version of tinymim that wrote it, or upgrade tinymim",
            )
        return MaskConfig(**stored)

    @cached_property
    def arrays(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and shape of every array of a record, in the order of the names."""
        stored = sorted(self.target["arrays"].items())
        return {name: (np.dtype(each["dtype"]).newbyteorder("<"), tuple(each["shape"])) for name, each in stored}

    @cached_property
    def spec_id(self) -> str:
        """16 hex characters, a digest of everything that changes numbers: format, views, teacher and target.

        It excludes the name, provenance and library versions.
        """
        return _spec_id(self._spec())

    def _spec(self) -> dict[str, Any]:
        teacher = {key: value for key, value in self.teacher.items() if key not in PROVENANCE_KEYS}
        return {
            "format_version": self.format_version,
            "cache": self.cache,
            "teacher": teacher,
            "target": self.target,
        }

    def to_json(self) -> dict[str, Any]:
        """The description in its stored form, JSON types only."""
        return dict(vars_of(self))

    @classmethod
    def from_json(cls, stored: object, owner: str) -> "Layer":
        """The layer from its stored form; arguments and errors as `Manifest.from_json`."""
        with _damage_named(owner):
            return cls(**_fields(stored, cls, owner))


def vars_of(described: Manifest | Layer) -> dict[str, Any]:
    """The fields of a manifest or layer by name."""
    return {name: getattr(described, name) for name in described.__dataclass_fields__}


def _spec_id(spec: Mapping[str, Any]) -> str:
    return digest_hex(canonical_json(spec))[:SPEC_ID_CHARS]


def joint_spec_id(spec_ids: Sequence[str]) -> str:
    """The id of several layers in any order; of one layer its own `spec_id`."""
    return spec_ids[0] if len(spec_ids) == 1 else _spec_id({"layers": sorted(spec_ids)})


def _fields(stored: object, kind: type[Manifest] | type[Layer], owner: str) -> dict[str, Any]:
    """The stored fields, if they are exactly those of `kind`."""
    if not isinstance(stored, dict) or "format_version" not in stored:
        raise CacheCorrupt(f"the manifest in {owner} has no format_version", hint=REPAIR)
    require_format_version(stored["format_version"], owner)
    expected = set(kind.__dataclass_fields__)
    if stored.keys() != expected:
        raise CacheCorrupt(
            f"the manifest in {owner} has missing or unknown sections",
            got=", ".join(sorted(stored)),
            expected=", ".join(sorted(expected)),
            hint=REPAIR,
        )
    return stored


@contextmanager
def _damage_named(owner: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        problems = "; ".join(invalid_fields("source.", error))
        raise CacheCorrupt(f"the manifest in {owner} is damaged: {problems}", hint=REPAIR) from error
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CacheCorrupt(f"the manifest in {owner} is damaged: {error}", hint=REPAIR) from error


def require_format_version(version: object, owner: str) -> None:
    """Raises CacheMismatch for any other format version; names `owner`."""
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise CacheMismatch(
            f"format_version of {owner} is unknown",
            got=version,
            expected=FORMAT_VERSION,
            hint=UPGRADE if version == 1 else "use the version of tinymim that wrote it, or upgrade tinymim",
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

    The view law must be equal. A shard in both lists must have the same content; either list may have more shards.

    Returns:
        One line per difference of environment, for warnings.

    Raises:
        CacheMismatch: fields differ; names the first one with both values, and the number of differing fields.
    """
    found = list(differences(stored._spec(), wanted._spec()))
    stored_shards, wanted_shards = stored.shards, wanted.shards
    for name in stored_shards.keys() & wanted_shards.keys() if stored.source != wanted.source else ():
        ours, theirs = asdict(stored_shards[name]), asdict(wanted_shards[name])
        found += differences(ours, theirs, f"source.{name}.")
    found.sort(key=lambda difference: difference[0].startswith("source."))
    _refuse(found, "the cache", "change the recipe back, or give this recipe a cache folder of its own")
    check_canaries(stored.environment, wanted.environment)
    return _environments(stored, wanted)


def check_canaries(stored: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Check that every operation on views makes the same pixels now: the entries `canary.OPERATION` are equal.

    Args:
        stored: the environment in a manifest, or what else states the digests.
        found: the digests of this machine, by the same names.

    Raises:
        ViewMismatch: an operation differs; names all that do.
    """
    names = sorted(name for name in stored.keys() | found.keys() if name.startswith(_CANARY))
    differ = [name for name in names if stored.get(name) != found.get(name)]
    if differ:
        raise ViewMismatch(
            f"augmentations make other pixels here: {', '.join(name.removeprefix(_CANARY) for name in differ)}",
            got=", ".join(str(found.get(name, "no such operation")) for name in differ),
            expected=", ".join(str(stored.get(name, "no such operation")) for name in differ),
            hint="compare the version of numpy; `tinymim` and numpy of the machine that made them reproduce them",
        )


def check_same_layer(stored: Layer, wanted: Layer) -> list[str]:
    """Check that a layer is the wanted one: everything but provenance and environment must be equal.

    Returns:
        One line per difference of environment, for warnings.

    Raises:
        CacheMismatch: fields differ; names the first one with both values, and the number of differing fields.
    """
    hint = "change the recipe back, or name a new layer of this cache with `layer`"
    # The arrays follow from the parameters, so these are named first.
    found = sorted(differences(stored._spec(), wanted._spec()), key=lambda each: each[0].startswith("target.arrays"))
    _refuse(found, f"layer {stored.name} of the cache", hint)
    return _environments(stored, wanted)


def _refuse(found: list[Difference], owner: str, hint: str) -> None:
    if found:
        listing, got, expected = named(found)
        raise CacheMismatch(f"{owner} was made by something else: {listing}", got=got, expected=expected, hint=hint)


def _environments(stored: Manifest | Layer, wanted: Manifest | Layer) -> list[str]:
    found = differences(stored.environment, wanted.environment, "environment.")
    return [f"{field}: cache has {got!r}, this run has {now!r}" for field, got, now in found]


def grown(stored: Manifest, wanted: Manifest) -> Manifest:
    """`stored` with the new shards of `wanted` appended. Call `check_same` first."""
    known = stored.shards
    new = tuple(shard for shard in wanted.source if shard.name not in known)
    return replace(stored, source=stored.source + new) if new else stored
