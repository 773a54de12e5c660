"""The whole of a cache looked at: everything that is wrong with it, where a reader stops at the first thing.

`survey` looks at what makes the cache one (groups, constants, commit records, what belongs to nothing),
`check_unit` at every byte of one unit.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy.typing as npt

from tinymim.configs.errors import CacheCorrupt, CacheMismatch
from tinymim.storage import layout
from tinymim.storage.commit import StoredFile, UnitInfo, array_names, files_of, key_digest, parse_commit, read_files
from tinymim.storage.constants import read_record
from tinymim.storage.layout import COMMITS, CONSTANTS, CONSTANTS_RECORD, LEASES, METADATA, UNITS, UnitId
from tinymim.storage.leases import Holder, Leases, shard_lease
from tinymim.storage.manifest import Manifest
from tinymim.storage.store import REQUESTS, Store

# group: metadata that says the same for every cache of the manifest; commit: a commit record; unit: a file of a unit;
# stray: in a folder of the cache, but no part of it.
Kind = Literal["group", "constants", "commit", "unit", "stray"]
SHARED_VIEWS = "it shares views with unit"
NOTHING = "it belongs to nothing"
Item = TypeVar("Item")
Found = TypeVar("Found")
LOCK = ".lock"  # of a writer of version 0.1; empty and without a meaning now


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `path` is relative to the cache; a folder ends in a slash."""

    kind: Kind
    path: str
    what: str
    unit: UnitId | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass(frozen=True)
class Survey:
    """What a cache holds, and what is wrong with it so far.

    Attributes:
        manifest: of the cache.
        units: those whose commit records are whole, in source order, then by view.
        findings: everything wrong outside the units' files.
        foreign: files beside the cache's own, which nobody should have put there, but which harm nothing.
        writers: leases of writers that are not known to be dead, and whose they are as far as it can be read.
    """

    manifest: Manifest
    units: list[UnitInfo]
    findings: list[Finding]
    foreign: list[str]
    writers: dict[str, Holder | None]


def is_own(path: str) -> bool:
    """Whether a path, relative to the cache, lies where only tinymim writes."""
    return path.partition("/")[0] in (UNITS, COMMITS, CONSTANTS, LEASES, METADATA, CONSTANTS_RECORD, LOCK)


def survey(store: Store, manifest: Manifest | None = None) -> Survey:
    """Look at everything but the units' files.

    Args:
        store: of the cache.
        manifest: to check against; None: the stored one.

    Raises:
        UserError: there is no cache.
        StoreError: the object store refuses or fails.
        CacheMismatch: its format version is unknown.
        CacheCorrupt: the manifest is damaged, so that nothing can be said of the rest.
    """
    manifest = manifest or layout.read_manifest(store)
    # Before and after the listing, so that what a writer is at then is under a lease that was seen.
    leases = Leases(store).living()
    paths = {entry.path for entry in store.list()}
    leases |= Leases(store).living()
    look = _Look(store, manifest, paths, leases)
    look.commits()
    look.constants()
    look.groups()
    look.strays()
    return Survey(manifest, look.units, look.findings, look.foreign, leases)


def check_unit(store: Store, info: UnitInfo) -> list[Finding]:
    """Read and decode every file of a unit. Raises StoreError where the object store refuses or fails."""
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
            files = {path: data for path in files_of(part, name) if isinstance(data := read[path], bytes)}
            if len(files) < len(files_of(part, name)):
                continue
            num_records = None if name in layout.KEY_ARRAYS else info.num_records
            try:
                values = layout.decode_array(name, files, num_records)
            except Exception as error:  # whatever numcodecs raises on bytes it cannot decode
                findings.append(Finding("unit", f"{folder}/{name}", f"it cannot be decoded: {error}", info.unit))
                continue
            if name in layout.KEY_ARRAYS:
                keys[name] = values
    if len(keys) == len(layout.KEY_ARRAYS) and (problem := _problem_of_keys(keys, info)):
        findings.append(Finding("unit", f"{folder}/key_bytes", problem, info.unit))
    return findings


def unit_bytes(info: UnitInfo) -> int:
    """Bytes of a unit's files, its commit record apart."""
    return sum(file.size_bytes for file in info.files.values())


# ---- the parts of a survey


@dataclass
class _Look:
    store: Store
    manifest: Manifest
    paths: set[str]  # of all files there
    leases: Mapping[str, Holder | None]
    units: list[UnitInfo] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    known: set[str] = field(default_factory=set)  # files that belong to something, whole or not
    folders: set[str] = field(default_factory=set)  # whose files do

    def commits(self) -> None:
        shards = {layout.shard_stem(name): name for name in self.manifest.shards}
        named = {path: layout.parse_commit_file(path, shards) for path in self._below(COMMITS)}
        paths = sorted(path for path, unit in named.items() if unit is not None)
        read = _each(self.store, paths, lambda path: self._commit(path, named[path]))
        found = [what for what in read if isinstance(what, UnitInfo)]
        self.findings += [what for what in read if isinstance(what, Finding)]
        self.known |= set(paths)
        self.folders |= {layout.unit_folder(unit) for unit in named.values() if unit is not None}
        order = {name: place for place, name in enumerate(self.manifest.shards)}
        self.units = sorted(found, key=lambda info: (order[info.unit.shard], info.unit.first_view))
        for before, after in itertools.pairwise(self.units):
            if before.unit.shard == after.unit.shard and after.unit.first_view in before.unit.views:
                what = f"{SHARED_VIEWS} {before.unit}"
                self.findings.append(Finding("commit", layout.commit_file(after.unit), what, after.unit))

    def _commit(self, path: str, unit: UnitId | None) -> UnitInfo | Finding | None:
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
            files = {path: data for path in files_of(stored, name) if isinstance(data := read[path], bytes)}
            if len(files) == len(files_of(stored, name)):
                try:
                    layout.decode_array(name, files, None)
                except Exception as error:  # as in `check_unit`
                    self._constants_finding(f"{CONSTANTS}/{name}", f"it cannot be decoded: {error}")

    def _constants_finding(self, path: str, what: str) -> None:
        self.findings.append(Finding("constants", path, what))

    def groups(self) -> None:
        """Metadata of groups that are not part of a unit or of the constants, whose files have digests."""
        plain = layout.plain_group()
        needed = {METADATA: layout.root_group(self.manifest)}
        if self.units:
            needed |= {f"{UNITS}/{METADATA}": plain}
            needed |= {f"{layout.shard_folder(info.unit.shard)}/{METADATA}": plain for info in self.units}
        # A writer makes the groups of its shard before the first unit of it.
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
            # Inside the folder of a whole unit only the files of its record belong to it.
            folder = layout.unit_folder(info.unit)
            self.folders.discard(folder)
            self.known |= {f"{folder}/{path}" for path in info.files}
        busy = {layout.shard_folder(name) for name in self.manifest.shards if shard_lease(name) in self.leases}
        busy |= {CONSTANTS} if CONSTANTS in self.leases else set()
        self.folders |= busy
        alive = tuple(f"{LEASES}/{name}.g" for name in self.leases)
        whole = {layout.unit_folder(info.unit) for info in self.units}
        strays: defaultdict[str, int] = defaultdict(int)
        for path in sorted(self.paths - self.known):
            if not is_own(path):
                self.foreign.append(path)
            elif not path.startswith(alive) and not any(above in self.folders for above in _above(path)):
                strays[self._leftover(path, whole)] += 1
        self.findings += [
            Finding(
                "stray", path, f"{count} file(s) of a unit that was never committed" if path[-1] == "/" else NOTHING
            )
            for path, count in strays.items()
        ]

    def _leftover(self, path: str, whole: set[str]) -> str:
        """The folder of an uncommitted unit, with a slash, that `path` lies in; else `path` itself."""
        parts = path.split("/")
        folder = "/".join(parts[:3])
        return f"{folder}/" if parts[0] == UNITS and len(parts) > 3 and folder not in whole else path

    def _below(self, folder: str) -> list[str]:
        return [path for path in self.paths if path.startswith(f"{folder}/")]


def _above(path: str) -> Iterator[str]:
    """The folders that a path lies in, the nearest last."""
    return itertools.accumulate(path.split("/")[:-1], lambda above, name: f"{above}/{name}")


# ---- reading


def _each(store: Store, items: list[Item], look: Callable[[Item], Found]) -> list[Found]:
    """`look` at every item; side by side where the store is distant."""
    if not store.distant or len(items) < 2:
        return [look(item) for item in items]
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(look, items))


def _read_each(store: Store, folder: str, files: Mapping[str, StoredFile]) -> dict[str, bytes | str]:
    """Every file's bytes if they are those recorded, else what is wrong; by path relative to `folder`."""

    def read(path: str) -> bytes | str:
        try:
            return read_files(store, folder, {path: files[path]}, verify=True)[path]
        except ValueError as error:
            return "a file is missing" if "missing" in str(error) else str(error).removeprefix(f"{path} ")

    return dict(zip(files, _each(store, list(files), read), strict=True))


def _parts(store: Store, info: UnitInfo, names: list[str]) -> Iterator[Mapping[str, StoredFile]]:
    """The files of a unit, as many at a time as are to be held: all from a distant store, else those of one array."""
    if store.distant:
        yield info.files
        return
    yield {path: file for path, file in info.files.items() if path == METADATA}
    yield from (files_of(info.files, name) for name in names)


def _plain(error: CacheCorrupt | CacheMismatch, path: str) -> str:
    """What an error says of the file `path`, without naming it again."""
    return error.what.rpartition(f"{path} is ")[2] if isinstance(error, CacheCorrupt) else f"{error.what}: {error.got}"


def _problem_of_keys(arrays: Mapping[str, npt.NDArray[Any]], info: UnitInfo) -> str | None:
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


# What tinymim gives its files, in a cache of any state; the manifest and the commit records apart.
OTHER_FILES = re.compile(
    rf"({UNITS}(/[A-Za-z0-9_-]+(/v[0-9]+-[0-9]+)?)?/zarr\.json"
    rf"|{UNITS}/[A-Za-z0-9_-]+/v[0-9]+-[0-9]+/{_ARRAY}"
    rf"|{CONSTANTS}/(zarr\.json|{_ARRAY})|{re.escape(CONSTANTS_RECORD)}"
    rf"|{LEASES}/.+\.g[0-9]+\.json|{re.escape(LOCK)})"
)


def is_of_cache(path: str) -> bool:
    return path == METADATA or bool(COMMIT_FILE.fullmatch(path) or OTHER_FILES.fullmatch(path))
