"""Worker processes, for the loader and for drawing: one way to start them."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess

import torch

_GRACE_S = 30


def worker_context() -> BaseContext:
    """forkserver: fork hangs once a thread of the parent holds a lock (zarr's and torch's do).

    The server imports what workers need once, so that each further worker starts in milliseconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tinymim.pipeline.replay", "tinymim.pipeline.drawn"])
    return context


def prepare_loader(worker: int) -> None:
    """Run first in every worker of a loader."""
    prepare_worker(worker)
    # A batch system sends its SIGTERM to all processes, and the training still takes a batch until it has saved. A
    # loader that is done ends its workers by other means; SIGTERM is its last resort.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    """Wait for the end of the process that the batches are for, and end.

    torch's own watchdog looks at the fork server, and that one lives for as long as any of its children does: after a
    SIGKILL of the training both would wait for ever.
    """
    parent.join()
    os._exit(1)


def prepare_worker(_worker: int = 0) -> None:
    """Run first in every worker."""
    # Workers are the parallelism; torch's own threads would only fight over the cores.
    torch.set_num_threads(1)
    # Ctrl-C goes to the whole process group; the parent decides when the workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
