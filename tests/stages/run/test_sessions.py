"""What a run has taken, over stops, kills and several models."""

import signal
from pathlib import Path

import pytest

from tinymim.stages import train_student
from tinymim.stages.run import sessions
from tinymim.stages.run.folder import SESSIONS_NAME, RunFolder, read_metrics, read_sessions
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.run.metrics import metric
from tinymim.stages.run.sessions import Session
from tinymim.stages.training import student_step
from tinymim.tests.stages.tiny import STUDENT, cache_recipe, signal_in_step, student_recipe


class Clock:
    """The time that sessions see."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(sessions, "monotonic", lambda: self.now_s)


def test_seconds_of_all_sessions_are_on_record_also_of_one_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, recipe = Clock(monkeypatch), student_recipe(tmp_path)
    with RunFolder(recipe, 0, devices=4) as log:
        for step in range(10):
            clock.now_s += 10
            log.log(step, loss=1.0)
    with RunFolder(recipe, 5, devices=2) as log:  # steps 5 to 9 were lost, their time was not
        for step in range(5, 12):
            clock.now_s += 10
            log.log(step, loss=1.0)
        killed = (tmp_path / "run-student" / SESSIONS_NAME).read_text()
    (tmp_path / "run-student" / SESSIONS_NAME).write_text(killed + '{"session": "')
    found = read_sessions(tmp_path / "run-student")
    assert [(line["elapsed_s"], line["device_s"]) for line in found] == [(100.0, 400.0), (60.0, 120.0)]
    assert all(str(line["device"]).startswith("CPU ") for line in found)
    with RunFolder(recipe, 0):  # from scratch
        pass
    assert [line["elapsed_s"] for line in read_sessions(tmp_path / "run-student")] == [0.0]
    assert read_sessions(tmp_path) == []


def test_device_seconds_of_workers_elsewhere_are_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, recipe = Clock(monkeypatch), cache_recipe(tmp_path)
    recipe.run.folder.mkdir()
    session = Session(recipe.run.folder / SESSIONS_NAME, "CPU", from_scratch=False)
    clock.now_s += 10
    session.device_s = 70.0
    session.tick(last=True)
    (line,) = read_sessions(recipe.run.folder)
    assert (line["elapsed_s"], line["device_s"]) == (10.0, 70.0)


def test_both_stages_write_down_what_they_take(made: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = read_metrics(made / "run-cache")
    assert [name for line in lines for name in line if metric(name).curve] == []  # each has an entry
    (stage_one,) = read_sessions(made / "run-cache")
    assert 0 < stage_one["device_s"] <= stage_one["elapsed_s"] + 1e-3
    two = {"student": None, "students": {"a": {"model": STUDENT}, "b": {"model": STUDENT}}}
    recipe = student_recipe(home, optim={"batch_size": 8, "steps": 4}, **two)
    with monkeypatch.context() as patched:
        signal_in_step(student_step, 1, signal.SIGTERM, patched)
        with pytest.raises(Interrupted):
            train_student.run(recipe)
    train_student.run(recipe)
    for name in ("a", "b"):
        found = read_sessions(home / "run-student" / name)
        assert len(found) == 2
        assert all(line["device_s"] == pytest.approx(line["elapsed_s"] / 2, abs=2e-3) for line in found)
