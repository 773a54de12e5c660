"""Names and places on disk, format version 2. `docs/cache-format.md` describes the format.

A cache has one view layer and one layer per target. A unit is one source shard's part of a layer for a range of views:
an uncompressed zip of zarr arrays, and the commit record that makes it visible.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tinymim.configs.errors import CacheCorrupt, SourceError, UserError
from tinymim.configs.sections.values import LAYER_NAME
from tinymim.storage.atomic import canonical_json, digest_hex
from tinymim.storage.manifest import REPAIR, Layer, Manifest, require_format_version
from tinymim.storage.store import Store

VIEWS = "views"  # the view layer; `views@S` has the digests of its views at another size, S pixels
LAYERS = "layers"  # folder of the target layers
LEASES = "leases"  # of active writers; readers ignore them
METADATA = "zarr.json"
CONSTANTS, CONSTANTS_RECORD = "constants.zip", "constants.json"
ATTRIBUTE, DIGEST_ATTRIBUTE = "tinymim", "tinymim_digest"
MANIFEST_LIMIT_BYTES = 2**28
COMMIT_LIMIT_BYTES = 2**26
_GROUP_FIELDS = {"node_type": "group", "zarr_format": 3}
_NAME = LAYER_NAME.strip("^$")
_FOLDER = rf"({VIEWS}(@[1-9][0-9]{{0,3}})?|{LAYERS}/(?P<layer>{_NAME}))"
# Paths of all files of a cache, in any state: of units, of groups below the root, and others.
UNIT_FILE = re.compile(rf"{_FOLDER}/(?P<stem>[A-Za-z0-9_-]+)/v[0-9]{{1,9}}-[0-9]{{1,9}}\.(?P<kind>zip|json)")
GROUP_FILE = re.compile(rf"({_FOLDER}|{LAYERS})/{re.escape(METADATA)}")
_OTHER_FILE = re.compile(
    rf"{re.escape(METADATA)}|{LEASES}/.+\.g[0-9]{{1,9}}\.json"
    rf"|{LAYERS}/{_NAME}/({re.escape(CONSTANTS)}|{re.escape(CONSTANTS_RECORD)})"
)
_COMMIT_NAME = re.compile(r"(?P<stem>[A-Za-z0-9_-]+)/v(?P<first>[0-9]{1,9})-(?P<last>[0-9]{1,9})\.json")


@dataclass(frozen=True, order=True)
class UnitId:
    """One source shard's records for the views `first_view .. first_view + num_views - 1`."""

    shard: str
    first_view: int
    num_views: int

    def __str__(self) -> str:
        return f"{self.shard} {self.view_range}"

    @property
    def view_range(self) -> str:
        """`v<first>-<last>`, both inclusive."""
        return f"v{self.first_view}-{self.first_view + self.num_views - 1}"

    @property
    def views(self) -> range:
        """The view indices, ascending."""
        return range(self.first_view, self.first_view + self.num_views)

    def overlaps(self, other: "UnitId") -> bool:
        """Whether both hold a view of one shard."""
        return (
            self.shard == other.shard
            and self.first_view < other.first_view + other.num_views
            and other.first_view < self.first_view + self.num_views
        )


def shard_stem(shard: str) -> str:
    """A shard's name as one safe path part: `.tar` is removed, characters other than [A-Za-z0-9-] become `_`."""
    stem = re.sub(r"[^A-Za-z0-9-]", "_", shard.removesuffix(".tar"))
    return f"s{stem}" if not stem or stem.startswith("__") else stem  # zarr reserves names that start with `__`


def check_stems(shards: Iterable[str]) -> None:
    """Raises SourceError if two shards would share a folder; case is ignored, as on some file systems."""
    seen: dict[str, str] = {}
    for shard in shards:
        other = seen.setdefault(shard_stem(shard).lower(), shard)
        if other != shard:
            raise SourceError(
                "two source shards have the same name after conversion to a file name",
                got=f"{other!r} and {shard!r}",
                hint="rename one of them",
            )


def is_views(layer: str) -> bool:
    """Whether a layer is the view layer, or that of another size; no target layer has such a name."""
    return layer == VIEWS or layer.startswith(f"{VIEWS}@")


def view_layer(manifest: Manifest, size: int | None) -> str:
    """The layer with the digests of views of `size` pixels; None: of the size in the manifest."""
    return VIEWS if size in (None, manifest.views["size"]) else f"{VIEWS}@{size}"


def view_layers(manifest: Manifest, layers: Iterable[Layer]) -> list[str]:
    """The view layer, then those of the further sizes of target layers."""
    sizes = {layer.view_size for layer in layers} - {None, manifest.views["size"]}
    return [VIEWS, *(view_layer(manifest, size) for size in sorted(filter(None, sizes)))]


def size_of(layer: str, manifest: Manifest) -> int:
    """The size in pixels of the views that a view layer is about."""
    return int(manifest.views["size"] if layer == VIEWS else layer.partition("@")[2])


def view_spec_id(layer: str, manifest: Manifest) -> str:
    """The `spec_id` in the commit records of a view layer."""
    return manifest.spec_id if layer == VIEWS else manifest.spec_id_at(size_of(layer, manifest))


def layer_folder(layer: str) -> str:
    """The zarr group of a layer."""
    return layer if is_views(layer) else f"{LAYERS}/{layer}"


def shard_folder(layer: str, shard: str) -> str:
    """The folder of one source shard's units in a layer."""
    return f"{layer_folder(layer)}/{shard_stem(shard)}"


def unit_file(layer: str, unit: UnitId) -> str:
    """The zip that holds the arrays of `unit`."""
    return f"{shard_folder(layer, unit.shard)}/{unit.view_range}.zip"


def commit_file(layer: str, unit: UnitId) -> str:
    """The commit record that makes `unit` visible."""
    return f"{shard_folder(layer, unit.shard)}/{unit.view_range}.json"


def parse_commit_file(layer: str, path: str, shards: Mapping[str, str]) -> UnitId | None:
    """The unit whose commit record has this path; None if there is no such unit.

    Args:
        layer: the layer.
        path: a path relative to the cache.
        shards: names of the source shards by `shard_stem`.
    """
    match = _COMMIT_NAME.fullmatch(path.removeprefix(f"{layer_folder(layer)}/"))
    if match is None or match["stem"] not in shards:
        return None
    first, last = int(match["first"]), int(match["last"])
    unit = UnitId(shards[match["stem"]], first, last - first + 1) if last >= first else None
    return unit if unit is not None and path == commit_file(layer, unit) else None


def is_of_cache(path: str) -> bool:
    """Whether tinymim gives its files such a path, relative to the cache."""
    return any(form.fullmatch(path) for form in (UNIT_FILE, GROUP_FILE, _OTHER_FILE))


def is_commit(path: str) -> bool:
    """Whether commit records have such a path."""
    found = UNIT_FILE.fullmatch(path)
    return found is not None and found["kind"] == "json"


def layer_of(path: str) -> str | None:
    """The layer in whose folder a file lies; None: in none."""
    first, _, rest = path.partition("/")
    return first if is_views(first) else rest.partition("/")[0] if first == LAYERS and "/" in rest else None


# ---- groups, whose attributes hold the manifest of the cache and of each layer


def root_group(manifest: Manifest) -> bytes:
    """The metadata of the root group, which holds the manifest and its digest."""
    return _described_group(manifest.to_json())


def layer_group(layer: Layer) -> bytes:
    """The metadata of a target layer's group, which holds its description and its digest."""
    return _described_group(layer.to_json())


def plain_group() -> bytes:
    """The metadata of every other group."""
    return _group({})


def stored_version(store: Store) -> object:
    """The format version of the cache in `store`, unchecked.

    Raises:
        UserError: there is no cache.
        CacheCorrupt: its metadata is damaged.
    """
    content = _attributes(store, METADATA, "there is no cache at")[0]
    if not isinstance(content, dict) or "format_version" not in content:
        raise CacheCorrupt(f"the manifest in {store.place}/{METADATA} has no format_version", hint=REPAIR)
    return content["format_version"]


def read_manifest(store: Store) -> Manifest:
    """Read the manifest of the cache in `store`.

    Raises:
        UserError: there is no cache.
        CacheMismatch: its format version is unknown, or 1; the hint names the upgrade.
        CacheCorrupt: it is damaged.
    """
    owner = f"{store.place}/{METADATA}"
    content, digest = _attributes(store, METADATA, "there is no cache at")
    if isinstance(content, dict) and "format_version" in content:
        require_format_version(content["format_version"], owner)  # before the digest, which version 1 may lack
    manifest = Manifest.from_json(_checked(content, digest, owner), owner)
    return manifest


def read_layer(store: Store, name: str, manifest: Manifest) -> Layer:
    """Read the description of a target layer.

    Raises:
        UserError: there is no such layer.
        CacheMismatch: its format version is unknown.
        CacheCorrupt: it is damaged, or belongs to another cache.
    """
    path = f"{layer_folder(name)}/{METADATA}"
    owner = f"{store.place}/{path}"
    content, digest = _attributes(store, path, f"there is no layer {name} in")
    if isinstance(content, dict) and "format_version" in content:
        require_format_version(content["format_version"], owner)
    layer = Layer.from_json(_checked(content, digest, owner), owner)
    if layer.cache != manifest.spec_id or layer.name != name:
        raise CacheCorrupt(
            f"{owner} does not belong to this cache",
            got=f"layer {layer.name} of spec {layer.cache}",
            expected=f"layer {name} of spec {manifest.spec_id}",
            hint=REPAIR,
        )
    return layer


def layer_names(store: Store) -> list[str]:
    """The names of the target layers, sorted; a layer exists if and only if its group does."""
    names = sorted(name for name in store.folders(LAYERS) if re.fullmatch(LAYER_NAME, name))
    return [name for name in names if store.exists(f"{LAYERS}/{name}/{METADATA}")]


def view_layer_names(store: Store) -> list[str]:
    """The view layer and those of further sizes, from the folders that are there."""
    return sorted({VIEWS, *filter(re.compile(_FOLDER).fullmatch, store.folders())})


def _attributes(store: Store, path: str, absent: str) -> tuple[Any, Any]:
    """The content and the digest that a group's attributes hold."""
    hint = "name the cache that `tinymim cache-teacher` wrote"
    try:
        data = store.read(path, MANIFEST_LIMIT_BYTES)
        stored = json.loads(data)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{absent} {store.place}", hint=hint) from None
    except (ValueError, RecursionError) as error:
        raise CacheCorrupt(f"{store.place}/{path} is damaged: {error}", hint=REPAIR) from error
    attributes = stored.get("attributes") if isinstance(stored, dict) else None
    if not isinstance(attributes, dict) or ATTRIBUTE not in attributes:
        raise UserError(f"{store.place}/{path} is the metadata of a zarr group, not of a tinymim cache", hint=hint)
    rest = {key: value for key, value in stored.items() if key != "attributes"}
    if rest != _GROUP_FIELDS or attributes.keys() - {ATTRIBUTE, DIGEST_ATTRIBUTE}:
        raise CacheCorrupt(f"{store.place}/{path} is damaged: it is not what tinymim writes there", hint=REPAIR)
    return attributes[ATTRIBUTE], attributes.get(DIGEST_ATTRIBUTE)


def _checked(content: Any, digest: Any, owner: str) -> Any:
    if _digest(content) != digest:
        raise CacheCorrupt(f"{owner} is damaged: its content does not have its {DIGEST_ATTRIBUTE}", hint=REPAIR)
    return content


def _digest(content: Any) -> str:
    # Without an indent json uses its fast encoder: a source of 10,000 shards takes 20 ms instead of 200.
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError):
        return ""  # nan or inf, which nobody writes
    return digest_hex(text.encode("ascii"))


def _described_group(content: Mapping[str, Any]) -> bytes:
    return _group({ATTRIBUTE: dict(content), DIGEST_ATTRIBUTE: _digest(content)})


def _group(attributes: dict[str, Any]) -> bytes:
    return canonical_json({"attributes": attributes, **_GROUP_FIELDS})
