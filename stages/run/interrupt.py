"""Ctrl-C and SIGTERM: finish the current step or unit, save, and exit with a code of their own."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

from tinymim.stages.run.progress import logger


class Interrupted(Exception):
    """The run received a signal and has stopped cleanly; its work is saved.

    Args:
        message: states what was saved.
        requeue: the signal was SIGTERM: a batch system takes the machine back and should start the command again.
    """

    def __init__(self, message: str, requeue: bool = False) -> None:
        super().__init__(message)
        self.requeue = requeue


@contextlib.contextmanager
def on_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Call `handle` with the number of each SIGINT and SIGTERM, within the context.

    Only the main thread can set handlers. In other threads, such as that of a Ray worker, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda number, _frame: handle(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopFlag:
    """Context manager that sets `requested` at the first SIGINT or SIGTERM, and raises KeyboardInterrupt at the second.

    Args:
        has_parent: a parent process prints the message and handles a second signal, so this one ignores it.

    Attributes:
        requested: a signal came, or `ask_to_stop` was called.
        requeue: the signal was SIGTERM.
    """

    def __init__(self, has_parent: bool = False) -> None:
        self.requested = self.requeue = False
        self._has_parent = has_parent
        self._handlers = contextlib.ExitStack()

    def __enter__(self) -> "StopFlag":
        _open_flags.add(self)
        self._handlers.enter_context(on_signals(self._on_signal))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _open_flags.discard(self)
        self._handlers.close()

    def _on_signal(self, number: int) -> None:
        if self.requested:
            if not self._has_parent:
                raise KeyboardInterrupt
            return
        self.requested, self.requeue = True, number == signal.SIGTERM
        if not self._has_parent:
            logger.info(
                f"{signal.Signals(number).name} received: finishing current work and saving (again to stop at once)"
            )


_open_flags: set[StopFlag] = set()


def ask_to_stop(requeue: bool) -> bool:
    """Set all open flags, from any thread of this process, as a first signal would; False: no flag is open."""
    for flag in _open_flags:
        flag.requested, flag.requeue = True, requeue
    return bool(_open_flags)
