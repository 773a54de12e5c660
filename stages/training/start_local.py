"""Workers on this machine, started by torch elastic (torchrun's launcher)."""

import contextlib
import logging
import multiprocessing
import os
import pickle
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tinymim.configs.errors import TinymimError, is_refusal
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.training.ranks import joined
from tinymim.stages.training.start import R, Training, WorkersDied

EXIT_STOPPED = 130


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
                logs_specs=DefaultLogsSpecs(log_dir=folder),  # otherwise it leaves a folder behind in /tmp
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
