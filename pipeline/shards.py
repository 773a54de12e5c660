"""Source shards: webdataset tars of `key.jpg` (+ optional `key.cls`), read by offset, never extracted."""

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinymim.configs.errors import SourceError
from tinymim.configs.schema import SourceConfig
from tinymim.pipeline.decode import IMAGE_EXTENSIONS

INDEX_NAME = "index.json"
INDEX_VERSION = 1
UNLABELLED = -1


@dataclass(frozen=True)
class Members:
    """The images of one tar in tar order: keys, byte offsets and sizes, class numbers (-1: none)."""

    keys: tuple[str, ...]
    offsets: npt.NDArray[np.int64]  # [images]
    sizes: npt.NDArray[np.int64]  # [images], bytes
    labels: npt.NDArray[np.int64]  # [images]


@dataclass(frozen=True)
class Shard:
    """One tar and its identity."""

    name: str
    path: Path
    size_bytes: int
    num_samples: int
    content_hash: str  # "sha256:..." of the whole file

    def members(self) -> Members:
        """Scan the tar's headers (cached). Raises SourceError for a damaged tar or duplicate keys."""
        return _scan(self.path, self.size_bytes)

    def read(self, sample: int) -> bytes:
        """The image bytes of one sample.

        Raises:
            SourceError: the file is shorter than when it was scanned.
        """
        members = self.members()
        size = int(members.sizes[sample])
        with open(self.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, int(members.offsets[sample]))
        if len(data) != size:
            raise SourceError(
                f"shard {self.name} is truncated at sample '{members.keys[sample]}'",
                got=f"{len(data)} bytes",
                expected=f"{size} bytes",
            )
        return data


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


def open_shards(config: SourceConfig) -> ShardSet:
    """Find the shards of a source, in name order, with sizes, counts and content hashes.

    Counts and hashes come from `index.json` where its sizes agree with the files; a tar it does not know is
    scanned and hashed here.

    Raises:
        SourceError: no such folder, no tar in it, a damaged tar, or a file whose size differs from the index.
    """
    folder = config.shards
    if not folder.is_dir():
        raise SourceError("source folder does not exist", got=folder, hint="make one with `tinymim make-shards`")
    paths = sorted(folder.glob(config.pattern))
    if not paths:
        raise SourceError(f"no shards match '{config.pattern}'", got=folder, expected="at least one tar")
    _scan.cache_clear()  # a tar may have been replaced by one of the same size
    index = read_index(folder)
    known = {row["name"]: row for row in index.get("shards", [])}
    shards = tuple(_open_shard(path, known.get(path.name)) for path in paths)
    return ShardSet(shards, tuple(index.get("classes", ())))


def _open_shard(path: Path, row: dict[str, Any] | None) -> Shard:
    size = path.stat().st_size
    if row is None:
        return Shard(path.name, path, size, len(_scan(path, size).keys), hash_file(path))
    if row["size_bytes"] != size:
        raise SourceError(
            f"shard {path.name} is not the file that {INDEX_NAME} describes",
            got=f"{size} bytes",
            expected=f"{row['size_bytes']} bytes",
            hint=f"restore the shard, or remove {INDEX_NAME} to have the folder scanned anew",
        )
    return Shard(path.name, path, size, row["num_samples"], row["content_hash"])


def read_index(folder: Path) -> dict[str, Any]:
    """The parsed `index.json` of a folder, or an empty mapping where there is none."""
    path = folder / INDEX_NAME
    if not path.is_file():
        return {}
    try:
        index: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise SourceError(f"{path} is not JSON", got=str(error), hint="remove it to scan the folder anew") from error
    if index.get("version") != INDEX_VERSION:
        raise SourceError(f"{path} has an unknown version", got=index.get("version"), expected=INDEX_VERSION)
    return index


def hash_file(path: Path) -> str:
    """sha256 of a whole file, as "sha256:hex"."""
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def split_name(name: str) -> tuple[str, str]:
    """webdataset's rule: the key is everything before the first dot of the last path part."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


@lru_cache(maxsize=4096)
def _scan(path: Path, size_bytes: int) -> Members:
    """Read the headers of one tar. The size is part of the cache key so that a replaced file is scanned again."""
    offsets: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                end = member.offset_data + member.size
                key, extension = split_name(_utf8(member.name, path))
                if extension in IMAGE_EXTENSIONS:
                    if key in offsets:
                        raise SourceError(f"duplicate key '{key}' in shard {path.name}")
                    offsets[key] = (member.offset_data, member.size)
                elif extension == "cls":
                    labels[key] = _label(tar, member, path)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SourceError(
            f"shard {path.name} is not a readable tar", got=error, hint="make it again with `tinymim make-shards`"
        ) from error
    _refuse_truncated(path, size_bytes, offsets, end)
    places = np.array(list(offsets.values()), dtype=np.int64).reshape(-1, 2)
    return Members(
        keys=tuple(offsets),
        offsets=places[:, 0].copy(),
        sizes=places[:, 1].copy(),
        labels=np.array([labels.get(key, UNLABELLED) for key in offsets], dtype=np.int64),
    )


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    file = tar.extractfile(member)
    text = file.read(32).decode("ascii", "replace").strip() if file else ""
    if not text.isdigit():
        raise SourceError(f"'{member.name}' in shard {path.name} is no class number", got=repr(text), expected="digits")
    return int(text)


def _utf8(name: str, path: Path) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:  # tarfile's surrogates stand for bytes that are no UTF-8
        raise SourceError(
            f"a name in shard {path.name} is not UTF-8", got=ascii(name), hint="rename the image and pack it again"
        ) from error
    return name


def _refuse_truncated(path: Path, size_bytes: int, offsets: dict[str, tuple[int, int]], end: int) -> None:
    # tarfile ends silently at a cut that falls on a header or inside the last member's data; both show here.
    for key, (offset, size) in offsets.items():
        if offset + size > size_bytes:
            raise SourceError(
                f"shard {path.name} is truncated at sample '{key}'",
                got=f"{size_bytes} bytes",
                expected=f"at least {offset + size} bytes",
            )
    padded = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if size_bytes < padded + tarfile.BLOCKSIZE:
        raise SourceError(
            f"shard {path.name} is truncated: it has no end-of-archive block",
            got=f"{size_bytes} bytes",
            expected=f"at least {padded + tarfile.BLOCKSIZE} bytes",
        )


def labels_of(shards: Sequence[Shard]) -> npt.NDArray[np.int64]:
    """Class numbers of all samples in shard order [samples]. Raises SourceError naming an unlabelled sample."""
    for shard in shards:
        members = shard.members()
        missing = np.flatnonzero(members.labels == UNLABELLED)
        if missing.size:
            raise SourceError(
                f"sample '{members.keys[int(missing[0])]}' of shard {shard.name} has no label",
                got=f"{missing.size} of {len(members.keys)} samples without .cls",
                expected="labelled shards",
            )
    return np.concatenate([shard.members().labels for shard in shards])
