"""Progress: messages and meters, on stderr and in the run folder.

Messages go through the logger "tinymim": to stderr as they are, and with a time stamp into `log.txt` of the open run
folders. A meter is a bar on a terminal and a plain line every few seconds elsewhere; it keeps `status.json` up to date.
"""

import contextlib
import logging
import os
import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from tinymim.configs.errors import printable
from tinymim.storage.atomic import write_json_atomic

if TYPE_CHECKING:
    from rich.progress import Progress

_PLAIN_EVERY_S = 10.0
_STATUS_EVERY_S = 2.0
Phase = Literal["running", "done", "interrupted", "failed"]


class _Stderr(logging.Handler):
    """Prints messages to the current `sys.stderr`. A closed stderr does not end a run."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                print(printable(record.getMessage()), file=sys.stderr, flush=True)


logger = logging.getLogger("tinymim")
logger.setLevel(logging.INFO)
logger.propagate = False  # otherwise handlers of the root logger print every message twice
_stderr = _Stderr()
logger.addHandler(_stderr)


def silence() -> None:
    """Make this process print and record nothing, as on all ranks but the first."""
    logger.setLevel(logging.CRITICAL + 1)


class ProgressFiles(logging.Handler):
    """Writes messages and status of a run into its folder, within the context; does nothing in a silent process.

    Several processes may share a folder. `log.txt` then has the lines of all of them, and `status.json` holds the
    status of the one that wrote last, with its pid and host. A file that cannot be written is reported once on stderr,
    and the run goes on.

    Args:
        log: the file to append messages to.
        status: the JSON file to replace, at most every 2 s and once at the end; not written without a meter.
    """

    def __init__(self, log: Path, status: Path) -> None:
        super().__init__()
        self._log, self._status = log, status
        self._meter: Meter | None = None
        self._written_s = -float("inf")
        self._refused: set[Path] = set()

    def __enter__(self) -> Self:
        if logger.isEnabledFor(logging.INFO):
            logger.addHandler(self)
            _open_files.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self in _open_files:
            _open_files.remove(self)
            logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Append a message to the log."""
        line = f"{_now()} {printable(record.getMessage())}\n".encode()
        try:
            # Reopened for each of the few lines and unbuffered, so that lines of several processes stay whole.
            with open(self._log, "ab", buffering=0) as file:
                file.write(line)
        except OSError as error:
            self._refuse(self._log, error)

    def report(self, meter: "Meter", note: str) -> None:
        """Write the meter's status if it is due."""
        self._meter = meter
        if time.monotonic() - self._written_s >= _STATUS_EVERY_S:
            self._write(meter, "running", note)

    def end(self, phase: Phase, reason: str) -> None:
        """Write the last phase and its reason, which may be empty, into both files."""
        if self not in _open_files:
            return
        text = f"{phase}: {reason}" if reason else phase
        self.handle(logger.makeRecord(logger.name, logging.INFO, "", 0, text, (), None))
        if self._meter is not None:
            self._write(self._meter, phase, reason or self._meter.note)

    def _write(self, meter: "Meter", phase: Phase, note: str) -> None:
        self._written_s = time.monotonic()
        status = {
            "label": meter.label,
            "phase": phase,
            "done": int(meter.done),
            "total": int(meter.total),
            "unit": meter.unit,
            "rate_per_s": meter.rate,
            "eta_s": meter.eta_s,
            "note": note,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": _now(),
        }
        try:
            write_json_atomic(self._status, status)
        except OSError as error:
            self._refuse(self._status, error)

    def _refuse(self, path: Path, error: OSError) -> None:
        if path not in self._refused:
            self._refused.add(path)
            text = f"warning: {path} cannot be written ({error.strerror}); the run goes on without it"
            _stderr.handle(logger.makeRecord(logger.name, logging.WARNING, "", 0, text, (), None))


_open_files: list[ProgressFiles] = []
_running: list["Meter"] = []  # the outermost first


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _report() -> None:
    """Write the outermost meter into the open run folders; a meter within it, such as an audit's, becomes its note."""
    if _running:
        outer, inner = _running[0], _running[-1]
        for files in _open_files:
            files.report(outer, outer.note if inner is outer else inner.line())


class Meter:
    """Counts `unit`s up to `total`; use as a context manager.

    Args:
        label: the name of the work, e.g. "train-student".
        total: number of units.
        unit: plural noun for the rate, e.g. "views".
        start: units done before this process started; they do not count in the rate.
    """

    def __init__(self, label: str, total: int, unit: str, start: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self.start = start
        self.note = ""
        self._began_s = self._said_s = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "Meter":
        _running.append(self)
        _report()
        if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, status="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _report()
        _running.remove(self)
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and time.monotonic() - self._began_s > 2.0:
            logger.info(self.line())

    def advance(self, count: int, note: str | None = None) -> None:
        """Add `count` units; `note` (a loss, say) is shown beside the rate."""
        self.done += count
        self.note = self.note if note is None else note
        _report()
        if self._bar is not None:
            self._bar.update(
                self._task, completed=self.done, status=printable(f"{self.rate:,.0f} {self.unit}/s {self.note}")
            )
        elif time.monotonic() - self._said_s > _PLAIN_EVERY_S:
            self._said_s = time.monotonic()
            logger.info(self.line())

    @property
    def rate(self) -> float:
        """Units per second of this process."""
        return (self.done - self.start) / max(self.elapsed_s, 1e-9)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the meter was made."""
        return time.monotonic() - self._began_s

    @property
    def eta_s(self) -> float | None:
        """Seconds left at this rate; None if nothing is done yet."""
        return (self.total - self.done) / self.rate if self.rate > 0 else None

    def line(self) -> str:
        """Label, counts, rate, ETA and note."""
        left_s = self.eta_s
        eta = "unknown" if left_s is None or left_s >= 1e8 else f"{int(left_s // 60)}m{int(left_s % 60):02d}s"
        counts = f"{self.done:,}/{self.total:,} {self.unit}, {self.rate:,.1f}/s"
        return f"{self.label}: {counts}, ETA {eta} {self.note}".rstrip()
