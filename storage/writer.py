"""Writing a cache: one writer process, one unit at a time, each visible by one atomic commit (I7).

Nothing that depends on time or chance is written, so a cache that was interrupted and resumed is
byte-identical to one that was not. For now a cache takes one writer process at a time; an exclusive lock
enforces it.
"""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt

from tinymim.configs.errors import InternalError, SourceError, UserError
from tinymim.storage import layout
from tinymim.storage.atomic import canonical_json, explained_write_errors, fsync_folder
from tinymim.storage.commit import UnitInfo, key_digest, read_commits, sync_and_digest, write_commit
from tinymim.storage.constants import constants_digest, write_constants
from tinymim.storage.layout import UnitId
from tinymim.storage.manifest import Manifest, check_same, grown


class CacheWriter:
    """The one writer of a cache; a context manager. Make it with `CacheWriter.open`.

    Attributes:
        path: the cache's folder.
        manifest: as stored now, grown to hold what was wanted.
        environment_differences: lines worth a warning: versions that differ from those the cache began with.
    """

    def __init__(self, path: Path, manifest: Manifest, lock_fd: int) -> None:
        """Take over the cache at `path`, on whose lock file `lock_fd` holds the lock; use `open`."""
        self.path = path
        self._lock_fd: int | None = lock_fd
        self.manifest, self.environment_differences = _settle_manifest(path, manifest)
        layout.ensure_folders(path)
        self._constants = constants_digest(path, self.manifest)
        self._committed = {info.unit: info for info in read_commits(path, self.manifest, self._constants)}
        _remove_leftovers(path, set(self._committed))

    @classmethod
    def open(cls, path: str | Path, manifest: Manifest) -> "CacheWriter":
        """Create the cache, or open it to write what is missing.

        The manifest is on disk before the first unit. If there is one already it must pass
        `manifest.check_same`, and grows by new shards and a larger `num_views`. Leftovers of a dead writer
        are removed.

        Raises:
            UserError: the folder holds something else, cannot be written, or has a writer.
            SourceError: two shards cannot be told apart on disk.
            CacheMismatch: the cache was made by something else.
            CacheCorrupt: its manifest or a commit record is damaged.
        """
        root = Path(path).absolute()
        with explained_write_errors(root):
            if layout.is_foreign(root):
                raise UserError(f"{root} is not empty and not a tinymim cache", hint="name a new folder")
            layout.check_stems(shard.name for shard in manifest.source)
            root.mkdir(parents=True, exist_ok=True)
            fsync_folder(root.parent)
            lock_fd = _lock(root)
            try:
                return cls(root, manifest, lock_fd)
            except BaseException:
                os.close(lock_fd)
                raise

    def close(self) -> None:
        """Let another process write; harmless twice."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def committed(self) -> set[UnitId]:
        """The units that are on disk, whole."""
        return set(self._committed)

    def write_constants(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write what the codec needs once per cache, before the first unit. On return it is durable.

        Every unit written from now on names these constants in its commit record.

        Args:
            arrays: by name, at least one axis each, of any bool, integer or float dtype in little-endian order.

        Raises:
            UserError: the disk is full or fails.
            InternalError: arrays that cannot be stored, or the cache has units already: a bug of the caller.
        """
        if self._committed or self._lock_fd is None:
            raise InternalError("constants are written to an open cache without units")
        if problems := [problem for name, values in arrays.items() for problem in _problems(name, values)]:
            raise InternalError(f"constants do not fit: {'; '.join(problems)}")
        with explained_write_errors(self.path):
            self._constants = write_constants(self.path, self.manifest.spec_id, arrays)

    def write_unit(
        self,
        unit: UnitId,
        keys: Sequence[str],
        arrays: Mapping[str, npt.NDArray[Any]],
        statistics: Mapping[str, Any],
    ) -> UnitInfo:
        """Write one unit and commit it. On return it is durable.

        Args:
            unit: its shard is in the manifest; its views are not yet in the cache.
            keys: the shard's readable sample keys, one per image, in tar order.
            arrays: by name, first axis R = len(keys) * unit.num_views records; the views of one image are
                contiguous (`UnitId.row`). `box` int32 [R, 4] (top, left, height, width, in pixels of the
                image), `flip` uint8 [R] and `digest` uint64 [R] are required; the codec's arrays are of
                any bool, integer or float dtype in little-endian order.
            statistics: JSON values for the commit record.

        Raises:
            SourceError: a key appears twice or is not Unicode.
            UserError: the disk is full or fails; the unit is not there and the others are intact.
            InternalError: arguments that do not fit together: a bug of the caller.
        """
        self._check_unit(unit)
        _check_keys(unit, keys)
        _check_arrays(unit, len(keys) * unit.num_views, arrays)
        try:
            statistics = json.loads(canonical_json(dict(statistics)))
        except (TypeError, ValueError) as error:
            raise InternalError(f"statistics of unit {unit} are not JSON: {error}") from error
        key_arrays = layout.encode_keys(keys)
        folder = layout.unit_folder(self.path, unit)
        with explained_write_errors(self.path):
            try:
                layout.ensure_folders(self.path, unit)
                if folder.exists():
                    shutil.rmtree(folder)
                layout.write_group(folder)
                for name, values in (key_arrays | dict(arrays)).items():
                    layout.write_array(folder, name, values)
                info = UnitInfo(
                    unit=unit,
                    spec_id=self.manifest.spec_id,
                    content_hash=self.manifest.shards[unit.shard].content_hash,
                    num_images=len(keys),
                    num_records=len(keys) * unit.num_views,
                    key_digest=key_digest(key_arrays),
                    files=sync_and_digest(folder, self.path),
                    statistics=statistics,
                    constants=self._constants,
                )
                write_commit(self.path, info)
            except OSError:
                layout.commit_file(self.path, unit).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
                raise
        self._committed[unit] = info
        return info

    def _check_unit(self, unit: UnitId) -> None:
        if self._lock_fd is None:
            raise InternalError("the cache writer is closed")
        if unit.shard not in self.manifest.shards:
            raise InternalError(f"unit {unit}: its shard is not in the manifest")
        if not 0 <= unit.first_view < unit.first_view + unit.num_views <= self.manifest.num_views:
            raise InternalError(f"unit {unit}: views outside 0..{self.manifest.num_views - 1}")
        for other in self._committed:
            if other.shard == unit.shard and set(other.views) & set(unit.views):
                raise InternalError(f"unit {unit} shares views with the committed unit {other}")


def _lock(root: Path) -> int:
    """An open descriptor that holds the cache's lock until it is closed or the process ends."""
    fd = os.open(layout.lock_file(root), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise UserError(
            f"another process is writing to the cache {root}",
            hint="wait for it or stop it; a cache takes one writer process at a time",
        ) from None
    return fd


def _settle_manifest(root: Path, wanted: Manifest) -> tuple[Manifest, list[str]]:
    """The manifest now on disk: the wanted one in a new cache, else the stored one, grown."""
    if not (root / layout.METADATA).exists():
        layout.write_manifest(root, wanted)
        return wanted, []
    stored = layout.read_manifest(root)
    warnings = check_same(stored, wanted)
    result = grown(stored, wanted)
    layout.check_stems(shard.name for shard in result.source)
    if result != stored:
        layout.write_manifest(root, result)
    return result, warnings


def _remove_leftovers(root: Path, committed: set[UnitId]) -> None:
    for path in list(layout.leftovers(root, committed)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_keys(unit: UnitId, keys: Sequence[str]) -> None:
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    if repeated:
        raise SourceError(
            f"{len(repeated)} sample key(s) appear more than once in shard {unit.shard}",
            got=repr(repeated[0]),
            hint="rename the samples: a record is found by its key",
        )
    for key in keys:
        try:
            key.encode()
        except UnicodeEncodeError:
            raise SourceError(f"a sample key in shard {unit.shard} is not Unicode", got=repr(key)) from None


def _check_arrays(unit: UnitId, num_records: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    problems = [f"{name} is missing" for name in layout.BASE_ARRAYS if name not in arrays]
    for name, values in arrays.items():
        got = f"{name}: {values.dtype} {list(values.shape)}"
        if found := _problems(name, values):
            problems += found
        elif len(values) != num_records:
            problems.append(f"{got}, expected {num_records} records")
        elif name in layout.BASE_ARRAYS:
            dtype, inner = layout.BASE_ARRAYS[name]
            if values.dtype != dtype or values.shape[1:] != inner:
                problems.append(f"{got}, expected {dtype} {[num_records, *inner]}")
    if problems:
        raise InternalError(f"arrays of unit {unit} do not fit: {'; '.join(problems)}")


def _problems(name: str, values: npt.NDArray[Any]) -> list[str]:
    """What keeps an array from being stored under a name."""
    if name in layout.KEY_ARRAYS or not (name.isidentifier() and name.isascii()) or name.startswith("__"):
        return [f"{name!r} is no name for an array"]
    got = f"{name}: {values.dtype} {list(values.shape)}"
    if values.dtype.kind not in "biuf" or values.dtype != values.dtype.newbyteorder("<"):
        return [f"{got}, expected plain little-endian numbers"]
    return [] if values.ndim else [f"{got}, expected at least one axis"]
