"""Source shards: webdataset tars of `key.jpg` (+ optional `key.cls`), read by offset, never extracted."""

import hashlib
import os
import stat
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from tinymim.configs.errors import SourceError, UserError, first_line, printable
from tinymim.configs.sections.source import SourceConfig
from tinymim.pipeline.index import INDEX_NAME, Index, IndexRow, not_as_indexed, parse_index
from tinymim.pipeline.members import (
    MAPPED_SHARDS,
    MEMBERS_NAME,
    Block,
    Entry,
    Members,
    MembersWriter,
    load_members,
    read_table,
)
from tinymim.pipeline.remote import list_objects, read_bytes
from tinymim.pipeline.spool import Spool, SpooledTar
from tinymim.pipeline.tar import UNLABELLED, not_a_tar, scan_tar

_TAR_ENDINGS: Final = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.zstd")
_OTHER_FILE: Final = f"shard {{}} is not the file that {INDEX_NAME} describes"
_REPORT_EVERY_S: Final = 10.0
SCANNED_SHARDS: Final = 1024  # whose scanned members a process keeps: 52 MiB for shards of 1,000 images


@dataclass(frozen=True, slots=True)  # every loader worker holds all of them
class Shard:
    """One tar and its identity."""

    name: str
    place: Path | SpooledTar
    size_bytes: int
    num_samples: int
    content_hash: str  # "sha256:..." of the whole file
    block: Block | None = None  # its part of the folder's members file

    @property
    def path(self) -> Path:
        """The file of a shard on local disk; there is none for one in an object store."""
        assert isinstance(self.place, Path), self.place
        return self.place

    def members(self) -> Members:
        """The images of the tar, from the members file of its folder, else by a scan of its headers (cached).

        Raises:
            SourceError: the tar is damaged, its keys are ambiguous, or it holds another number of images than stated.
        """
        members = _members(self.place, self.size_bytes, self.block)
        if len(members.keys) != self.num_samples:
            raise _other_count(self, len(members.keys))
        return members

    def read(self, sample: int) -> bytes:
        """The image bytes of one sample.

        Raises:
            SourceError: as `members`.
            UserError: the tar vanished, cannot be read or is shorter than when it was opened. It is no SourceError,
                because those count as unreadable images, and a shard that goes away must not cost a cache its images.
            StoreError: the object store refuses or fails, or the object was replaced.
        """
        members = self.members()
        offset, size = int(members.offsets[sample]), int(members.sizes[sample])
        try:
            with open(self.place, "rb", buffering=0) if isinstance(self.place, Path) else self.place.open() as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise UserError(
                f"shard {self.name} cannot be read any more",
                got=first_line(error),
                hint="restore it and run the same command again",
            ) from error
        if len(data) != size:
            raise UserError(
                f"shard {self.name} is truncated at sample '{members.keys[sample]}'",
                got=f"{len(data)} bytes",
                expected=f"{size} bytes",
                hint="restore it and run the same command again",
            )
        return data

    def verify(self) -> None:
        """Compare the bytes of the tar with its content hash, once for each state of the file.

        An index can be older than its shard and still name the right size. A spooled tar was compared when it came.

        Raises:
            SourceError: the tar is not the one that the index describes, or cannot be read.
        """
        if isinstance(self.place, SpooledTar):
            return
        try:
            status = self.place.stat()
            found = _hashed(self.place, status.st_size, status.st_mtime_ns, status.st_ino)
        except OSError as error:
            raise not_a_tar(self.name, error) from error
        if found != self.content_hash:
            raise not_as_indexed(_OTHER_FILE.format(self.name), found, self.content_hash)


@dataclass(frozen=True)
class ShardSet:
    """An ordered set of shards and, where an index says so, the names of the classes."""

    shards: tuple[Shard, ...]
    classes: tuple[str, ...] = field(default=())

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def counts(self) -> list[int]:
        return [shard.num_samples for shard in self.shards]

    def by_name(self) -> dict[str, Shard]:
        return {shard.name: shard for shard in self.shards}


# ---------------------------------------------------------------- opening


def open_shards(config: SourceConfig) -> ShardSet:
    """Find the shards of a source, in name order, with sizes, counts and content hashes.

    Counts and hashes come from `index.json` where its sizes agree with the files; a tar it does not know is
    scanned and hashed here, which from an object store means to stream all of it. The members of a local folder's
    shards are written beside them at the first opening, where the folder can be written.

    Raises:
        SourceError: no such folder, no tar in it, a damaged tar, a tar without an image, or a folder that does not
            hold what its index describes.
        StoreError: the object store refuses or fails.
        RecipeError: a shard is larger than the spool.
    """
    place = config.shards
    _members.cache_clear()  # a tar may have been replaced by one of the same size
    _scan.cache_clear()
    _hashed.cache_clear()
    if isinstance(place, str):
        index = parse_index(f"{place}/{INDEX_NAME}", read_bytes(place, INDEX_NAME))
        shards = _open_remote(config, place, index)
    else:
        require_shards(config)
        path = place / INDEX_NAME
        index = parse_index(str(path), path.read_bytes() if path.is_file() else None)
        shards = _open_local(config, place, index)
    if not shards:
        raise _no_shards(config)
    _refuse_lost_and_repeated(config, shards, index)
    for shard in shards:
        if shard.block is not None and shard.block.num_samples != shard.num_samples:
            raise _other_count(shard, shard.block.num_samples)
        if not shard.num_samples:
            raise SourceError(
                f"shard {shard.name} holds no image",
                got=f"{shard.size_bytes} bytes",
                expected="at least one image",
                hint="remove it from the folder, or exclude it by source.pattern",
            )
    return ShardSet(shards, tuple(index.classes))


def require_shards(config: SourceConfig) -> None:
    """Raises SourceError where the source is a folder that does not exist or holds no shard; a store is not asked."""
    place = config.shards
    if isinstance(place, str):
        return
    if not place.is_dir():
        raise SourceError("source folder does not exist", got=place, hint="make one with `tinymim make-shards`")
    if not _matching(config, place):
        raise _no_shards(config)


def _matching(config: SourceConfig, folder: Path) -> list[Path]:
    try:
        return sorted(folder.glob(config.pattern))
    except (ValueError, NotImplementedError, OSError) as error:
        raise SourceError(
            "source.pattern is no pattern for names in a folder", got=f"'{config.pattern}': {first_line(error)}"
        ) from error


def _no_shards(config: SourceConfig) -> SourceError:
    others = [] if isinstance(config.shards, str) else _other_tars(config.shards, [])
    hint = "pack images into tars by `tinymim make-shards FOLDER DST`"
    if others:
        upper = [name for name in others if name.lower().endswith(".tar")]
        hint = f"{_listed(others)} do not match: " + (
            f"set source.pattern='*{upper[0][-4:]}'" if upper else "decompress them; images gain nothing"
        )
    return SourceError(f"no shards match '{config.pattern}'", got=config.shards, expected="at least one tar", hint=hint)


def _other_tars(folder: Path, taken: Sequence[Path]) -> list[str]:
    """The tars of a folder, compressed ones included, that are not among `taken`."""
    names = {path.name for path in taken}
    return sorted(e.name for e in os.scandir(folder) if e.name.lower().endswith(_TAR_ENDINGS) and e.name not in names)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _open_remote(config: SourceConfig, url: str, index: Index) -> tuple[Shard, ...]:
    known = index.rows()
    spool = Spool(config.spool.folder, int(config.spool.gib * 2**30))
    listed = list_objects(url, config.pattern, list(known))
    tars = [SpooledTar(each, spool, known[each.name].content_hash if each.name in known else "") for each in listed]
    for tar in tars:
        tar.refuse_small_budget()
    unknown = [tar for tar in tars if tar.name not in known]
    if unknown:
        gib = sum(tar.source.size_bytes for tar in unknown) / 2**30
        _say(
            f"{url}: {INDEX_NAME} does not know {len(unknown)} of {len(tars)} shards; reading all of their "
            f"{gib:.2f} GiB once for counts and hashes (upload the {INDEX_NAME} of `tinymim make-shards` to avoid it)"
        )
    return tuple(_open_spooled(tar, known.get(tar.name)) for tar in tars)


def _open_spooled(tar: SpooledTar, row: IndexRow | None) -> Shard:
    size = tar.source.size_bytes
    if row is None:
        members, content_hash = tar.members()
        # what is downloaded again must be the same
        return Shard(tar.name, replace(tar, content_hash=content_hash), size, len(members.keys), content_hash)
    _refuse_other_size(row, size)
    return Shard(tar.name, tar, size, row.num_samples, row.content_hash)


def _open_local(config: SourceConfig, folder: Path, index: Index) -> tuple[Shard, ...]:
    paths = _matching(config, folder)
    if config.pattern == SourceConfig.model_fields["pattern"].default and (others := _other_tars(folder, paths)):
        _say(
            f"{folder}: {len(others)} files are passed over, since '{config.pattern}' does not match: {_listed(others)}"
        )
    known, tables = index.rows(), {parent: read_table(parent) for parent in {path.parent for path in paths}}
    found = [_local_shard(path, known.get(path.name), tables[path.parent]) for path in paths]
    for parent, table in tables.items():
        own = [(shard, mtime_ns) for shard, mtime_ns in found if shard.path.parent == parent]
        missing = [shard for shard, _ in own if shard.block is None]
        if os.access(parent, os.W_OK) and any(map(_is_sound, missing)):
            _write_members(parent, own, table)
            tables[parent] = read_table(parent)
    opened = [_local_shard(s.path, known.get(s.name), tables[s.path.parent], s.content_hash) for s, _ in found]
    return tuple(shard for shard, _ in opened)


def _local_shard(
    path: Path, row: IndexRow | None, table: dict[str, Entry], content_hash: str | None = None
) -> tuple[Shard, int]:
    """A shard and its modification time."""
    try:
        status = path.stat()
    except OSError as error:
        raise SourceError(
            f"shard {path.name} cannot be opened",
            got="a link to nothing" if path.is_symlink() else first_line(error),
            hint="restore it, or remove it from the folder",
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"shard {path.name} is no file", got=stat.filemode(status.st_mode), expected="a tar")
    size, entry = status.st_size, table.get(path.name)
    if row is not None:
        _refuse_other_size(row, size)
        content_hash = row.content_hash
    content_hash = content_hash or _hashed(path, size, status.st_mtime_ns, status.st_ino)
    block = entry.block if entry and entry.describes(size, content_hash, status.st_mtime_ns) else None
    count = row.num_samples if row else len(_members(path, size, block).keys)
    return Shard(path.name, path, size, count, content_hash, block), status.st_mtime_ns


def _is_sound(shard: Shard) -> bool:
    try:
        shard.members()
    except SourceError:
        return False
    return True


def _write_members(folder: Path, found: Sequence[tuple[Shard, int]], table: dict[str, Entry]) -> None:
    """Write the members file of a folder for these shards; entries of its other shards are kept."""
    names = {shard.name for shard, _ in found}
    started = said = time.monotonic()
    try:
        with MembersWriter(folder) as writer:
            for number, (shard, mtime_ns) in enumerate(found):
                if _is_sound(shard):  # the error of another is raised where its images are needed
                    writer.add(shard.name, shard.size_bytes, shard.content_hash, mtime_ns, shard.members())
                if time.monotonic() - said > _REPORT_EVERY_S:
                    said = time.monotonic()
                    _say(f"{folder}: reading the headers of all shards, once: {number + 1} of {len(found)}")
            for name, entry in table.items():
                stays = name not in names and (folder / name).exists()
                if stays and (members := load_members(folder, entry.block)) is not None:
                    writer.add(name, entry.size_bytes, entry.content_hash, entry.mtime_ns, members)
    except OSError as error:
        _say(
            f"{folder}: {MEMBERS_NAME} cannot be written ({first_line(error)}); every process reads the headers itself"
        )
        return
    if said > started:
        _say(f"{folder}: wrote {MEMBERS_NAME}, which spares later runs this")


def _other_count(shard: Shard, count: int) -> SourceError:
    what = f"shard {shard.name} holds another number of images than its {INDEX_NAME} states"
    return not_as_indexed(what, f"{count} images", f"{shard.num_samples} images")


def _refuse_other_size(row: IndexRow, size_bytes: int) -> None:
    if row.size_bytes != size_bytes:
        raise not_as_indexed(_OTHER_FILE.format(row.name), f"{size_bytes} bytes", f"{row.size_bytes} bytes")


def _refuse_lost_and_repeated(config: SourceConfig, shards: Sequence[Shard], index: Index) -> None:
    names = Counter(shard.name for shard in shards)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        raise SourceError(
            "two shards of the source have one name", got=f"'{repeated[0]}' matches '{config.pattern}' in two folders"
        )
    lost = [row.name for row in index.shards if row.name not in names and Path(row.name).match(config.pattern)]
    if lost:
        what = f"{len(lost)} of the {len(index.shards)} shards of {INDEX_NAME} are missing"
        raise not_as_indexed(what, _listed(lost), None)


def _say(message: str) -> None:
    print(printable(message), file=sys.stderr, flush=True)


# ---------------------------------------------------------------- bytes and members


def hash_file(path: Path) -> str:
    """sha256 of a whole file, as "sha256:hex"."""
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1024)
def _hashed(path: Path, size_bytes: int, mtime_ns: int, inode: int) -> str:
    return hash_file(path)


@lru_cache(maxsize=MAPPED_SHARDS)
def _members(path: Path | SpooledTar, size_bytes: int, block: Block | None) -> Members:
    members = load_members(path.parent, block) if block is not None and isinstance(path, Path) else None
    return _scan(path, size_bytes) if members is None else members


@lru_cache(maxsize=SCANNED_SHARDS)
def _scan(path: Path | SpooledTar, size_bytes: int) -> Members:
    """Read the headers of one tar. The size is part of the cache key so that a replaced file is scanned again."""
    if isinstance(path, SpooledTar):
        return path.members()[0]
    try:
        with open(path, "rb") as file:
            return scan_tar(file, path.name, size_bytes)
    except OSError as error:
        raise not_a_tar(path.name, error) from error


def labels_of(shards: Sequence[Shard]) -> npt.NDArray[np.int64]:
    """Class numbers of all samples in shard order [samples]. Raises SourceError naming an unlabelled sample."""
    labels = []
    for shard in shards:
        members = shard.members()
        missing = np.flatnonzero(members.labels == UNLABELLED)
        if missing.size:
            raise SourceError(
                f"sample '{members.keys[int(missing[0])]}' of shard {shard.name} has no label",
                got=f"{missing.size} of {len(members.keys)} samples without .cls",
                expected="labelled shards",
                hint="`tinymim make-shards SRC DST --labels FORM` reads labels of class folders, .json and .txt",
            )
        labels.append(members.labels.copy())
    return np.concatenate(labels)
