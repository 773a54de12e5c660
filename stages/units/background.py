"""A thread that works behind the one that gives it work: in order, with a short line, and errors that come back."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from tinymim.stages.run.interrupt import Interrupted

T = TypeVar("T")
LOOK_S = 0.05  # how soon an error is noticed by who waits in `give`


class Background(Generic[T]):
    """Applies `work` to what it is given, one thing after the other, in a thread of its own; a context manager.

    After an error nothing more is worked on, and every call raises that error. Leaving the block waits for all that
    was given, also where the run was asked to stop; after other errors only for what is being worked on, and after
    Ctrl-C twice for nothing.

    Args:
        name: of the thread, for whoever looks at it.
        work: done to each thing.
        depth: things that wait in line at most; `give` waits for a place.
    """

    def __init__(self, name: str, work: Callable[[T], None], depth: int) -> None:
        self._work = work
        self._line: queue.Queue[T | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        # A daemon: whoever is told to stop at once does not wait for a disk. What is half written is never read.
        self._thread = threading.Thread(target=self._run, name=f"tinymim-{name}", daemon=True)
        self._thread.start()

    def give(self, thing: T) -> None:
        """Put a thing in line. Raises what `work` has raised."""
        while True:
            self._raise()
            try:
                return self._line.put(thing, timeout=LOOK_S)
            except queue.Full:
                continue

    def drain(self) -> None:
        """Wait until all that was given is done. Raises what `work` has raised."""
        self._line.join()
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
                self._error = error or GeneratorExit()  # nothing is worked on from now on
            if kind is not KeyboardInterrupt:
                self._line.join()
                self._line.put(None)
                self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            thing = self._line.get()
            try:
                if thing is None:
                    return
                if self._error is None:
                    self._work(thing)
            except BaseException as error:  # raised again where the work comes from
                self._error = error
            finally:
                self._line.task_done()
