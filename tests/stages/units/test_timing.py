"""What limits a job, in per cent."""

import pytest

from tinymim.stages.units.timing import PHASES, Stopwatch, percentages, shares


def test_a_job_that_waits_for_images_is_limited_by_decoding() -> None:
    seconds = {"wall": 10.0, "teacher": 2.0, "encode": 1.0, "waited_for_images": 7.0}
    found = shares(seconds)
    assert [found[phase] for phase in PHASES] == pytest.approx([0.7, 0.2, 0.1, 0.0, 0.0])
    assert percentages(seconds) == "decode 70 % teacher 20 % encode 10 % audit 0 % write 0 %"


def test_waiting_for_the_threads_behind_is_told_apart_by_what_they_did() -> None:
    found = shares({"wall": 10.0, "teacher": 4.0, "waited_behind": 6.0, "audit": 2.0, "write": 6.0})
    assert found["audit"] == pytest.approx(0.15) and found["write"] == pytest.approx(0.45)


def test_waiting_while_the_device_is_busy_costs_nothing() -> None:
    found = shares({"wall": 10.0, "teacher": 9.0, "encode": 0.5, "waited_for_images": 8.0, "waited_behind": 1.0})
    assert found["teacher"] == pytest.approx(0.9)
    assert found["decode"] == pytest.approx(0.05 * 8 / 9) and sum(found.values()) <= 1.0


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
