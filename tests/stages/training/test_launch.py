"""What the parent of workers decides by itself; what takes workers is in test_distributed.py."""

import os
import signal
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pytest

from tinymim.stages.run.interrupt import Interrupted, on_signals
from tinymim.stages.training import launch
from tinymim.stages.training.launch import resuming
from tinymim.stages.training.start_local import LocalStart
from tinymim.tests.stages.tiny import student_recipe


def state(path: Path, content: bytes = b"state") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_restart_of_a_run_begun_anew_goes_on_from_its_own_states(tmp_path: Path) -> None:
    recipe = student_recipe(tmp_path, checkpoint={"resume": False})
    old = state(recipe.run.folder / "state-00000900.pt")
    before = launch._states(recipe)
    assert resuming(recipe, before) is recipe and old.exists()  # it has saved nothing yet
    own = state(recipe.run.folder / "state-00000100.pt")
    again = resuming(recipe, before)
    assert again.checkpoint.resume and again.checkpoint.every_steps == recipe.checkpoint.every_steps
    assert own.exists() and not old.exists()


def test_a_restart_of_a_run_that_resumes_changes_nothing(tmp_path: Path) -> None:
    recipe = student_recipe(tmp_path)
    old = state(recipe.run.folder / "one" / "state-00000900.pt")
    before = launch._states(recipe)
    assert list(before) == [old]
    state(recipe.run.folder / "one" / "state-00001000.pt")
    assert resuming(recipe, before) is recipe and old.exists()


@pytest.mark.parametrize(("number", "requeue"), [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_signal_before_there_are_workers_ends_at_once(number: int, requeue: bool) -> None:
    before = signal.getsignal(number)
    stop = launch._SignalForwarder(LocalStart())
    with on_signals(stop.on_signal):
        with pytest.raises(Interrupted, match="before it had begun") as caught:
            os.kill(os.getpid(), number)
        assert caught.value.requeue == stop.requeue == requeue
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_signals_reach_spawned_workers_once_and_kill_them_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Worker(SpawnProcess):
        def __init__(self) -> None:
            self.got: list[str] = []

        def terminate(self) -> None:
            self.got.append("TERM")

        def kill(self) -> None:
            self.got.append("KILL")

        def __del__(self) -> None: ...

    workers: list[Any] = [Worker(), Worker()]
    monkeypatch.setattr("multiprocessing.active_children", lambda: [*workers, object()])
    stop = launch._SignalForwarder(LocalStart())
    with on_signals(stop.on_signal):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and [worker.got for worker in workers] == [["TERM"], ["TERM"]]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [worker.got for worker in workers] == [["TERM", "KILL"], ["TERM", "KILL"]]
