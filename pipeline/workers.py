"""Worker processes, for the loader and for drawing: one way to start them."""

import multiprocessing
import signal
from multiprocessing.context import BaseContext

import torch


def worker_context() -> BaseContext:
    """forkserver: fork hangs once a thread of the parent holds a lock (zarr's and torch's do).

    The server imports what workers need once, so that each further worker starts in milliseconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tinymim.pipeline.replay", "tinymim.pipeline.drawn"])
    return context


def prepare_worker(_worker: int = 0) -> None:
    """Run first in every worker."""
    # Workers are the parallelism; torch's own threads would only fight over the cores.
    torch.set_num_threads(1)
    # Ctrl-C goes to the whole process group; the parent decides when the workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
