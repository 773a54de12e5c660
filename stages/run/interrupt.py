"""Ctrl-C and SIGTERM: finish the step or unit at hand, save, and leave with an exit code of its own."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

from tinymim.stages.run.progress import say


class Interrupted(Exception):
    """The run was asked to stop and has stopped cleanly; what was done is saved.

    Args:
        message: what was saved.
        requeue: a batch system wants the machine back (SIGTERM) and is to start the same command again.
    """

    def __init__(self, message: str, requeue: bool = False) -> None:
        super().__init__(message)
        self.requeue = requeue


@contextlib.contextmanager
def on_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `handle` with their number, until the context ends.

    Only the main thread can set handlers: elsewhere, such as in a worker of Ray, signals stay as they are.
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
    """Context manager that turns the first SIGINT or SIGTERM into `flag.requested`; a second one raises at once.

    Args:
        insists: False: a second one changes nothing, and nothing is said, for a process whose parent does both.

    Attributes:
        requested: a signal came, or `ask_to_stop` was called.
        requeue: and it was SIGTERM.
    """

    def __init__(self, insists: bool = True) -> None:
        self.requested = self.requeue = False
        self._insists = insists
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
            if self._insists:
                raise KeyboardInterrupt
            return
        self.requested, self.requeue = True, number == signal.SIGTERM
        if self._insists:
            say(f"{signal.Signals(number).name} received: finishing what is at hand and saving (again to stop at once)")


_open_flags: set[StopFlag] = set()


def ask_to_stop(requeue: bool) -> bool:
    """As a first signal would, from a thread of this process; `requeue` as for SIGTERM. False: nobody is listening."""
    for flag in _open_flags:
        flag.requested, flag.requeue = True, requeue
    return bool(_open_flags)
