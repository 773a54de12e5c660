"""`cluster: ray`: Ray Train starts the workers on nodes of the cluster that have room.

Driver and workers must share the storage of the run folder: rank 0 writes there, and may be on another machine after
a restart. The driver requests a stop by a file in it. All workers must reach the cache and the images.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinymim.configs.errors import RecipeError, TinymimError, is_final, is_refusal
from tinymim.configs.schema.recipes import TrainingRecipe
from tinymim.stages.run.interrupt import Interrupted, ask_to_stop
from tinymim.stages.run.ray import join_ray
from tinymim.stages.training.ranks import backend_of, environment_ranks, joined
from tinymim.stages.training.start import R, Training, WorkersDied
from tinymim.storage.atomic import write_json_atomic

STOP_NAME = "stop-requested"  # written by the driver
STOPPED_NAME = "stopped.json"  # written by rank 0 when it has stopped
_POLL_S = 1.0


class RayStart:
    """Starts workers on the Ray cluster of RAY_ADDRESS, else on one that is started on this machine for this run.

    Args:
        recipe: the recipe of the run.

    Raises:
        RecipeError: Ray Train is not installed, or the cluster does not answer.
    """

    def __init__(self, recipe: TrainingRecipe) -> None:
        try:
            import ray.train.torch
        except ImportError as error:
            raise RecipeError(
                "cluster: ray needs Ray Train", got=error, hint="pip install 'tinymim[cluster]', or cluster: local"
            ) from error
        if not ray.is_initialized():
            join_ray(include_dashboard=False)  # before `on_signals`: Ray installs signal handlers of its own
        os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # Ray's patch prints every line twice
        self._stop = recipe.run.folder.absolute() / STOP_NAME
        self._stopped = self._stop.with_name(STOPPED_NAME)

    def __call__(self, train: Training[R], recipe: R) -> tuple[str, bool] | None:
        """See `Start`."""
        import ray
        from ray.train import RunConfig, ScalingConfig, WorkerGroupError
        from ray.train.torch import TorchConfig, TorchTrainer

        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        with_gpus = recipe.run.device != "cpu" and resources.get("GPU", 0) > 0
        self._stop.parent.mkdir(parents=True, exist_ok=True)
        for path in (self._stop, self._stopped):  # a killed driver may have left them
            path.unlink(missing_ok=True)
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"train": train, "recipe": recipe, "folder": os.getcwd(), "stop": self._stop},
            torch_config=TorchConfig(backend=backend_of(with_gpus)),
            scaling_config=ScalingConfig(num_workers=recipe.workers, use_gpu=with_gpus),
            run_config=RunConfig(storage_path=str(self._stop.parent / "ray")),  # its restarts are off by default
        )
        try:
            trainer.fit()
        except WorkerGroupError as failed:
            raise _reason(failed.worker_failures) from failed
        finally:
            self._stop.unlink(missing_ok=True)
        if not self._stopped.exists():
            return None
        stopped = json.loads(self._stopped.read_text())
        self._stopped.unlink()
        return stopped["message"], stopped["requeue"]

    def stop(self, requeue: bool) -> bool:
        """See `Start`; rank 0 reads the request within a second."""
        self._stop.write_text("requeue" if requeue else "")
        return True

    def kill(self) -> None:
        """Does nothing: Ray ends a driver's workers when the driver ends."""


def _reason(failures: dict[int, Exception]) -> Exception:
    """The error to raise for the workers' errors: a TinymimError if there is one, else WorkersDied."""
    for error in sorted(failures.values(), key=is_final, reverse=True):
        if isinstance(error, TinymimError) or is_refusal(error):
            return error
    rank, error = min(failures.items())
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return WorkersDied(f"worker {rank} failed: {lines[-1][:200]}")


def _worker(config: dict[str, Any]) -> None:
    """Train as one rank, in a thread of a Ray worker."""
    os.chdir(config["folder"])  # relative paths of the recipe refer to the driver's folder
    rank = environment_ranks().rank
    try:
        with joined(config["recipe"].run) as ranks, _watching(config["stop"], ranks.first):
            config["train"](config["recipe"], ranks)
    except Interrupted as interrupted:
        if rank == 0:
            stopped = {"message": str(interrupted), "requeue": interrupted.requeue}
            write_json_atomic(config["stop"].with_name(STOPPED_NAME), stopped)


@contextlib.contextmanager
def _watching(stop: Path, first: bool) -> Iterator[None]:
    """Watch for the driver's stop request. On rank 0 only: ranks agree to stop at every step."""
    if not first:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_S):
            if stop.exists() and ask_to_stop(requeue=stop.read_text() == "requeue"):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
