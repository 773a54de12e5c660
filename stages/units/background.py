"""A worker thread with a short queue: it keeps order, throttles its producer and hands its errors back."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from tinymim.stages.run.interrupt import Interrupted

T = TypeVar("T")
POLL_S = 0.05  # a producer that waits for a place checks for errors this often


class Background(Generic[T]):
    """Context manager that applies `work` to items in a thread of its own, one after the other.

    After an error no further item is worked on, and every call raises that error. Leaving the block waits for all
    items, also after `Interrupted`. After other errors it waits only for the item being worked on, and after a
    KeyboardInterrupt (the second Ctrl-C) for nothing.

    Args:
        name: the thread's name in debuggers and profilers, after "tinymim-".
        work: called with each item.
        depth: items that may wait; `give` blocks while the queue is full.
    """

    def __init__(self, name: str, work: Callable[[T], None], depth: int) -> None:
        self._work = work
        self._items: queue.Queue[T | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        # A daemon, because a second Ctrl-C must not wait for a disk. A half-written unit has no commit record, so it
        # is never read.
        self._thread = threading.Thread(target=self._run, name=f"tinymim-{name}", daemon=True)
        self._thread.start()

    def give(self, item: T) -> None:
        """Queue an item. Raises what `work` raised."""
        while True:
            self._raise()
            try:
                # The timeout lets an error of `work` be raised here while the queue is full.
                return self._items.put(item, timeout=POLL_S)
            except queue.Full:
                continue

    def drain(self) -> None:
        """Wait until all items are done. Raises what `work` raised."""
        self._items.join()
        self._raise()

    def __enter__(self) -> "Background[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None or issubclass(kind, Interrupted):
                self.drain()
        finally:
            if self._error is None:
                self._error = error or GeneratorExit()  # any error makes the thread drop the items still queued
            if kind is not KeyboardInterrupt:
                self._items.join()
                self._items.put(None)
                self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        # After an error the loop goes on taking items without working on them: `join` would otherwise wait for ever.
        while True:
            item = self._items.get()
            try:
                if item is None:
                    return
                if self._error is None:
                    self._work(item)
            except BaseException as error:  # the producer's next call raises it
                self._error = error
            finally:
                item = None  # freed before `drain` returns, not when the next one comes
                self._items.task_done()
