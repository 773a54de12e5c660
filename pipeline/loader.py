"""Run a view source over a list of batches, in worker processes or in this one."""

import errno
import os
import signal
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tinymim.configs.errors import LoaderKilled, TinymimError, UserError, first_line
from tinymim.configs.sections.loader import LoaderConfig
from tinymim.pipeline.ahead import spooling
from tinymim.pipeline.dataset import ViewBatch, ViewSource
from tinymim.pipeline.order import Items
from tinymim.pipeline.workers import prepare_loader, worker_context

_MORE_MEMORY: Final = (
    "where memory is short, the system kills processes (`dmesg` shows it): lower loader.workers or loader.prefetch, or "
    "set loader.workers: 0; the same command continues from what was saved"
)
_MORE_SHARED_MEMORY: Final = (
    "enlarge /dev/shm (`docker run --shm-size=8g`), lower loader.workers, loader.prefetch or the batch size, or set "
    "loader.workers: 0"
)
_MORE_FILES: Final = "raise the limit of open files (`ulimit -n`), or lower loader.workers or loader.prefetch"
_SERVER_LOST: Final = 255  # the exit code of a worker whose fork server was killed: nobody knows the worker's own
_END_KNOWN_S: Final = 2.0  # a worker's connection is lost moments before its end is known

_Made = list[ViewBatch] | TinymimError  # the batches of an entry, or why there are none


class RankPart(Protocol):
    """The part of a source that stays in the rank's own process."""

    def prepared(self, plan: Iterable[Items]) -> Iterator[Items | TinymimError]:
        """The entries of a plan as the view source takes them; an error takes the place of an entry, for its turn."""
        ...

    def completed(self, made: list[ViewBatch], pin_memory: bool) -> list[ViewBatch]:
        """Complete the batches of the oldest entry that `prepared` gave and that is not completed."""
        ...


class _Adapter(Dataset[_Made]):
    """Hands whole item arrays through torch's map-style fetcher.

    Errors of ours come back as values: torch would rebuild them from a traceback text, without got, expected, hint.
    """

    def __init__(self, source: ViewSource) -> None:
        self.source = source

    def __getitems__(self, items: Items | TinymimError) -> _Made:
        try:
            made = items if isinstance(items, TinymimError) else _entry_batches(self.source, items)
            if get_worker_info() is not None and not isinstance(made, TinymimError):
                _share(made)
        except TinymimError as error:
            return error
        return made


def _share(made: list[ViewBatch]) -> None:
    """Move tensors to shared memory. torch would do it in a thread whose errors end in a lost batch and a wait for it.

    Raises:
        UserError: there is no room.
    """
    try:
        for batch in made:
            for tensor in (batch.pixels, batch.labels, batch.view_keys, *batch.records.values()):
                tensor.share_memory_()
    except RuntimeError as error:
        raise _no_room("a loader worker found no shared memory for a batch", error) from error


def _no_room(what: str, error: Exception) -> UserError:
    files = any(os.strerror(code) in str(error) for code in (errno.EMFILE, errno.ENFILE))
    return UserError(what, got=first_line(error), hint=_MORE_FILES if files else _MORE_SHARED_MEMORY)


def _as_is(batches: Any) -> Any:
    return batches


def _entry_batches(source: ViewSource, items: Items) -> list[ViewBatch]:
    """The batches of one entry of a plan: one of items [B, C], or n of [n, B, C] that share their decodes."""
    if items.ndim == 2:
        return [source.batch(items)]
    if len(items) == 1:
        return [source.batch(items[0])]
    # All views of an image next to each other: whoever renders them decodes it once.
    flat = items.reshape(-1, items.shape[2])
    by_image = np.lexsort((flat[:, 2], flat[:, 1], flat[:, 0]))
    wanted = flat[by_image]
    rendered = source.batch(wanted)
    places = np.full(len(flat), -1)
    places[by_image] = np.arange(len(flat)) if not rendered.unreadable else places_in(wanted[:, :3], rendered.items)
    return [rendered.pick(rows[rows >= 0]) for rows in places.reshape(items.shape[:2])]


def places_in(wanted: Items, found: Items) -> Items:
    """For every row of `wanted` [n, 3] its place in `found`, which leaves some out; -1 for those. int64 [n]."""
    place = {tuple(row): number for number, row in enumerate(found.tolist())}
    return np.array([place.get(tuple(row), -1) for row in wanted.tolist()], dtype=np.int64)


def batches(
    source: ViewSource,
    plan: Iterable[Items],
    config: LoaderConfig,
    pin_memory: bool = False,
    batches_per_entry: int = 1,
    look_ahead: bool = True,
    rank_part: RankPart | None = None,
) -> Generator[ViewBatch]:
    """Yield the batches of `plan` in its order, whatever the number of workers.

    Args:
        source: makes the batches, in this process or, pickled, in the workers.
        plan: entries of items [B, C] are one batch; entries [n, B, C] are n batches whose images are decoded once.
        config: `prefetch` batches, but at least one entry, are made ahead per worker; without workers none.
        pin_memory: for batches that go to a GPU.
        batches_per_entry: the largest n of the plan.
        look_ahead: whether the plan may be read far ahead of its batches, to spool the shards that come next.
        rank_part: the part of the source that is never in a worker; None: there is none.
    """
    with spooling(source.shards, plan, look_ahead) as (plan, done):
        entries = plan if rank_part is None else rank_part.prepared(plan)
        # Closed here, so that no error keeps the workers alive for as long as somebody looks at its traceback.
        with closing(_made(_Adapter(source), entries, config, pin_memory, batches_per_entry)) as loaded:
            for made in loaded:
                if isinstance(made, TinymimError):
                    raise made
                yield from made if rank_part is None else rank_part.completed(made, pin_memory)
                done()


def _made(
    adapter: _Adapter,
    entries: Iterable[Items | TinymimError],
    config: LoaderConfig,
    pin_memory: bool,
    batches_per_entry: int,
) -> Generator[_Made]:
    """What `adapter` makes of every entry, in their order."""
    if config.workers == 0:
        for made in map(adapter.__getitems__, entries):
            if pin_memory and not isinstance(made, TinymimError):
                yield [batch.pin_memory() for batch in made]
            else:
                yield made
        return
    loader = DataLoader(
        adapter,
        batch_sampler=entries,  # type: ignore[arg-type]  # an array of items is one entry for __getitems__
        num_workers=config.workers,
        prefetch_factor=-(-config.prefetch // batches_per_entry),
        collate_fn=_as_is,
        multiprocessing_context=worker_context([type(adapter.source).__module__]),
        worker_init_fn=prepare_loader,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the default one would be drawn from: workers must not change a training
    )
    try:
        loaded: Any = iter(loader)
    except OSError as error:
        raise _no_room("no loader worker can be started", error) from error
    workers = list(loaded._workers)
    try:
        yield from loaded
    except (RuntimeError, OSError, EOFError) as error:  # what torch and the connection to a dead worker raise
        if killed := _killed(workers):
            raise killed from error
        raise


def _killed(workers: Sequence[BaseProcess]) -> LoaderKilled | None:
    """The error for the first worker that a signal ended; None where all others live or ended by themselves."""
    wait([worker.sentinel for worker in workers], _END_KNOWN_S)
    for number, worker in enumerate(workers):
        code = worker.exitcode
        if code is not None and (code < 0 or code == _SERVER_LOST):
            name = "the end of its fork server" if code == _SERVER_LOST else signal.Signals(-code).name
            return LoaderKilled(
                f"a loader worker was killed by {name}",
                got=f"worker {number + 1} of {len(workers)}, process {worker.pid}",
                hint=_MORE_SHARED_MEMORY if code == -signal.SIGBUS else _MORE_MEMORY,
            )
    return None
