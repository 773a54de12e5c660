"""A cache's files below a prefix of an object store."""

import mmap
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, ClassVar, Literal

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError

from tinymim.configs.errors import StoreError
from tinymim.storage.entries import REQUESTS, Entry, holds, merged, refuse_large
from tinymim.storage.objects import ABSENT, connect, store_error

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PUT_BYTES = 5 * 2**30  # most that S3 takes in one request
WRITE_TIMEOUT_S = 300.0  # one request with the largest file
TIMEOUT_PAUSES_S = (1.0, 5.0)  # before an unanswered PUT is sent again


class RemoteStore:
    """A prefix of an object store. A PUT is atomic and durable; creation needs conditional PUTs (If-None-Match)."""

    distant: ClassVar[bool] = True

    def __init__(self, url: str) -> None:
        self.place: str = url
        _ = self._objects  # refuses a URL that names no store

    @property
    def _objects(self) -> "ObjectStore":
        return connect(self.place, WRITE_TIMEOUT_S)

    def read(self, path: str, limit: int) -> bytes:
        with self._explained(path):
            answer = obstore.get(self._objects, path)
            refuse_large(path, answer.meta["size"], limit)
            return bytes(answer.bytes())

    def read_all(self, limits: Mapping[str, int]) -> dict[str, bytes]:
        with ThreadPoolExecutor(REQUESTS) as pool:
            return dict(zip(limits, pool.map(self.read, limits.keys(), limits.values()), strict=True))

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        runs = merged(ranges)
        with self._explained(path):
            try:
                parts = self._ranges(path, runs)
            except BaseError:
                size = obstore.head(self._objects, path)["size"]
                if all(end <= size for _, end in runs):
                    raise
                # Stores refuse a range that begins after the end of the object, and obstore one that it cannot fill.
                parts = self._ranges(path, [(min(begin, size), min(end, size)) for begin, end in runs])
        number, last = -1, None
        for begin, end in ranges:
            number += begin != last
            start, last = runs[number][0], end
            yield parts[number][begin - start : end - start]

    def _ranges(self, path: str, runs: Sequence[tuple[int, int]]) -> list[memoryview]:
        starts, ends = [begin for begin, end in runs if begin < end], [end for begin, end in runs if begin < end]
        if len(starts) == 1:
            found = iter([obstore.get_range(self._objects, path, start=starts[0], end=ends[0])])
        else:
            # Without `coalesce=0` obstore reads what lies between two ranges, up to 1 MiB, and drops it.
            found = iter(
                obstore.get_ranges(self._objects, path, starts=starts, ends=ends, coalesce=0) if starts else []
            )
        return [memoryview(next(found)) if begin < end else memoryview(b"") for begin, end in runs]

    @contextmanager
    def draft(self, path: str) -> Iterator["_RemoteDraft"]:
        # A conditional PUT takes one request with the whole object; a file keeps it out of memory until then.
        with tempfile.TemporaryFile() as file:
            yield _RemoteDraft(self, path, file)

    def create_all(self, files: Mapping[str, bytes]) -> list[str]:
        with ThreadPoolExecutor(REQUESTS) as pool:
            created = list(pool.map(self.create, files.keys(), files.values()))
        return [path for path, done in zip(files, created, strict=True) if not done]

    def create(self, path: str, data: bytes | mmap.mmap) -> bool:
        """Write a file that does not exist yet; False if another writer created it first with other content.

        Raises:
            StoreError: the data is more than a store takes in one request, the only kind that can be conditional.
        """
        if len(data) > PUT_BYTES:
            raise StoreError(
                f"{self.place}/{path} is too large for one request",
                got=f"{len(data):,} bytes",
                expected=f"at most {PUT_BYTES:,}",
                hint="smaller units: lower views_per_unit in the recipe, or make shards of fewer images",
            )
        with self._explained(path):
            try:
                self._put(path, data, "create")
            except (AlreadyExistsError, PreconditionError):
                # A repeated PUT of our own, whose first answer was lost, ends here too: compare the content.
                return holds(self.read, path, data)
        return True

    def write(self, path: str, data: bytes) -> None:
        with self._explained(path):
            self._put(path, data, "overwrite")

    def _put(self, path: str, data: bytes | mmap.mmap, mode: Literal["create", "overwrite"]) -> None:
        _repeat_unanswered(lambda: obstore.put(self._objects, path, data, mode=mode))

    def _delete(self, paths: str | Sequence[str]) -> None:
        _repeat_unanswered(lambda: obstore.delete(self._objects, paths))

    def exists(self, path: str) -> bool:
        try:
            with self._explained(path):
                obstore.head(self._objects, path)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[Entry]:
        with self._explained(prefix):
            for page in obstore.list(self._objects, prefix or None):
                for meta in page:
                    yield Entry(meta["path"], meta["size"], meta["last_modified"])

    def folders(self, prefix: str = "") -> set[str]:
        with self._explained(prefix):
            below = obstore.list_with_delimiter(self._objects, prefix or None)["common_prefixes"]
        return {path.rstrip("/").rpartition("/")[2] for path in below}

    def remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            try:
                with self._explained(path):
                    self._delete(path)
            except FileNotFoundError:
                continue

    def remove_tree(self, prefix: str) -> None:
        paths = [entry.path for entry in self.list(prefix)]
        if paths:
            with self._explained(prefix):
                self._delete(paths)

    def remove_dead_writes(self, folders: Iterable[str], of_the_living: bool = False) -> None:
        """Nothing to do: an object exists whole or not at all."""

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        try:
            yield
        except ABSENT as error:
            raise FileNotFoundError(f"{self.place}/{path}") from error
        except (BaseError, OSError, NotImplementedError) as error:
            raise store_error(f"{self.place}/{path}".rstrip("/"), error) from error


@dataclass
class _RemoteDraft:
    store: RemoteStore
    path: str
    file: BinaryIO

    def create(self) -> bool:
        self.file.flush()
        return self.store.create(self.path, mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ))


def _repeat_unanswered(request: Callable[[], object]) -> None:
    """Send a PUT or DELETE, and send it again after a timeout.

    obstore repeats temporary refusals, but no PUT or DELETE that timed out, since not all are idempotent. Ours are.
    """
    for pause_s in TIMEOUT_PAUSES_S:
        try:
            request()
            return
        except GenericError as error:
            if "Timeout" not in str(error):
                raise
            time.sleep(pause_s)
    request()
