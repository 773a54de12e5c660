"""One process or many: `workers: N` starts a training N times on this machine, by torch elastic (torchrun's launcher).

The parent trains nothing. It hands signals on, starts all workers again where one was killed or has crashed, and
raises what they raise, so that a run on many workers ends like a run in one process.
"""

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Protocol, TypeVar

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tinymim.configs.errors import InternalError, TinymimError, is_refusal
from tinymim.configs.schema import FinetuneRecipe, PretrainMaeRecipe, TrainingRecipe, TrainStudentRecipe
from tinymim.stages.distributed import Ranks, joined, launched
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.run.progress import say

R = TypeVar("R", PretrainMaeRecipe, TrainStudentRecipe, FinetuneRecipe)
Training = Callable[[R, Ranks], None]
EXIT_STOPPED = 130


def on_ranks(train: Training[R], recipe: R) -> None:
    """Run `train(recipe, ranks)`: as the rank that this process was started as, here alone, or in `recipe.workers`.

    Args:
        train: a function of a module, so that workers can import it.
        recipe: its recipe.

    Raises:
        TinymimError, Interrupted: those of `train`, wherever it ran.
        InternalError: workers were killed or crashed more than `recipe.max_restarts` times.
    """
    if not launched() and (recipe.workers > 1 or recipe.cluster == "ray"):
        if recipe.cluster == "ray":
            from tinymim.stages.launch_ray import RayStart  # Ray Train is an extra

            _supervised(train, recipe, RayStart(recipe))
        else:
            _supervised(train, recipe, LocalStart())
        return
    with joined(recipe.run) as ranks:
        if recipe.workers not in (1, ranks.world_size):
            say(f"{recipe.stage}: {ranks.world_size} ranks were started, not by this command: workers says nothing")
        train(recipe, ranks)


class WorkersDied(Exception):
    """Workers were killed or crashed; an error of ours is never the reason. Its text says which and how."""


class Start(Protocol):
    """A way to start all workers, and to reach them."""

    def __call__(self, train: Training[R], recipe: R) -> tuple[str, bool] | None:
        """Run all workers to their end. Returns what a clean stop said, with its `requeue`; else None.

        Raises:
            TinymimError: a worker's.
            WorkersDied: of any other reason.
        """

    def stop(self, requeue: bool) -> bool:
        """Ask the workers to save and end; False: there are none."""

    def kill(self) -> None:
        """End them at once."""


def _supervised(train: Training[R], recipe: R, start: Start) -> None:
    began_with = _states(recipe)
    with _Forwarding(start) as stop:
        for restarts in range(recipe.max_restarts + 1):
            try:
                stopped = start(train, recipe)
            except WorkersDied as died:
                if stop.requested:  # while workers were starting, say
                    raise Interrupted("stopped; what was saved before is intact", stop.requeue) from None
                if restarts == recipe.max_restarts:
                    raise InternalError(
                        f"the workers failed {restarts + 1} times",
                        got=str(died),
                        hint=f"what was saved in {recipe.run.folder} is intact and the same command continues; "
                        "--debug shows more",
                    ) from died.__cause__
                say(f"{recipe.stage}: {died}; restart {restarts + 1} of {recipe.max_restarts} from the last state")
                recipe = resuming(recipe, began_with)
                continue
            if stopped is not None:
                message, requeue = stopped
                raise Interrupted(message, stop.requeue or (requeue and not stop.requested))
            return


def _states(recipe: TrainingRecipe) -> dict[Path, int]:
    """The states in the run folder, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in recipe.run.folder.glob("**/state*.pt")}


def resuming(recipe: R, began_with: dict[Path, int]) -> R:
    """The recipe of a restart: also a run that was begun anew goes on from what it has saved itself.

    Args:
        recipe: of the run.
        began_with: the states of earlier runs, which go, now that there are newer ones.
    """
    found = _states(recipe)
    if recipe.checkpoint.resume or found.items() <= began_with.items():
        return recipe
    for path in began_with:
        if found.get(path) == began_with[path]:
            path.unlink()
    return recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"resume": True})})


class LocalStart:
    """`workers` processes of this machine, by torch elastic."""

    def __call__(self, train: Training[R], recipe: R) -> tuple[str, bool] | None:
        """As `Start` says."""
        with tempfile.TemporaryDirectory(prefix="tinymim-workers-") as folder, _torch_silent():
            errors = Path(folder, "errors")
            errors.mkdir()
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=recipe.workers,
                run_id="tinymim",
                rdzv_backend="c10d",
                rdzv_endpoint="127.0.0.1:0",
                local_addr="127.0.0.1",
                # Restarts are ours and not elastic's, which cannot tell a crash from an error that comes again. Each
                # begins with a new rendezvous: nothing of the dead workers is left in its store.
                max_restarts=0,
                logs_specs=DefaultLogsSpecs(
                    log_dir=folder
                ),  # or it leaves one behind in the machine's temporary folder
                signals_to_handle="SIGQUIT",  # the others are `_Forwarding`'s: a worker may take its time to save
            )
            try:
                outcomes: dict[int, tuple[str, bool] | None] = elastic_launch(config, _worker)(train, recipe, errors)
            except ChildFailedError as failed:
                _raise_what_was_raised(errors)
                what = "; ".join(_described(rank, failure) for rank, failure in sorted(failed.failures.items()))
                raise WorkersDied(what) from RuntimeError(_tracebacks(failed))
        return outcomes[0]

    def stop(self, requeue: bool) -> bool:
        """As `Start` says; a worker knows SIGTERM only, what it was that came the parent remembers."""
        workers = self._workers()
        for worker in workers:
            worker.terminate()
        return bool(workers)

    def kill(self) -> None:
        """As `Start` says."""
        for worker in self._workers():
            worker.kill()

    @staticmethod
    def _workers() -> list[SpawnProcess]:
        # Elastic's workers are spawned; a loader's, if any are left, are not.
        return [child for child in multiprocessing.active_children() if isinstance(child, SpawnProcess)]


def _worker(train: Training[R], recipe: R, errors: Path) -> tuple[str, bool] | None:
    """One rank, in a process of its own. Returns what a clean stop said, with its `requeue`; None at the end."""
    rank = os.environ["RANK"]
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine; its host name may lead elsewhere
    try:
        with joined(recipe.run) as ranks:
            train(recipe, ranks)
    except Interrupted as interrupted:
        parent = multiprocessing.parent_process()
        if parent is None or not parent.is_alive():  # that is why: nobody waits for what is returned
            raise SystemExit(EXIT_STOPPED) from None
        return str(interrupted), interrupted.requeue
    except KeyboardInterrupt:
        raise SystemExit(EXIT_STOPPED) from None  # torch's wrapper would take it for a success
    except Exception as error:
        if not isinstance(error, TinymimError) and not is_refusal(error):
            raise
        (errors / f"{rank}.partial").write_bytes(pickle.dumps(error))
        (errors / f"{rank}.partial").rename(errors / rank)
        raise SystemExit(getattr(error, "exit_code", 1)) from None
    return None


def _raise_what_was_raised(errors: Path) -> None:
    """Raise the error of ours that a worker has left, if any: it would come again at every restart."""
    for path in sorted(errors.iterdir()):
        if path.suffix != ".partial":
            raise pickle.loads(path.read_bytes())  # written by our own worker, in a folder that only we can read


def _described(rank: int, failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"worker {rank} was killed by {failure.signal_name()}"
    message = failure.error_file_data.get("message")
    text = message["message"] if isinstance(message, dict) else f"exit code {failure.exitcode}"
    return f"worker {rank} failed: {text.splitlines()[0][:200]}"


def _tracebacks(failed: ChildFailedError) -> str:
    messages = [failure.error_file_data.get("message") for failure in failed.failures.values()]
    return "".join(message["extraInfo"]["py_callstack"] for message in messages if isinstance(message, dict))


class _Forwarding:
    """Context manager of the parent: the first SIGINT or SIGTERM goes to the workers, which save; a second kills them.

    A terminal sends its Ctrl-C, and a batch system its SIGTERM, to the workers as well: they count one signal only.
    """

    def __init__(self, start: Start) -> None:
        self.requested = self.requeue = False
        self._start = start
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "_Forwarding":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            self._start.kill()
            raise KeyboardInterrupt
        self.requested, self.requeue = True, number == signal.SIGTERM
        say(f"{signal.Signals(number).name} received: finishing the step at hand and saving (again to stop at once)")
        if not self._start.stop(self.requeue):
            raise Interrupted("stopped before it had begun", self.requeue)


@contextlib.contextmanager
def _torch_silent() -> Iterator[None]:
    """torch reports every failure by tracebacks of its own; what went wrong is said here, once."""
    loggers = [logging.getLogger(name) for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
