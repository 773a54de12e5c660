"""What the reads of one object look like so far, and so which blocks to fetch next."""

from collections.abc import Iterable

_SURE_AFTER = 8  # scattered reads, until it is known how many shards an order mixes


class Walk:
    """Follows the reads of one object.

    A *run* is a chain of ascending reads with small gaps. Runs of a block and more are worth whole blocks and
    reading ahead; shorter ones, *scattered* reads, come from a shuffled order.

    Args:
        block_bytes: size of blocks.
        like: bytes that the first run is expected to have (see below).

    Attributes:
        like: bytes of the run before, which this one is expected to have, too; None: it may go on to the end.
        scattered: how many of the last reads in a row were scattered.
        last_read: running number of the last read, for the owner's use.
    """

    def __init__(self, block_bytes: int, like: int | None = None) -> None:
        self.like = like
        self.scattered = 0
        self.last_read = 0
        self._block_bytes, self._gap = block_bytes, block_bytes // 8
        self._start = self._end = -1  # the run; -1: none yet
        self._offset = 0  # of its last read
        self._depth = 1  # blocks to fetch ahead, doubled at each new block
        self._top = -1  # last block of the run so far

    @property
    def settled(self) -> bool:
        """Reads have been scattered for long enough to know which shards the order mixes."""
        return self.scattered >= _SURE_AFTER

    def step(self, offset: int, end: int) -> None:
        """Note a read of bytes [offset, end)."""
        if self._start < 0:
            self._start = offset
        elif not self._offset <= offset <= self._end + self._gap:
            # Back to the front after a long run is a new pass, of which no gap is known.
            again = offset <= self._gap and self._end - self._start >= self._block_bytes
            self.like = None if again else self._end - self._start
            self._start, self._end = offset, end
            self._depth, self._top = 1, -1
        self._offset, self._end = offset, max(self._end, end)
        length = self._end - self._start
        if self.like is not None and max(length, self.like) < self._block_bytes:
            self.scattered += 1
            return
        self.scattered = 0
        if self.like is not None and length > 2 * self.like:
            self.like = None

    def ahead(self, block: int, last: int, most: int) -> Iterable[int]:
        """Blocks to fetch behind `block`, the last one of the present read; at most `most`, none beyond `last`."""
        if self.scattered:  # its owner has room for all of the object
            return [(block + i) % (last + 1) for i in range(1, min(most, last) + 1)]
        if block > self._top >= 0:
            self._depth = min(2 * self._depth, most)
        self._top = max(block, self._top)
        depth = min(self._depth, most)
        if self.like is not None:
            depth, last = most, min(last, (self._start + self.like - 1) // self._block_bytes)
        return range(block + 1, min(block + depth, last) + 1)
