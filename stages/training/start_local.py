"""Workers on this machine, started by torch elastic (torchrun's launcher)."""

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tinymim.configs.errors import TinymimError, is_final, is_refusal
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.training.ranks import joined
from tinymim.stages.training.start import R, Training, WorkersDied

EXIT_STOPPED = 130


class LocalStart:
    """`workers` processes of this machine, by torch elastic."""

    def __call__(self, train: Training[R], recipe: R) -> tuple[str, bool] | None:
        """See `Start`."""
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
                # `_supervised` restarts, not elastic, which would also repeat errors that come again at every start.
                # Each restart has a new rendezvous, whose store holds nothing of the dead workers.
                max_restarts=0,
                logs_specs=DefaultLogsSpecs(log_dir=folder),  # otherwise elastic leaves a folder behind in /tmp
                # Elastic kills workers soon after a signal that it handles; `_SignalForwarder` lets them save first.
                signals_to_handle="SIGQUIT",
            )
            try:
                outcomes: dict[int, tuple[str, bool] | None] = elastic_launch(config, _worker)(train, recipe, errors)
            except ChildFailedError as failed:
                _raise_worker_error(errors)
                what = "; ".join(_described(rank, failure) for rank, failure in sorted(failed.failures.items()))
                raise WorkersDied(what) from RuntimeError(_tracebacks(failed))
        return outcomes[0]

    def stop(self, requeue: bool) -> bool:
        """See `Start`. Workers get SIGTERM in any case; the parent keeps `requeue`."""
        workers = self._workers()
        for worker in workers:
            worker.terminate()
        return bool(workers)

    def kill(self) -> None:
        """See `Start`."""
        for worker in self._workers():
            worker.kill()

    @staticmethod
    def _workers() -> list[SpawnProcess]:
        # Elastic spawns its workers; a loader's workers, if any are left, are not spawned.
        return [child for child in multiprocessing.active_children() if isinstance(child, SpawnProcess)]


def _worker(train: Training[R], recipe: R, errors: Path) -> tuple[str, bool] | None:
    """Train as one rank, in a process of its own; returns what `Start` returns."""
    rank = os.environ["RANK"]
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host name may resolve to an address gloo cannot reach
    try:
        with joined(recipe.run) as ranks:
            train(recipe, ranks)
    except Interrupted as interrupted:
        parent = multiprocessing.parent_process()
        if parent is None or not parent.is_alive():  # a dead parent stopped this rank, and nobody reads a result
            raise SystemExit(EXIT_STOPPED) from None
        return str(interrupted), interrupted.requeue
    except KeyboardInterrupt:
        raise SystemExit(EXIT_STOPPED) from None  # torch's wrapper treats a KeyboardInterrupt as success
    except Exception as error:
        if not isinstance(error, TinymimError) and not is_refusal(error):
            raise
        # Elastic passes on only text, and the parent must raise the error itself. Renamed when whole: elastic kills
        # the other ranks as soon as one has failed, perhaps while they write theirs.
        (errors / f"{rank}.partial").write_bytes(pickle.dumps(error))
        (errors / f"{rank}.partial").rename(errors / rank)
        raise SystemExit(getattr(error, "exit_code", 1)) from None
    return None


def _raise_worker_error(errors: Path) -> None:
    """Raise the error that a worker left, if any; the first of those that would come again at every restart."""
    paths = [path for path in sorted(errors.iterdir()) if path.suffix != ".partial"]
    left = [pickle.loads(path.read_bytes()) for path in paths]  # by our own workers, in a folder that only we can read
    for error in sorted(left, key=is_final, reverse=True):
        raise error


def _described(rank: int, failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        memory = ", as by the system where memory is short" if failure.exitcode == -signal.SIGKILL else ""
        return f"worker {rank} was killed by {failure.signal_name()}{memory}"
    message = failure.error_file_data.get("message")
    text = message["message"] if isinstance(message, dict) else f"exit code {failure.exitcode}"
    return f"worker {rank} failed: {text.splitlines()[0][:200]}"


def _tracebacks(failed: ChildFailedError) -> str:
    messages = [failure.error_file_data.get("message") for failure in failed.failures.values()]
    return "".join(message["extraInfo"]["py_callstack"] for message in messages if isinstance(message, dict))


@contextlib.contextmanager
def _torch_silent() -> Iterator[None]:
    """Silence torch's loggers: they print a traceback per failure, and tinymim prints the cause once."""
    loggers = [logging.getLogger(name) for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
