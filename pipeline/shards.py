"""Source shards: webdataset tars of `key.jpg` (+ optional `key.cls`), read by offset, never extracted."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinymim.configs.errors import SourceError
from tinymim.configs.sections import SourceConfig
from tinymim.pipeline.remote import list_objects, read_text
from tinymim.pipeline.spool import Spool, SpooledTar
from tinymim.pipeline.tar import UNLABELLED as UNLABELLED
from tinymim.pipeline.tar import Members, not_a_tar, scan_tar
from tinymim.pipeline.tar import split_name as split_name

INDEX_NAME = "index.json"
INDEX_VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One tar and its identity."""

    name: str
    place: Path | SpooledTar
    size_bytes: int
    num_samples: int
    content_hash: str  # "sha256:..." of the whole file

    @property
    def path(self) -> Path:
        """The file of a shard on local disk; there is none for one in an object store."""
        assert isinstance(self.place, Path), self.place
        return self.place

    def members(self) -> Members:
        """Scan the tar's headers (cached). Raises SourceError for a damaged tar or duplicate keys."""
        return _scan(self.place, self.size_bytes)

    def read(self, sample: int) -> bytes:
        """The image bytes of one sample.

        Raises:
            SourceError: the file is shorter than when it was scanned.
            StoreError: the object store refuses or fails, or the object was replaced.
            UserError: the object cannot be spooled.
        """
        members = self.members()
        offset, size = int(members.offsets[sample]), int(members.sizes[sample])
        with open(self.place, "rb", buffering=0) if isinstance(self.place, Path) else self.place.open() as file:
            data = os.pread(file.fileno(), size, offset)
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
    scanned and hashed here, which from an object store means to stream all of it.

    Raises:
        SourceError: no such folder, no tar in it, a damaged tar, or a file whose size differs from the index.
        StoreError: the object store refuses or fails.
        RecipeError: a shard is larger than the spool.
    """
    place = config.shards
    _scan.cache_clear()  # a tar may have been replaced by one of the same size
    paths: Sequence[Path | SpooledTar]
    if isinstance(place, str):
        index = _parse_index(f"{place}/{INDEX_NAME}", read_text(place, INDEX_NAME))
        known = {row["name"]: row for row in index.get("shards", [])}
        spool = Spool(config.spool.folder, int(config.spool.gib * 2**30))
        listed = list_objects(place, config.pattern, list(known))
        tars = [SpooledTar(found, spool, known.get(found.name, {}).get("content_hash", "")) for found in listed]
        for tar in tars:
            tar.refuse_small_budget()
        paths = tars
    else:
        require_shards(config)
        paths = sorted(place.glob(config.pattern))
        index = read_index(place)
        known = {row["name"]: row for row in index.get("shards", [])}
    if not paths:
        raise _no_shards(config)
    unknown = [path for path in paths if isinstance(path, SpooledTar) and path.name not in known]
    if unknown:
        gib = sum(tar.source.size_bytes for tar in unknown) / 2**30
        print(
            f"{place}: {INDEX_NAME} does not know {len(unknown)} of {len(paths)} shards; reading all of their "
            f"{gib:.2f} GiB once for counts and hashes (upload the {INDEX_NAME} of `tinymim make-shards` to avoid it)",
            file=sys.stderr,
            flush=True,
        )
    shards = tuple(_open_shard(path, known.get(path.name)) for path in paths)
    return ShardSet(shards, tuple(index.get("classes", ())))


def require_shards(config: SourceConfig) -> None:
    """Raises SourceError where the source is a folder that does not exist or holds no shard; a store is not asked."""
    place = config.shards
    if isinstance(place, str):
        return
    if not place.is_dir():
        raise SourceError("source folder does not exist", got=place, hint="make one with `tinymim make-shards`")
    if next(place.glob(config.pattern), None) is None:
        raise _no_shards(config)


def _no_shards(config: SourceConfig) -> SourceError:
    return SourceError(f"no shards match '{config.pattern}'", got=config.shards, expected="at least one tar")


def _open_shard(path: Path | SpooledTar, row: dict[str, Any] | None) -> Shard:
    size = path.source.size_bytes if isinstance(path, SpooledTar) else path.stat().st_size
    if row is None:
        if isinstance(path, SpooledTar):
            members, content_hash = path.members()
            path = replace(path, content_hash=content_hash)  # what is downloaded again must be the same
        else:
            members, content_hash = _scan(path, size), hash_file(path)
        return Shard(path.name, path, size, len(members.keys), content_hash)
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
    return _parse_index(str(path), path.read_text() if path.is_file() else None)


def _parse_index(path: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        index: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise SourceError(f"{path} is not JSON", got=str(error), hint="remove it to scan the folder anew") from error
    if index.get("version") != INDEX_VERSION:
        raise SourceError(f"{path} has an unknown version", got=index.get("version"), expected=INDEX_VERSION)
    return index


def hash_file(path: Path) -> str:
    """sha256 of a whole file, as "sha256:hex"."""
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=4096)
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
