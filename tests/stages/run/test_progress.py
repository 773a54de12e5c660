"""Progress: counts, rate and ETA, on stderr only."""

import re
import sys

import pytest

from tinymim.stages.run import progress
from tinymim.stages.run.progress import Meter, say


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
    say("a line")
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
    assert "920/1,000 steps, 2.0/s, ETA 0m40s" in meter._line()


def test_no_rate_no_eta(clock: Clock) -> None:
    assert "ETA unknown" in Meter("train", 10, "steps")._line()


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
