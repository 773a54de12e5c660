"""Full checks of a cache. They list all damage, while a reader stops at the first.

`survey` checks groups, constants and commit records, and finds stray files. `check_unit` checks every byte of a unit.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy.typing as npt

from tinymim.configs.errors import CacheCorrupt, CacheMismatch
from tinymim.storage import layout
from tinymim.storage.commit import (
    StoredFile,
    UnitInfo,
    array_names,
    files_of,
    in_source_order,
    key_digest,
    pairs_sharing_views,
    parse_commit,
    read_files,
)
from tinymim.storage.constants import read_record
from tinymim.storage.layout import COMMITS, CONSTANTS, CONSTANTS_RECORD, LEASES, METADATA, UNITS, UnitId
from tinymim.storage.leases import Holder, Leases, shard_lease
from tinymim.storage.manifest import Manifest
from tinymim.storage.store import REQUESTS, Store

# group: metadata that the manifest determines; commit: a commit record; unit: a file of a unit; stray: a file in a
# folder of the cache that belongs to nothing.
Kind = Literal["group", "constants", "commit", "unit", "stray"]
SHARED_VIEWS = "it shares views with unit"
Item = TypeVar("Item")
Found = TypeVar("Found")
LOCK = ".lock"  # left by version 0.1; empty and unused
# Only tinymim writes at these places, the first parts of paths.
_OWN = (UNITS, COMMITS, CONSTANTS, LEASES, METADATA, CONSTANTS_RECORD, LOCK)


@dataclass(frozen=True)
class Finding:
    """One problem. `path` is relative to the cache; a folder ends in a slash."""

    kind: Kind
    path: str
    what: str
    unit: UnitId | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass(frozen=True)
class Survey:
    """The content of a cache and its problems, except those in the units' files.

    Attributes:
        manifest: the manifest that was checked against.
        units: the units with intact commit records, in source order, then by view.
        findings: all problems outside the units' files.
        foreign: files that are not the cache's; they do no harm.
        writers: leases of writers that are not known to be dead, and their owners where they can be read.
    """

    manifest: Manifest
    units: list[UnitInfo]
    findings: list[Finding]
    foreign: list[str]
    writers: dict[str, Holder | None]


def survey(store: Store, manifest: Manifest | None = None) -> Survey:
    """Check everything except the units' files.

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
    paths = {entry.path for entry in store.list()}
    leases |= Leases(store).living()
    check = _Survey(store, manifest, paths, leases)
    check.commits()
    check.constants()
    check.groups()
    check.strays()
    return Survey(manifest, check.units, check.findings, check.foreign, leases)


def check_unit(store: Store, info: UnitInfo) -> list[Finding]:
    """Read and decode every file of a unit. Raises StoreError if the object store refuses or fails."""
    folder = layout.unit_folder(info.unit)
    names = array_names(info.files)
    findings: list[Finding] = []
    keys: dict[str, npt.NDArray[Any]] = {}
    missing = {*layout.KEY_ARRAYS, *layout.BASE_ARRAYS} - set(names)
    findings += [
        Finding("unit", f"{folder}/{name}", "the unit lacks this array", info.unit) for name in sorted(missing)
    ]
    for part in _parts(store, info, names):
        read = _read_each(store, folder, part)
        for path, data in read.items():
            if isinstance(data, str):
                findings.append(Finding("group" if path == METADATA else "unit", f"{folder}/{path}", data, info.unit))
        for name in array_names(part):
            values = _decoded(name, part, read, None if name in layout.KEY_ARRAYS else info.num_records)
            if isinstance(values, str):
                findings.append(Finding("unit", f"{folder}/{name}", values, info.unit))
            elif values is not None and name in layout.KEY_ARRAYS:
                keys[name] = values
    if len(keys) == len(layout.KEY_ARRAYS) and (problem := _key_problem(keys, info)):
        findings.append(Finding("unit", f"{folder}/key_bytes", problem, info.unit))
    return findings


def unit_bytes(info: UnitInfo) -> int:
    """Size in bytes of a unit's files, without its commit record."""
    return sum(file.size_bytes for file in info.files.values())


# ---- the parts of a survey


@dataclass
class _Survey:
    store: Store
    manifest: Manifest
    paths: set[str]  # all files
    leases: Mapping[str, Holder | None]
    units: list[UnitInfo] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    known: set[str] = field(default_factory=set)  # files that belong to something, intact or not
    folders: set[str] = field(default_factory=set)  # folders whose files all belong to something

    def commits(self) -> None:
        shards = {layout.shard_stem(name): name for name in self.manifest.shards}
        named = {path: unit for path in self.paths if (unit := layout.parse_commit_file(path, shards))}
        read = _each(self.store, sorted(named), lambda path: self._commit(path, named[path]))
        found = [what for what in read if isinstance(what, UnitInfo)]
        self.findings += [what for what in read if isinstance(what, Finding)]
        self.known |= named.keys()
        self.folders |= {layout.unit_folder(unit) for unit in named.values()}
        self.units = in_source_order(found, self.manifest)
        for before, after in pairs_sharing_views(self.units):
            self.findings.append(Finding("commit", layout.commit_file(after), f"{SHARED_VIEWS} {before}", after))

    def _commit(self, path: str, unit: UnitId) -> UnitInfo | Finding | None:
        try:
            data = self.store.read(path, layout.COMMIT_LIMIT_BYTES)
            return parse_commit(self.store.place, path, data, self.manifest)
        except FileNotFoundError:
            return None  # removed since it was listed
        except (CacheCorrupt, CacheMismatch) as error:
            return Finding("commit", path, _plain(error, path), unit)
        except (ValueError, OSError) as error:
            return Finding("commit", path, f"it cannot be read: {error}", unit)

    def constants(self) -> None:
        named = {info.constants for info in self.units}
        try:
            record, digest = read_record(self.store, self.manifest)
        except (CacheCorrupt, CacheMismatch) as error:
            self.known.add(CONSTANTS_RECORD)
            self.folders.add(CONSTANTS)
            self._constants_finding(CONSTANTS_RECORD, _plain(error, CONSTANTS_RECORD))
            return
        if record is None:
            if named - {None}:
                self.folders.add(CONSTANTS)
                self._constants_finding(CONSTANTS_RECORD, "a file is missing, and units were made with constants")
            return
        stored = record.stored_files()
        self.known |= {CONSTANTS_RECORD, *(f"{CONSTANTS}/{path}" for path in stored)}
        if len(named) == 1 and named != {digest}:
            self._constants_finding(CONSTANTS_RECORD, f"all units were made with other constants: {named.pop()}")
        else:
            for info in self.units:
                if info.constants != digest:
                    what = f"it was made with other constants than those of the cache: {info.constants}"
                    self.findings.append(Finding("commit", layout.commit_file(info.unit), what, info.unit))
        read = _read_each(self.store, CONSTANTS, stored)
        for path, data in read.items():
            if isinstance(data, str):
                kind: Kind = "group" if path == METADATA else "constants"
                self.findings.append(Finding(kind, f"{CONSTANTS}/{path}", data))
        for name in array_names(stored):
            if isinstance(problem := _decoded(name, stored, read, None), str):
                self._constants_finding(f"{CONSTANTS}/{name}", problem)

    def _constants_finding(self, path: str, what: str) -> None:
        self.findings.append(Finding("constants", path, what))

    def groups(self) -> None:
        """Check the metadata of groups outside units and constants, which have no digest in any record."""
        plain = layout.plain_group()
        needed = {METADATA: layout.root_group(self.manifest)}
        if self.units:
            needed |= {f"{UNITS}/{METADATA}": plain}
            needed |= {f"{layout.shard_folder(info.unit.shard)}/{METADATA}": plain for info in self.units}
        # A writer creates the groups of its shard before its first unit: allowed now, needed later.
        possible = {f"{layout.shard_folder(name)}/{METADATA}": plain for name in self.manifest.shards}
        possible |= {f"{UNITS}/{METADATA}": plain, **needed}
        wanted = [path for path in possible if path in needed or path in self.paths]
        self.known |= {*wanted, LOCK}
        self.findings += [found for found in _each(self.store, wanted, lambda p: self._group(p, possible[p])) if found]

    def _group(self, path: str, wanted: bytes) -> Finding | None:
        try:
            stored = self.store.read(path, layout.MANIFEST_LIMIT_BYTES)
        except FileNotFoundError:
            return Finding("group", path, "a file is missing")
        except (ValueError, OSError) as error:
            return Finding("group", path, f"it cannot be read: {error}")
        return None if stored == wanted else Finding("group", path, "it is not what tinymim writes there")

    def strays(self) -> None:
        for info in self.units:
            # In the folder of an intact unit, only the files of its record belong to it.
            folder = layout.unit_folder(info.unit)
            self.folders.discard(folder)
            self.known |= {f"{folder}/{path}" for path in info.files}
        # Uncommitted files of a living writer are its work in progress.
        self.folders |= {layout.shard_folder(name) for name in self.manifest.shards if shard_lease(name) in self.leases}
        self.folders |= {CONSTANTS} & self.leases.keys()
        alive = tuple(f"{LEASES}/{name}.g" for name in self.leases)
        intact = {layout.unit_folder(info.unit) for info in self.units}
        strays: Counter[str] = Counter()
        for path in sorted(self.paths - self.known):
            above = itertools.accumulate(path.split("/")[:-1], lambda folder, name: f"{folder}/{name}")
            if path.partition("/")[0] not in _OWN:
                self.foreign.append(path)
            elif not path.startswith(alive) and self.folders.isdisjoint(above):
                # All files of an uncommitted unit make one finding.
                folder = "/".join(path.split("/")[:3])
                uncommitted = path.startswith(f"{UNITS}/") and folder != path and folder not in intact
                strays[f"{folder}/" if uncommitted else path] += 1
        for path, count in strays.items():
            what = f"{count} file(s) of a unit that was never committed" if path[-1] == "/" else "it belongs to nothing"
            self.findings.append(Finding("stray", path, what))


# ---- reading


def _each(store: Store, items: list[Item], look: Callable[[Item], Found]) -> list[Found]:
    """`look` at every item, in parallel if the store is distant."""
    if not store.distant or len(items) < 2:
        return [look(item) for item in items]
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(look, items))


def _read_each(store: Store, folder: str, files: Mapping[str, StoredFile]) -> dict[str, bytes | str]:
    """By path relative to `folder`: a file's bytes if they match its record, else the problem."""

    def read(path: str) -> bytes | str:
        try:
            return read_files(store, folder, {path: files[path]}, verify=True)[path]
        except ValueError as error:
            return "a file is missing" if "missing" in str(error) else str(error).removeprefix(f"{path} ")

    return dict(zip(files, _each(store, list(files), read), strict=True))


def _parts(store: Store, info: UnitInfo, names: list[str]) -> Iterator[Mapping[str, StoredFile]]:
    """The files of a unit in parts that are held in memory: one array, or everything if the store is distant."""
    if store.distant:
        yield info.files
        return
    yield {path: file for path, file in info.files.items() if path == METADATA}
    yield from (files_of(info.files, name) for name in names)


def _plain(error: CacheCorrupt | CacheMismatch, path: str) -> str:
    """The message of an error about the file `path`, without its path."""
    return error.what.rpartition(f"{path} is ")[2] if isinstance(error, CacheCorrupt) else f"{error.what}: {error.got}"


def _decoded(
    name: str, stored: Mapping[str, StoredFile], read: Mapping[str, bytes | str], num_records: int | None
) -> npt.NDArray[Any] | str | None:
    """An array, or why it cannot be decoded; None if one of its files could not be read."""
    files = {path: data for path in files_of(stored, name) if isinstance(data := read[path], bytes)}
    if len(files) < len(files_of(stored, name)):
        return None
    try:
        return layout.decode_array(name, files, num_records)
    except Exception as error:  # numcodecs raises many kinds for bytes that it cannot decode
        return f"it cannot be decoded: {error}"


def _key_problem(arrays: Mapping[str, npt.NDArray[Any]], info: UnitInfo) -> str | None:
    if key_digest(arrays) != info.key_digest:
        return "the keys do not have the committed key_digest"
    try:
        keys = layout.decode_keys(arrays)
    except ValueError as error:
        return f"the keys cannot be decoded: {error}"
    if not len(keys) == len(set(keys)) == info.num_images:
        return f"{len(keys)} keys, {len(set(keys))} different, of {info.num_images} images"
    return None


_ARRAY = r"[A-Za-z][A-Za-z0-9_]*/(zarr\.json|c(/0)+)"
COMMIT_FILE = re.compile(rf"{COMMITS}/[A-Za-z0-9_-]+\.v[0-9]+-[0-9]+\.json")
# Paths of all other files in a cache of any state, except the manifest.
OTHER_FILES = re.compile(
    rf"({UNITS}(/[A-Za-z0-9_-]+(/v[0-9]+-[0-9]+)?)?/zarr\.json"
    rf"|{UNITS}/[A-Za-z0-9_-]+/v[0-9]+-[0-9]+/{_ARRAY}"
    rf"|{CONSTANTS}/(zarr\.json|{_ARRAY})|{re.escape(CONSTANTS_RECORD)}"
    rf"|{LEASES}/.+\.g[0-9]+\.json|{re.escape(LOCK)})"
)


def is_of_cache(path: str) -> bool:
    """Whether tinymim gives its files such a path, relative to the cache."""
    return path == METADATA or bool(COMMIT_FILE.fullmatch(path) or OTHER_FILES.fullmatch(path))
