"""What limits a job, in per cent."""

import pytest

from tinymim.stages.units.timing import PHASES, Stopwatch, percentages, shares


def test_a_job_that_waits_for_images_is_limited_by_decoding() -> None:
    seconds = {"wall": 10.0, "start": 1.0, "teacher": 2.0, "encode": 1.0, "waited_for_images": 6.0}
    found = shares(seconds)
    assert [found[phase] for phase in PHASES] == pytest.approx([0.1, 0.6, 0.2, 0.1, 0.0, 0.0])
    assert percentages(seconds) == "start 10 % decode 60 % teacher 20 % encode 10 % audit 0 % write 0 %"


def test_waiting_for_the_threads_behind_is_told_apart_by_what_they_did() -> None:
    found = shares({"wall": 10.0, "teacher": 4.0, "waited_behind": 6.0, "audit": 2.0, "write": 6.0})
    assert found["audit"] == pytest.approx(0.15) and found["write"] == pytest.approx(0.45)


def test_waiting_while_the_device_is_busy_costs_nothing() -> None:
    found = shares({"wall": 10.0, "teacher": 9.0, "encode": 0.5, "waited_for_images": 8.0, "waited_behind": 1.0})
    assert found["teacher"] == pytest.approx(0.9)
    assert found["decode"] == pytest.approx(0.05 * 8 / 9) and sum(found.values()) <= 1.0


def test_the_wait_for_the_first_images_is_the_start_and_no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((100.0, 103.0, 105.0, 107.0, 108.0, 110.0))
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    watch = Stopwatch()  # at 100
    for _ in range(2):
        with watch.waiting_for_images():  # from 103 to 105, from 107 to 108
            pass
    seconds = watch.seconds()
    assert (seconds["start"], seconds["waited_for_images"], seconds["wall"]) == (5.0, 1.0, 10.0)
    assert shares(seconds)["start"] == 0.5 and shares(seconds)["decode"] == pytest.approx(0.1)


def test_a_device_that_was_busy_waits_after_the_start() -> None:
    found = shares({"wall": 10.0, "start": 4.0, "teacher": 5.0, "encode": 0.5, "waited_for_images": 5.0})
    assert found["decode"] == pytest.approx(0.05) and sum(found.values()) == pytest.approx(1.0)


def test_nothing_measured_is_nothing() -> None:
    assert set(shares({}).values()) == {0.0}


def test_a_stopwatch_adds_up() -> None:
    watch = Stopwatch()
    watch.add("teacher", 1.5)
    watch.add("teacher", 0.5)
    with watch.during("write"):
        pass
    seconds = watch.seconds()
    assert seconds["teacher"] == 2.0 and 0 < seconds["write"] <= seconds["wall"]
