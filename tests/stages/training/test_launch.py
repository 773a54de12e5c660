"""What the parent of workers decides by itself; what takes workers is in test_ranks.py."""

import os
import pickle
import signal
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pytest

from tinymim.configs.errors import CacheCorrupt, InternalError, LoaderKilled, TinymimError
from tinymim.stages.run.interrupt import Interrupted, on_signals
from tinymim.stages.training import launch, start_local
from tinymim.stages.training.launch import resuming
from tinymim.stages.training.start import WorkersDied
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


@pytest.mark.parametrize(
    ("error", "raised", "starts"),
    [
        (LoaderKilled("a loader worker was killed", hint="lower loader.workers"), LoaderKilled, 3),
        (WorkersDied("worker 0 was killed by SIGKILL"), InternalError, 3),
        (CacheCorrupt("damaged"), CacheCorrupt, 1),
    ],
)
def test_a_killing_is_tried_again_and_named_at_the_end(
    error: Exception, raised: type[TinymimError], starts: int, tmp_path: Path
) -> None:
    tried: list[Any] = []

    class Start(LocalStart):
        def __call__(self, train: Any, recipe: Any) -> None:
            tried.append(recipe)
            raise error

    with pytest.raises(raised) as caught:
        launch._supervised(lambda *_: None, student_recipe(tmp_path, max_restarts=2), Start())
    assert len(tried) == starts and (caught.value is error or error.args[0] in str(caught.value))


def test_an_error_that_would_come_again_goes_before_a_killing(tmp_path: Path) -> None:
    killed, damaged = LoaderKilled("killed"), CacheCorrupt("damaged")
    (tmp_path / "0").write_bytes(pickle.dumps(killed))
    with pytest.raises(LoaderKilled):
        start_local._raise_worker_error(tmp_path)
    (tmp_path / "1").write_bytes(pickle.dumps(damaged))
    (tmp_path / "2.partial").write_bytes(b"?")
    with pytest.raises(CacheCorrupt):
        start_local._raise_worker_error(tmp_path)
