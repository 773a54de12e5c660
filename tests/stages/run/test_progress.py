"""Progress: counts, rate and ETA, on stderr and in the run folder."""

import json
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tinymim.configs.errors import UserError
from tinymim.stages.run import progress
from tinymim.stages.run.folder import LOG_NAME, STATUS_NAME, RunFolder
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.progress import Meter, ProgressFiles, logger, silence
from tinymim.storage.atomic import write_json_atomic
from tinymim.tests.stages.tiny import student_recipe


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_say_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logger.info("a line")
    assert capsys.readouterr() == ("", "a line\n")


def test_a_line_every_few_seconds_with_rate_and_eta(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("train", 1000, "steps") as meter:
        for _ in range(50):  # 4 steps a second
            clock.now_s += 0.5
            meter.advance(2, "loss 1.5")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 3  # two on the way, one at the end
    assert all(re.fullmatch(r"train: \d+/1,000 steps, 4\.0/s, ETA [34]m\d\ds loss 1\.5", line) for line in lines)
    assert lines[-1].startswith("train: 100/1,000 steps, 4.0/s, ETA 3m45s")


def test_what_an_earlier_process_did_is_no_part_of_the_rate(clock: Clock) -> None:
    meter = Meter("train", 1000, "steps", start=900)
    clock.now_s += 10
    meter.advance(20)
    assert meter.done == 920 and meter.rate == pytest.approx(2.0)
    assert "920/1,000 steps, 2.0/s, ETA 0m40s" in meter.line()


def test_no_rate_no_eta(clock: Clock) -> None:
    assert "ETA unknown" in Meter("train", 10, "steps").line()


def test_short_and_failed_runs_are_quiet(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("short", 1, "steps") as meter:
        meter.advance(1)

    def fail() -> None:
        with Meter("failed", 10, "steps"):
            clock.now_s += 5
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_that_is_taken_down(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Meter("train", 4, "views", start=1) as meter:
        assert meter._bar is not None
        meter.advance(3, "loss 0.1")
        assert meter._bar.tasks[0].completed == 4
        assert "views/s loss 0.1" in meter._bar.tasks[0].fields["status"]
    assert not meter._bar.live.is_started
    assert capfd.readouterr().out == ""


# ---------------------------------------------------------------- in the run folder


class Folder(ProgressFiles):
    """A run folder's progress alone, and how often its status was replaced."""

    def __init__(self, path: Path) -> None:
        super().__init__(path / LOG_NAME, path / STATUS_NAME)
        self.path = path

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / STATUS_NAME).read_text())
        return found

    @property
    def log(self) -> list[str]:
        """The messages, without their times."""
        lines = (self.path / LOG_NAME).read_text().splitlines()
        assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 ", line) for line in lines)
        return [line.partition(" ")[2] for line in lines]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every status that is written, by whatever folder."""
    found: list[dict[str, Any]] = []

    def spy(path: Path, status: dict[str, Any]) -> None:
        write_json_atomic(path, status)
        found.append(status)

    monkeypatch.setattr(progress, "write_json_atomic", spy)
    return found


@pytest.fixture
def _heard() -> Iterator[None]:
    """`silence` is for ever; not in a test."""
    level = logging.getLogger("tinymim").level
    yield
    logging.getLogger("tinymim").setLevel(level)


def test_the_status_has_all_that_the_line_shows(clock: Clock, tmp_path: Path) -> None:
    with Folder(tmp_path) as folder, Meter("train", 1000, "steps", start=100) as meter:
        clock.now_s += 10
        meter.advance(20, "loss 1.5")
        found = folder.status
    assert datetime.fromisoformat(found.pop("time")).tzinfo is not None
    assert found == {
        "label": "train",
        "phase": "running",
        "done": 120,
        "total": 1000,
        "unit": "steps",
        "rate_per_s": 2.0,
        "eta_s": 440.0,
        "note": "loss 1.5",
        "pid": os.getpid(),
        "host": socket.gethostname(),
    }


def test_the_status_is_replaced_every_two_seconds_at_most(
    clock: Clock, tmp_path: Path, written: list[dict[str, Any]]
) -> None:
    with Folder(tmp_path) as folder, Meter("train", 100, "steps") as meter:
        for _ in range(100):  # 10 s
            clock.now_s += 0.1
            meter.advance(1)
        assert not list(tmp_path.glob("*.partial"))
        folder.end("done", "")
    assert 5 <= len(written[:-1]) <= 6 and written[0]["done"] == 0 and written[0]["eta_s"] is None
    assert written[-1] == folder.status and (written[-1]["phase"], written[-1]["done"]) == ("done", 100)


def test_a_reader_finds_a_whole_status_at_any_time(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, seen = os.replace, list[int]()

    def look(new: Path, path: Path) -> None:
        if path.exists():
            seen.append(json.loads(path.read_text())["done"])  # the old one, while the new one waits beside it
        assert json.loads(Path(new).read_text())["done"] == (seen[-1] + 1 if seen else 0)
        replace(new, path)

    monkeypatch.setattr("os.replace", look)
    with Folder(tmp_path), Meter("train", 3, "steps") as meter:
        for _ in range(3):
            clock.now_s += 2
            meter.advance(1)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(
    ("error", "phase", "note"),
    [
        (None, "done", "loss 1"),
        (Interrupted("state of step 2 saved"), "interrupted", "state of step 2 saved"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (UserError("the loss is not finite", got="nan"), "failed", "the loss is not finite"),
        (ZeroDivisionError("x"), "failed", "x"),
    ],
)
def test_a_run_says_how_it_ended(error: BaseException | None, phase: str, note: str, tmp_path: Path) -> None:
    recipe = student_recipe(tmp_path)
    folder = Folder(recipe.run.folder)

    def run() -> None:
        with RunFolder(recipe), Meter("train", 4, "steps") as meter:
            logger.info("begun")
            meter.advance(2, "loss 1")
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    logger.info("after it")
    assert (folder.status["phase"], folder.status["note"], folder.status["done"]) == (phase, note, 2)
    assert folder.log == ["begun", f"{phase}: {note}" if error else "done"]
    run_again = RunFolder(recipe, None)  # such as a cache that is complete: no meter, the status stays
    with run_again:
        logger.info("nothing to do")
    assert folder.log[2:] == ["nothing to do", "done"] and folder.status["phase"] == phase


def test_an_inner_meter_is_the_note_of_the_outer_one(clock: Clock, tmp_path: Path) -> None:
    with Folder(tmp_path) as folder, Meter("train", 10, "steps") as meter:
        meter.advance(1, "loss 1")
        with Meter("audit", 64, "images") as inner:
            clock.now_s += 2
            inner.advance(32)
            assert (folder.status["label"], folder.status["done"]) == ("train", 1)
            assert folder.status["note"] == "audit: 32/64 images, 16.0/s, ETA 0m02s"
        clock.now_s += 2
        meter.advance(1)
        assert folder.status["note"] == "loss 1"


def test_every_open_folder_is_written_and_none_without(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    with Folder(tmp_path / "a") as one, Folder(tmp_path / "b") as two, Meter("train", 10, "steps"):
        logger.info("100% sure")
    with Meter("cache verify", 10, "units") as meter:
        meter.advance(10)
        logger.info("no folder")
    assert one.status == two.status and one.log == two.log == ["100% sure"]
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.usefixtures("_heard")
def test_other_ranks_than_the_first_print_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = student_recipe(tmp_path)
    silence()
    with RunFolder(recipe), Meter("train", 10, "steps") as meter:
        logger.info("a line")
        meter.advance(10)
    assert capsys.readouterr() == ("", "")
    assert not {LOG_NAME, STATUS_NAME} & {path.name for path in recipe.run.folder.iterdir()}


@pytest.mark.parametrize("name", [LOG_NAME, STATUS_NAME])
def test_a_file_that_cannot_be_written_is_reported_once_and_costs_nothing_else(
    name: str, clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()  # nobody can write there, root included
    with Folder(tmp_path) as folder, Meter("train", 10, "steps") as meter:
        for number in range(3):
            clock.now_s += 2
            logger.info(f"message {number}")
            meter.advance(1)
        folder.end("done", "")
    lines = capsys.readouterr().err.splitlines()
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert re.fullmatch(r"warning: .*/" + name + r" cannot be written \(.*\); the run goes on without it", warning)
    assert [line for line in lines if line != warning] == ["message 0", "message 1", "message 2", meter.line()]
    assert folder.status["done"] == 3 if name == LOG_NAME else folder.log[:3] == lines[-4:-1]


def test_a_full_disk_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressFiles(Path("/dev/full"), tmp_path / STATUS_NAME), Meter("train", 10, "steps"):
        logger.info("a line")
        logger.info("another")
    assert capsys.readouterr().err.splitlines() == [
        "a line",
        "warning: /dev/full cannot be written (No space left on device); the run goes on without it",
        "another",
    ]


def test_a_stderr_that_is_gone_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = open(os.devnull, "w")  # noqa: SIM115 - closed at once
    closed.close()
    with Folder(tmp_path) as folder:
        for stderr in (closed, None):
            monkeypatch.setattr(sys, "stderr", stderr)
            logger.info("nobody reads this")
    assert folder.log == ["nobody reads this"] * 2


def test_a_message_of_a_signal_handler_is_logged(tmp_path: Path) -> None:
    with Folder(tmp_path) as folder, StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert folder.log == ["SIGTERM received: finishing current work and saving (again to stop at once)"]


def test_a_root_logger_with_handlers_prints_nothing_twice(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        logger.info("once")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err == "once\n"
