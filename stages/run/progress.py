"""Progress with rate and ETA: a bar on a terminal, a plain line every few seconds elsewhere. Always on stderr."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_PLAIN_EVERY_S = 10.0
_silent = False


def silence() -> None:
    """From now on this process says nothing: of many ranks one is to be heard."""
    global _silent
    _silent = True


def say(message: str) -> None:
    """Print one line of log to stderr."""
    if not _silent:
        print(message, file=sys.stderr, flush=True)


class Meter:
    """Counts `unit`s up to `total`; use as a context manager.

    Args:
        label: what is being done, e.g. "train-student".
        total: how many units there are.
        unit: plural noun for the rate, e.g. "views".
        start: units done before this process started (they do not count in the rate).
    """

    def __init__(self, label: str, total: int, unit: str, start: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self.start = start
        self.note = ""
        self._began_s = self._said_s = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "Meter":
        if sys.stderr.isatty() and not _silent:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, status="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and time.monotonic() - self._began_s > 2.0:
            say(self._line())

    def advance(self, count: int, note: str | None = None) -> None:
        """Add `count` units; `note` (a loss, say) is shown beside the rate."""
        self.done += count
        self.note = self.note if note is None else note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, status=f"{self.rate:,.0f} {self.unit}/s {self.note}")
        elif time.monotonic() - self._said_s > _PLAIN_EVERY_S:
            self._said_s = time.monotonic()
            say(self._line())

    @property
    def rate(self) -> float:
        """Units per second of this process."""
        return (self.done - self.start) / max(self.elapsed_s, 1e-9)

    @property
    def elapsed_s(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._began_s

    def _line(self) -> str:
        left_s = (self.total - self.done) / self.rate if self.rate > 0 else float("inf")
        eta = f"{int(left_s // 60)}m{int(left_s % 60):02d}s" if left_s < 1e8 else "unknown"
        counts = f"{self.done:,}/{self.total:,} {self.unit}, {self.rate:,.1f}/s"
        return f"{self.label}: {counts}, ETA {eta} {self.note}".rstrip()
