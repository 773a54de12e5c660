"""Full checks of a cache. They list all damage, while a reader stops at the first.

`survey` checks groups, descriptions of layers, constants and commit records, compares the layers with one another, and
finds stray files. `check_unit` checks every byte of a unit.
"""

import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal, TypeVar

import numpy as np
from google_crc32c import value as crc32c

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.storage import layout
from tinymim.storage.blocks import (
    VIEW_ARRAYS,
    ZSTD_MOST,
    Array,
    ArrayType,
    Block,
    UnitFileWriter,
    decode_keys,
    decode_view,
    key_arrays,
)
from tinymim.storage.commit import UnitInfo, holds_keys, in_source_order, key_digest, parse_commit
from tinymim.storage.constants import constants_places, read_constants, read_record
from tinymim.storage.entries import REQUESTS
from tinymim.storage.layout import (
    GROUP_FILE,
    LAYERS,
    LEASES,
    METADATA,
    UNIT_FILE,
    VIEWS,
    UnitId,
    is_of_cache,
    is_views,
    layer_of,
)
from tinymim.storage.leases import Holder, Leases, shard_lease
from tinymim.storage.manifest import Layer, Manifest
from tinymim.storage.store import Store
from tinymim.storage.writer import constants_lease

# group: metadata that follows from the manifest; layer: the description of a layer; constants; commit: a commit record;
# views: views of a target layer that the view layer lacks; unit: the file of a unit; stray: a file of the cache that
# belongs to nothing.
Kind = Literal["group", "layer", "constants", "commit", "views", "unit", "stray"]
SHARED_VIEWS = "it shares views with unit"
OTHER_KEYS = "its images are not those of unit"
PIECE_BYTES = 2**24  # held in memory at once, unless one block is larger
Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Finding:
    """One problem. `path` is relative to the cache; `unit` and `layer` tell what it concerns."""

    kind: Kind
    path: str
    what: str
    unit: UnitId | None = None
    layer: str | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass(frozen=True)
class Survey:
    """The content of a cache and its problems, except those in the files of units.

    Attributes:
        manifest: the manifest that was checked against.
        view_layers: the view layer, then those of further sizes.
        layers: the target layers whose descriptions are intact.
        units: by layer, the units with intact commit records, in source order, then by view.
        sizes: bytes of every file.
        findings: all problems outside the files of units.
        foreign: files that are not the cache's; they do no harm.
        writers: leases of writers that are not known to be dead, and their owners where they can be read.
    """

    manifest: Manifest
    view_layers: list[str]
    layers: Mapping[str, Layer]
    units: Mapping[str, list[UnitInfo]]
    sizes: Mapping[str, int]
    findings: list[Finding]
    foreign: list[str]
    writers: dict[str, Holder | None]

    def arrays(self, layer: str) -> Mapping[str, ArrayType]:
        """Dtype and shape of every array of a record, by name."""
        return VIEW_ARRAYS if is_views(layer) else self.layers[layer].arrays

    def all_units(self) -> list[UnitInfo]:
        """The units of all layers, those of the view layers first."""
        return [info for layer in (*self.view_layers, *self.layers) for info in self.units.get(layer, ())]


def survey(store: Store, manifest: Manifest | None = None) -> Survey:
    """Check everything except the files of units.

    Args:
        store: the cache's store.
        manifest: the manifest to check against; None: the stored one.

    Raises:
        UserError: there is no cache.
        StoreError: the object store refuses or fails.
        CacheMismatch: its format version is unknown.
        CacheCorrupt: the manifest is damaged, so the rest cannot be checked.
    """
    manifest = manifest or layout.read_manifest(store)
    # Read before and after the listing: a file of a living writer in the listing then has a lease in one of the two.
    leases = Leases(store).living()
    sizes = {entry.path: entry.size_bytes for entry in store.list()}
    leases |= Leases(store).living()
    check = _Survey(store, manifest, sizes, leases)
    check.descriptions()
    for layer in (*check.view_layers, *check.layers):
        check.commits(layer)
    for layer in check.layers:
        check.constants(layer)
    check.one_family()
    check.groups()
    check.strays()
    return Survey(manifest, check.view_layers, check.layers, check.units, sizes, check.findings, check.foreign, leases)


def check_unit(
    store: Store, info: UnitInfo, arrays: Mapping[str, ArrayType], size_bytes: int | None = None
) -> list[Finding]:
    """Read every byte of a unit's file once, a few blocks at a time, and decode all records and keys.

    Args:
        store: the cache's store.
        info: the unit.
        arrays: dtype and shape of every array of a record, by name.
        size_bytes: the size of the file, where it is known from a listing.

    Raises:
        StoreError: the object store refuses or fails.
    """

    def finding(what: str) -> Finding:
        return Finding("unit", info.path, what, info.unit, info.layer)

    if size_bytes is not None and size_bytes != info.size_bytes:
        return [finding(f"it has {size_bytes} bytes, expected {info.size_bytes}")]
    digest, findings, keys = blake2b(digest_size=16), [], None
    try:
        for name, block, data in unit_blocks(store, info):
            digest.update(data)
            problem = _block_problem(info, name, block, data)
            if problem is None and name == "keys":
                problem, keys = _key_problem(data, info)
            elif problem is None and isinstance(name, int):
                problem = _view_problem(data, name, info, arrays)
            elif problem is None and name == "head":
                head = data
            findings += [finding(problem)] if problem else []
    except FileNotFoundError:
        return [finding("the file is missing")]
    except OSError as error:
        return [finding(f"it cannot be read: {error}")]
    if not findings and digest.hexdigest() != info.parts.blake2b:
        findings.append(finding("it does not have its committed digest"))
    if not findings and head != _expected_head(info, arrays, keys):
        findings.append(finding("its metadata is not what tinymim writes"))
    return findings


def unit_blocks(store: Store, info: UnitInfo) -> Iterator[tuple[str | int, Block, bytes]]:
    """The parts of a unit's file in order, unchecked: name (of a view its number in the unit), record, bytes.

    Raises:
        FileNotFoundError, OSError, StoreError: as `Store.read_ranges`.
    """
    parts = info.parts
    names: list[str | int] = ["head", *([] if parts.keys is None else ["keys"]), *range(len(parts.views)), "tail"]
    blocks = list(zip(names, parts.all, strict=True))
    begin = 0
    for piece in _pieces(blocks):
        end = begin + sum(block.size_bytes for _, block in piece)
        data = b"".join(store.read_ranges(info.path, [(begin, end)])) if end > begin else b""
        at = 0
        for name, block in piece:
            yield name, block, data[at : at + block.size_bytes]
            at += block.size_bytes
        begin = end


def checked_pieces(store: Store, info: UnitInfo) -> Iterator[bytes]:
    """The bytes of a unit's file in bounded pieces, each compared with its checksum, and with the digest at the end.

    Raises:
        ValueError: the file is missing or changed.
        StoreError: the object store refuses or fails.
    """
    digest = blake2b(digest_size=16)
    try:
        for name, block, data in unit_blocks(store, info):
            if problem := _block_problem(info, name, block, data):
                raise ValueError(problem)
            digest.update(data)
            yield data
    except FileNotFoundError as error:
        raise ValueError(f"its file {info.path} is missing") from error
    except OSError as error:
        raise ValueError(f"its file {info.path} cannot be read: {error}") from error
    if digest.hexdigest() != info.parts.blake2b:
        raise ValueError("it does not have its committed digest")


# ---- the parts of a survey


@dataclass
class _Survey:
    store: Store
    manifest: Manifest
    sizes: Mapping[str, int]  # all files
    leases: Mapping[str, Holder | None]
    view_layers: list[str] = field(default_factory=list)
    layers: dict[str, Layer] = field(default_factory=dict)
    units: dict[str, list[UnitInfo]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    known: set[str] = field(default_factory=set)  # files that belong to something, intact or not
    named: dict[str, list[UnitId]] = field(default_factory=dict)  # by layer, units with a commit record, intact or not

    def descriptions(self) -> None:
        """Read the descriptions of the target layers. A layer without one cannot be checked further."""
        folders = {found["layer"] for path in self.sizes if (found := UNIT_FILE.fullmatch(path))} - {None}
        described = {found["layer"] for path in self.sizes if (found := GROUP_FILE.fullmatch(path))} - {None}
        for name in sorted(folders | described):
            path = f"{layout.layer_folder(name)}/{METADATA}"
            try:
                self.layers[name] = layout.read_layer(self.store, name, self.manifest)
                continue
            except (CacheCorrupt, CacheMismatch) as error:
                what = _plain(error, path)
            except UserError:  # missing, or without our attribute
                what = "the description of the layer is missing"
            self.findings.append(Finding("layer", path, f"{what}; its units cannot be checked", layer=name))
            self.known |= {path for path in self.sizes if layer_of(path) == name}
        # Those of files too: they may belong to a layer without a description.
        held = {name for path in self.sizes if is_of_cache(path) and is_views(name := layer_of(path) or "")}
        self.view_layers = sorted({*layout.view_layers(self.manifest, self.layers.values()), *held})

    def commits(self, layer: str) -> None:
        shards = {layout.shard_stem(name): name for name in self.manifest.shards}
        folder = f"{layout.layer_folder(layer)}/"
        paths = (path for path in self.sizes if path.startswith(folder))
        named = {path: unit for path in paths if (unit := layout.parse_commit_file(layer, path, shards))}
        self.named[layer] = in_source_order(named.values(), self.manifest)
        read = _each(self.store, sorted(named), lambda path: self._commit(layer, path, named[path]))
        self.findings += [what for what in read if isinstance(what, Finding)]
        infos = {info.unit: info for info in read if isinstance(info, UnitInfo)}
        self.units[layer] = [infos[unit] for unit in self.named[layer] if unit in infos]
        self.known |= {name for path in named for name in (path, f"{path.removesuffix('.json')}.zip")}
        for before, after in itertools.pairwise(infos[unit] for unit in self.named[layer] if unit in infos):
            if before.unit.overlaps(after.unit):
                self._about(after, f"{SHARED_VIEWS} {before.unit}")

    def _commit(self, layer: str, path: str, unit: UnitId) -> UnitInfo | Finding | None:
        views = is_views(layer)
        spec_id = layout.view_spec_id(layer, self.manifest) if views else self.layers[layer].spec_id
        try:
            data = self.store.read(path, layout.COMMIT_LIMIT_BYTES)
            return parse_commit(self.store.place, layer, unit, data, spec_id, self.manifest)
        except FileNotFoundError:
            return None  # removed since it was listed
        except (CacheCorrupt, CacheMismatch) as error:
            return Finding("commit", path, _plain(error, path), unit, layer)
        except (ValueError, OSError) as error:
            return Finding("commit", path, f"it cannot be read: {error}", unit, layer)

    def _about(self, info: UnitInfo, what: str, kind: Kind = "commit") -> None:
        path = layout.commit_file(info.layer, info.unit)
        self.findings.append(Finding(kind, path, what, info.unit, info.layer))

    def constants(self, layer: str) -> None:
        path, record_path = constants_places(layer)
        infos = self.units[layer]
        named = {info.constants for info in infos}
        try:
            record, digest = read_record(self.store, self.layers[layer])
        except (CacheCorrupt, CacheMismatch) as error:
            self.known |= {path, record_path}
            self._constants_finding(layer, record_path, _plain(error, record_path))
            return
        if record is None and None in named:
            for info in infos:
                if info.constants is not None:
                    self._about(info, "it was made with constants, and others of its layer without")
            return
        if record is None:
            if named - {None}:
                self.known.add(path)
                self._constants_finding(layer, record_path, "the file is missing, and units were made with constants")
            return
        self.known |= {path, record_path}
        if len(named) == 1 and named != {digest}:
            what = f"all units were made with other constants: {named.pop()}"
            self._constants_finding(layer, record_path, what)
        else:
            for info in infos:
                if info.constants != digest:
                    self._about(info, f"it was made with other constants than those of its layer: {info.constants}")
        try:
            read_constants(self.store, self.layers[layer])
        except CacheCorrupt as error:
            self._constants_finding(layer, path, _plain(error, path))

    def _constants_finding(self, layer: str, path: str, what: str) -> None:
        self.findings.append(Finding("constants", path, what, layer=layer))

    def one_family(self) -> None:
        """Compare the layers: one set of images per shard, and no target of a view that its view layers lack."""
        first: dict[str, UnitInfo] = {}
        held_views: dict[str, dict[str, set[int]]] = {layer: {} for layer in self.view_layers}
        for layer, by_shard in held_views.items():
            for unit in self.named[layer]:
                by_shard.setdefault(unit.shard, set()).update(unit.views)
        views = held_views[VIEWS]
        for layer in (*self.view_layers, *self.layers):
            size = None if is_views(layer) else self.layers[layer].view_size
            needed = dict.fromkeys((VIEWS, layout.view_layer(self.manifest, size)))
            for info in self.units[layer]:
                shard = info.unit.shard
                other = first.setdefault(shard, info)
                if (info.key_digest, info.num_images) != (other.key_digest, other.num_images):
                    what = f"{OTHER_KEYS} {other}: {info.num_images} images with keys {info.key_digest}"
                    self._about(info, f"{what}, expected {other.num_images} with {other.key_digest}")
                for name in needed:
                    if lacking := [view for view in info.unit.views if view not in held_views[name].get(shard, ())]:
                        what = "the view layer" if name == VIEWS else f"layer {name}"
                        self._about(info, f"{what} lacks {len(lacking)} of its views, from {lacking[0]} on", "views")
        held = {unit.shard for unit in self.named[VIEWS] if unit.first_view == 0}
        for shard in views.keys() - held:
            unit = next(unit for unit in self.named[VIEWS] if unit.shard == shard)
            path = layout.commit_file(VIEWS, unit)
            what = "no unit of this shard begins at view 0 and holds the keys"
            self.findings.append(Finding("views", path, what, unit, VIEWS))

    def groups(self) -> None:
        """Check the metadata of groups, which have no digest in any record."""
        needed = {METADATA: layout.root_group(self.manifest)}
        needed |= {f"{LAYERS}/{name}/{METADATA}": layout.layer_group(layer) for name, layer in self.layers.items()}
        plain = {f"{name}/{METADATA}": layout.plain_group() for name in (*self.view_layers, LAYERS)}
        if any(self.units.values()):  # a new cache may lack them until its first unit
            needed |= plain
        wanted = needed | {path: data for path, data in plain.items() if path in self.sizes}
        self.known |= wanted.keys()
        found = _each(self.store, list(wanted), lambda path: self._group(path, wanted[path]))
        self.findings += [finding for finding in found if finding]

    def _group(self, path: str, wanted: bytes) -> Finding | None:
        try:
            stored = self.store.read(path, layout.MANIFEST_LIMIT_BYTES)
        except FileNotFoundError:
            return Finding("group", path, "the file is missing")
        except (ValueError, OSError) as error:
            return Finding("group", path, f"it cannot be read: {error}")
        return None if stored == wanted else Finding("group", path, "it is not what tinymim writes there")

    def strays(self) -> None:
        # Uncommitted files of a living writer are its work in progress.
        alive = tuple(f"{LEASES}/{name}.g" for name in self.leases)
        for path in sorted(self.sizes.keys() - self.known):
            if not is_of_cache(path):
                self.foreign.append(path)
            elif not path.startswith(alive) and not self._in_progress(path):
                unit = UNIT_FILE.fullmatch(path)
                uncommitted = unit is not None and path.endswith(".zip")
                what = "the file of a unit that was never committed" if uncommitted else "it belongs to nothing"
                self.findings.append(Finding("stray", path, what, layer=layer_of(path)))

    def _in_progress(self, path: str) -> bool:
        if found := UNIT_FILE.fullmatch(path):
            return f"shards/{found['stem']}" in self.leases
        layer = layer_of(path)
        return layer is not None and constants_lease(layer) in self.leases


def uncommitted_unit(finding: Finding, manifest: Manifest) -> UnitId | None:
    """The unit of a stray zip; None for other strays."""
    shards = {layout.shard_stem(name): name for name in manifest.shards}
    if finding.layer is None or not finding.path.endswith(".zip"):
        return None
    return layout.parse_commit_file(finding.layer, f"{finding.path.removesuffix('.zip')}.json", shards)


def lease_of(finding: Finding, manifest: Manifest) -> str | None:
    """The lease under which a finding is repaired: its shard's, its layer's constants'; None: the manifest's."""
    if finding.unit is not None:
        return shard_lease(finding.unit.shard)
    if found := UNIT_FILE.fullmatch(finding.path):
        return f"shards/{found['stem']}"
    if finding.layer is not None and finding.path in constants_places(finding.layer):
        return constants_lease(finding.layer)
    return None


# ---- reading


def _each(store: Store, items: list[Item], look: Callable[[Item], Found]) -> list[Found]:
    """`look` at every item, in parallel if the store is distant."""
    if not store.distant or len(items) < 2:
        return [look(item) for item in items]
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(look, items))


def _pieces(blocks: Iterable[tuple[str | int, Block]]) -> Iterator[list[tuple[str | int, Block]]]:
    """Adjacent blocks of at most PIECE_BYTES together, or one larger block."""
    piece: list[tuple[str | int, Block]] = []
    held = 0
    for name, block in blocks:
        if piece and held + block.size_bytes > PIECE_BYTES:
            yield piece
            piece, held = [], 0
        piece.append((name, block))
        held += block.size_bytes
    if piece:
        yield piece


def _plain(error: CacheCorrupt | CacheMismatch, path: str) -> str:
    """The message of an error about the file `path`, without its path."""
    _, found, rest = error.what.rpartition(f"{path} ")
    got = f": {error.got}" if isinstance(error, CacheMismatch) else ""
    return f"it {rest}{got}" if found else f"{error.what}{got}"


def _block_problem(info: UnitInfo, name: str | int, block: Block, data: bytes) -> str | None:
    what = f"view {info.unit.first_view + name}" if isinstance(name, int) else f"its {name}"
    if len(data) != block.size_bytes:
        return f"{what} is cut short: {len(data)} bytes, expected {block.size_bytes}"
    return None if crc32c(data) == block.crc32c else f"{what} does not have its committed checksum"


def _view_problem(data: bytes, number: int, info: UnitInfo, arrays: Mapping[str, ArrayType]) -> str | None:
    view = number + info.unit.first_view
    raw = info.num_images * sum(math.prod(shape) * dtype.itemsize for dtype, shape in arrays.values())
    if raw > len(data) * ZSTD_MOST:
        return f"view {view}: {raw} bytes of records cannot come out of {len(data)}"
    rows: dict[str, Array] = {
        name: np.empty((info.num_images, *shape), dtype) for name, (dtype, shape) in arrays.items()
    }
    try:
        decode_view(memoryview(data), number, info.num_images, rows, arrays)
    except (ValueError, RuntimeError) as error:  # RuntimeError comes from the decompressor
        return f"view {view} cannot be decoded: {error}"
    return None


def _key_problem(data: bytes, info: UnitInfo) -> tuple[str | None, list[str] | None]:
    if 8 * info.num_images > len(data) * ZSTD_MOST:
        return f"the keys of {info.num_images} images cannot come out of {len(data)} bytes", None
    try:
        arrays, keys = decode_keys(memoryview(data), info.num_images)
    except (ValueError, RuntimeError) as error:
        return f"the keys cannot be decoded: {error}", None
    if key_digest(arrays) != info.key_digest:
        return "the keys do not have the committed key_digest", None
    if len(set(keys)) != info.num_images:
        return f"{len(set(keys))} different keys of {info.num_images} images", None
    return None, keys


def _expected_head(info: UnitInfo, arrays: Mapping[str, ArrayType], keys: list[str] | None) -> bytes:
    out = io.BytesIO()
    held = key_arrays(keys or []) if holds_keys(info.layer, info.unit) else None
    UnitFileWriter(out, info.num_images, info.unit.num_views, arrays, held)
    return out.getvalue()[: info.parts.head.size_bytes]
