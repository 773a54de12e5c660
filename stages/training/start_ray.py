"""`cluster: ray`: the same workers, started by Ray Train wherever the cluster has room.

The run folder must be on storage that driver and workers share: rank 0 writes there, and after a restart another
machine may be rank 0. The driver asks for a stop by a file in it; the cache and the images must be reachable, too.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinymim.configs.errors import RecipeError, TinymimError, is_refusal
from tinymim.configs.schema import TrainingRecipe
from tinymim.stages.run.interrupt import Interrupted, ask_to_stop
from tinymim.stages.run.ray import join_ray
from tinymim.stages.training.ranks import backend_of, environment_ranks, joined
from tinymim.stages.training.start import R, Training, WorkersDied
from tinymim.storage.atomic import write_json_atomic

STOP_NAME = "stop-requested"  # the driver's wish
STOPPED_NAME = "stopped.json"  # rank 0's answer
_POLL_S = 1.0


class RayStart:
    """`workers` of a Ray cluster: of the one in RAY_ADDRESS, else of one on this machine for this run.

    Args:
        recipe: of the run.

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
            join_ray(include_dashboard=False)  # before our handlers of signals, of which it has its own
        os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # its print says every line twice
        self._file = recipe.run.folder.absolute() / STOP_NAME
        self._stopped = self._file.with_name(STOPPED_NAME)

    def __call__(self, train: Training[R], recipe: R) -> tuple[str, bool] | None:
        """As `tinymim.stages.training.start.Start` says."""
        import ray
        from ray.train import RunConfig, ScalingConfig, WorkerGroupError
        from ray.train.torch import TorchConfig, TorchTrainer

        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        with_gpus = recipe.run.device != "cpu" and resources.get("GPU", 0) > 0
        self._file.parent.mkdir(parents=True, exist_ok=True)
        for path in (self._file, self._stopped):
            path.unlink(missing_ok=True)
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"train": train, "recipe": recipe, "folder": os.getcwd(), "stop": self._file},
            torch_config=TorchConfig(backend=backend_of(with_gpus)),
            scaling_config=ScalingConfig(num_workers=recipe.workers, use_gpu=with_gpus),
            run_config=RunConfig(storage_path=str(self._file.parent / "ray")),  # its restarts are off by default
        )
        try:
            trainer.fit()
        except WorkerGroupError as failed:
            raise _reason(failed.worker_failures) from failed
        finally:
            self._file.unlink(missing_ok=True)
        if not self._stopped.exists():
            return None
        stopped = json.loads(self._stopped.read_text())
        self._stopped.unlink()
        return stopped["message"], stopped["requeue"]

    def stop(self, requeue: bool) -> bool:
        """As `tinymim.stages.training.start.Start` says; seen by rank 0 within a second."""
        self._file.write_text("requeue" if requeue else "")
        return True

    def kill(self) -> None:
        """Nothing to do: Ray ends a driver's workers with it."""


def _reason(failures: dict[int, Exception]) -> Exception:
    """What to raise for the workers' errors: the one that is ours, else that they died."""
    for error in failures.values():
        if isinstance(error, TinymimError) or is_refusal(error):
            return error
    rank, error = min(failures.items())
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return WorkersDied(f"worker {rank} failed: {lines[-1][:200]}")


def _worker(config: dict[str, Any]) -> None:
    """One rank, in a thread of a Ray worker."""
    os.chdir(config["folder"])  # relative paths of the recipe are the driver's
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
    """Meanwhile, rank 0 hands on the driver's wish to stop; it is agreed with the others."""
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
