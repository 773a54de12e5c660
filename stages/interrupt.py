"""Ctrl-C and SIGTERM: finish the step or unit at hand, save, and leave with exit code 130."""

import signal
from types import FrameType, TracebackType

from tinymim.stages.progress import say


class Interrupted(Exception):
    """The run was asked to stop and has stopped cleanly; what was done is saved."""


class StopFlag:
    """Context manager that turns the first SIGINT or SIGTERM into `flag.requested`; a second one raises at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopFlag":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        say(f"{signal.Signals(number).name} received: finishing what is at hand and saving (again to stop at once)")
