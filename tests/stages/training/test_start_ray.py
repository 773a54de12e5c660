"""`cluster: ray`: the same training by Ray Train's workers, on a cluster of this machine."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tinymim.configs.errors import CacheCorrupt, RecipeError
from tinymim.stages import train_student
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.training.start import WorkersDied
from tinymim.stages.training.start_ray import RayStart, _reason
from tinymim.tests.stages.tiny import losses, student_recipe

OPTIM = {"batch_size": 8, "steps": 120, "base_lr": 0.1, "warmup": 0.2}


def test_an_error_of_ours_is_told_from_a_death() -> None:
    ours = CacheCorrupt("a byte", got=1)
    assert _reason({0: RuntimeError("connection closed"), 3: ours}) is ours
    died = _reason({2: RuntimeError("a traceback\nRuntimeError: connection closed")})
    assert isinstance(died, WorkersDied) and str(died) == "worker 2 failed: RuntimeError: connection closed"


def test_without_ray_train_the_recipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray.train.torch", None)
    with pytest.raises(RecipeError, match="needs Ray Train") as caught:
        RayStart(student_recipe(tmp_path, cluster="ray"))
    assert "tinymim[cluster]" in str(caught.value.hint)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.train.torch", exc_type=ImportError, reason="Ray Train is not installed")
    ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow  # Ray Train takes half a minute for each of two starts
@pytest.mark.filterwarnings("ignore")  # Ray's own, of sockets and futures
@pytest.mark.usefixtures("cluster")
def test_rays_workers_train_like_one_process_and_stop_when_the_driver_is_asked(home: Path) -> None:
    common = {"order": {"lanes": 2}, "optim": OPTIM}
    train_student.run(student_recipe(home, **common))
    one, folder = losses(home), home / "run-student"
    shutil.rmtree(folder)

    def terminate() -> None:
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    recipe = student_recipe(home, workers=2, cluster="ray", **common)
    with pytest.raises(Interrupted, match=r"state of step \d+ saved") as caught:
        train_student.run(recipe)
    assert caught.value.requeue and 0 < len(losses(home)) < 120
    train_student.run(recipe)
    np.testing.assert_allclose(losses(home), one, rtol=1e-4, atol=2e-5)
    assert not {path.name for path in folder.iterdir()} & {"stop-requested", "stopped.json"}
