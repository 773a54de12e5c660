"""Tars in an object store: listing, and range reads with read-ahead.

A store is opened once per process, never pickled: a loader worker gets the URL and opens its own. Reads go through
one `BlockReader` per process, which keeps fixed blocks of the objects in at most `BUDGET_BYTES` of memory.
"""

import os
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError, PreconditionError
from obstore.store import HTTPStore

from tinymim.configs.errors import StoreError, first_line
from tinymim.pipeline.walk import Walk
from tinymim.storage.objects import ABSENT, connect, store_error

if TYPE_CHECKING:
    from obstore import ObjectMeta

BLOCK_BYTES = 2 * 2**20
AHEAD_BLOCKS = 4  # fetched beyond the read that a pass over a shard is at
BUDGET_BYTES = 256 * 2**20  # per process; what is being fetched counts
REQUESTS = 8  # at once, per process
RECENT_READS = 256  # shards touched within so many reads are what a shuffled order is mixing
_HINT = "check source.shards and source.pattern"
SHORT_TRIES = 3  # of one range whose answer is whole but too short, which obstore takes for success


@dataclass(frozen=True)
class RemoteObject:
    """One object of a source: where it is and which version of it was listed."""

    url: str  # of the source, without a slash at its end
    path: str  # within the source
    size_bytes: int
    version: str  # the entity tag, or the time of the last change where a store has none

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    def __str__(self) -> str:
        return f"{self.url}/{self.path}"


def list_objects(url: str, pattern: str, known: list[str]) -> list[RemoteObject]:
    """The objects under `url` whose path matches `pattern`, in name order.

    Args:
        url: the source.
        pattern: as for a folder's `glob`, without `**`.
        known: names to look at one by one where the store is a plain web server, which cannot list.

    Raises:
        StoreError: the store refuses or fails.
    """
    store = connect(url)
    parts = len(PurePosixPath(pattern).parts)
    try:
        if isinstance(store, HTTPStore):
            found = [obstore.head(store, name) for name in known]
        elif parts == 1:
            found = list(obstore.list_with_delimiter(store)["objects"])
        else:
            found = list(obstore.list(store).collect())
    except (BaseError, OSError) as error:
        raise store_error(url, error, _HINT) from error
    paths = {meta["path"]: meta for meta in found}
    chosen = [path for path in paths if len(PurePosixPath(path).parts) == parts and PurePosixPath(path).match(pattern)]
    return [
        RemoteObject(url, path, paths[path]["size"], _version(paths[path]))
        for path in sorted(chosen, key=PurePosixPath)
    ]


def read_text(url: str, name: str) -> str | None:
    """A small object as text, or None where there is none. Raises StoreError where the store refuses or fails."""
    try:
        return bytes(obstore.get(connect(url), name).bytes()).decode("utf-8", "replace")
    except ABSENT:
        return None
    except (BaseError, OSError) as error:
        raise store_error(f"{url}/{name}", error) from error


def _version(meta: "ObjectMeta") -> str:
    tag = (meta["e_tag"] or "").removeprefix("W/").strip('"')  # some stores quote it in one answer and not in another
    return tag or meta["last_modified"].isoformat()


class BlockReader:
    """Reads ranges of objects through a bounded set of blocks, fetched ahead of a sequential pass.

    A pass that ascends gets the next blocks fetched in the background, twice as many at each new block up to
    `ahead_blocks`. A pass with regular gaps (one loader worker of several) gets them up to where its next gap is
    expected. Reads that jump back and forth (a shuffled order) keep the blocks of all the objects in use where those
    fit into `budget_bytes`, and else fetch just their own bytes.

    Threads may share a reader; two reads of one block make one request.

    Args:
        block_bytes: size and alignment of blocks.
        ahead_blocks: how far to fetch ahead; 0: not at all.
        budget_bytes: bound on the blocks held and being fetched; 0: every read is one request for its bytes.
    """

    def __init__(
        self, block_bytes: int = BLOCK_BYTES, ahead_blocks: int = AHEAD_BLOCKS, budget_bytes: int = BUDGET_BYTES
    ) -> None:
        self.block_bytes, self.ahead_blocks, self.budget_bytes = block_bytes, ahead_blocks, budget_bytes
        self.held_bytes = 0
        self._lock = threading.Lock()
        self._blocks: OrderedDict[tuple[RemoteObject, int], Future[memoryview]] = OrderedDict()  # oldest use first
        self._walks: OrderedDict[RemoteObject, Walk] = OrderedDict()  # oldest use first
        self._reads = 0
        self._like: int | None = None
        self._pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="tinymim-store")

    def read(self, source: RemoteObject, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of an object, fewer where it ends.

        Raises:
            StoreError: the store refuses or fails, or the object is not the one that was listed.
        """
        end = min(offset + size, source.size_bytes)
        if end <= offset:
            return b""
        with self._lock:
            futures = self._plan(source, offset, end)
        if not futures:
            return bytes(_fetch(source, offset, end))
        first = offset // self.block_bytes * self.block_bytes
        parts = [future.result() for future in futures]
        if len(parts) == 1:
            return bytes(parts[0][offset - first : end - first])
        return b"".join(parts)[offset - first : end - first]

    def _plan(self, source: RemoteObject, offset: int, end: int) -> list[Future[memoryview]]:
        """The blocks to wait for, with others under way behind them; none: fetch the bytes alone."""
        walk = self._walks.setdefault(source, Walk(self.block_bytes, self._like))
        self._walks.move_to_end(source)
        self._reads += 1
        walk.last_read = self._reads
        walk.step(offset, end)
        self._like = walk.like  # shards are read in one manner
        if len(self._walks) > RECENT_READS:
            self._walks.popitem(last=False)
        wanted = range(offset // self.block_bytes, (end - 1) // self.block_bytes + 1)
        resident = all((source, index) in self._blocks for index in wanted)
        keeps = 2 * len(wanted) * self.block_bytes <= self.budget_bytes and self._keeps(walk)
        if not (resident or keeps):
            return []
        absent = sum(self._length(source, index) for index in wanted if (source, index) not in self._blocks)
        if absent and not self._make_room(absent, wanted, source):
            return []  # the budget is full of blocks on their way
        futures = [self._block(source, index) for index in wanted]
        last = (source.size_bytes - 1) // self.block_bytes
        for index in walk.ahead(wanted[-1], last, self.ahead_blocks) if keeps else ():
            if (source, index) not in self._blocks and not self._make_room(self._length(source, index), wanted, source):
                break
            self._block(source, index)
        return futures

    def _keeps(self, walk: Walk) -> bool:
        """Whether whole blocks are worth fetching: always in a long run, else if all shards in use fit."""
        if not walk.scattered:
            return True
        if not walk.settled:
            return False
        in_use = (s.size_bytes for s, w in self._walks.items() if self._reads - w.last_read < RECENT_READS)
        return sum(in_use) <= self.budget_bytes

    def _length(self, source: RemoteObject, index: int) -> int:
        return min(self.block_bytes, source.size_bytes - index * self.block_bytes)

    def _block(self, source: RemoteObject, index: int) -> Future[memoryview]:
        """A block, held or now under way; its caller has made room for it."""
        future = self._blocks.get((source, index))
        if future is not None and future.done() and future.exception() is not None:
            self._drop(source, index)  # a fetch ahead that failed is tried again by the one who needs it
            future = None
        if future is None:
            length = self._length(source, index)
            start = index * self.block_bytes
            future = self._blocks[source, index] = self._pool.submit(_fetch, source, start, start + length)
            self.held_bytes += length
        self._blocks.move_to_end((source, index))
        return future

    def _make_room(self, length: int, wanted: range, source: RemoteObject) -> bool:
        """Drop the blocks used longest ago, never those of the present read; whether `length` bytes fit then."""
        for key in list(self._blocks):
            if self.held_bytes + length <= self.budget_bytes:
                break
            if self._blocks[key].done() and not (key[0] == source and key[1] in wanted):
                self._drop(*key)
        return self.held_bytes + length <= self.budget_bytes

    def _drop(self, source: RemoteObject, index: int) -> None:
        del self._blocks[source, index]
        self.held_bytes -= self._length(source, index)


def _fetch(source: RemoteObject, start: int, end: int) -> memoryview:
    """Bytes [start, end) of an object in one request, checked against what was listed."""
    store = connect(source.url)
    got = 0
    for _ in range(SHORT_TRIES):
        try:
            answer = obstore.get(store, source.path, options={"range": (start, end)})
            _same_object(source, answer.meta)
            data = memoryview(answer.bytes())
        except PreconditionError as error:  # it changed between two parts of one answer
            raise _changed(source, first_line(error)) from error
        except (BaseError, OSError) as error:
            raise store_error(source, error, _HINT) from error
        if len(data) == end - start:
            return data
        got = len(data)
    raise StoreError(
        f"{source}: the store sends too few bytes",
        got=f"{got} bytes from {start}",
        expected=f"{end - start} bytes",
        hint="the object, the store, or something on the way to it is damaged",
    )


def _same_object(source: RemoteObject, meta: "ObjectMeta") -> None:
    if (meta["size"], _version(meta)) != (source.size_bytes, source.version):
        raise _changed(source, f"{meta['size']} bytes, version {_version(meta)}")


def _changed(source: RemoteObject, got: str) -> StoreError:
    return StoreError(
        f"{source} was replaced while it was being read",
        got=got,
        expected=f"{source.size_bytes} bytes, version {source.version}",
        hint="restore the shard; what was read before belongs to the old one",
    )


_reader: tuple[int, BlockReader] | None = None
_reader_lock = threading.Lock()


def reader() -> BlockReader:
    """The reader of this process."""
    global _reader
    with _reader_lock:
        if _reader is None or _reader[0] != os.getpid():  # threads do not survive a fork
            _reader = (os.getpid(), BlockReader())
        return _reader[1]
