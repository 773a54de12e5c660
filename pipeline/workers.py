"""Worker processes, for the loader and for drawing: one way to start them. Imports no torch."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess

_GRACE_S = 30
# What workers need; neither timm nor torchvision is part of it, which take longer to import than torch.
PRELOADED = ("tinymim.pipeline.loader", "tinymim.pipeline.replay", "tinymim.pipeline.drawn")


def worker_context(also: Sequence[str] = ()) -> BaseContext:
    """forkserver: fork hangs once a thread of the parent holds a lock (zarr's and torch's do).

    The server imports what workers need once, so that each further worker starts in milliseconds. `also` as in
    `start_server`.
    """
    start_server(also)
    return multiprocessing.get_context("forkserver")


def start_server(also: Sequence[str] = ()) -> None:
    """Start the fork server, where there is none yet. It imports what workers need while this process goes on.

    Args:
        also: modules that workers need beyond `PRELOADED`.
    """
    multiprocessing.set_forkserver_preload([*PRELOADED, *also])
    resource_tracker.ensure_running()  # otherwise the server starts it, and unblocks the signal
    # Ctrl-C goes to the whole process group, and the server ignores it only once it has imported everything.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


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
    import torch  # not above: `start_server` is called before this process imports it

    # Workers are the parallelism; torch's own threads would only fight over the cores.
    torch.set_num_threads(1)
    # Ctrl-C goes to the whole process group; the parent decides when the workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
