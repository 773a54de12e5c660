"""Run a view source over a list of batches, in worker processes or in this one."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from tinymim.configs.errors import TinymimError
from tinymim.configs.schema import LoaderConfig
from tinymim.pipeline.dataset import ViewBatch, ViewSource
from tinymim.pipeline.order import Items
from tinymim.pipeline.workers import prepare_worker, worker_context


class _Adapter(Dataset[ViewBatch | TinymimError]):
    """Hands whole item arrays through torch's map-style fetcher.

    Errors of ours come back as values: torch would rebuild them from a traceback text, without got, expected, hint.
    """

    def __init__(self, source: ViewSource) -> None:
        self.source = source

    def __getitems__(self, items: Items) -> ViewBatch | TinymimError:
        try:
            return self.source.batch(items)
        except TinymimError as error:
            return error


def _as_is(batch: Any) -> Any:
    return batch


def batches(
    source: ViewSource, plan: Iterable[Items], config: LoaderConfig, pin_memory: bool = False
) -> Iterator[ViewBatch]:
    """Yield one ViewBatch per entry of `plan`, in the plan's order whatever the number of workers."""
    if config.workers == 0:
        for items in plan:
            batch = source.batch(items)
            yield batch.pin_memory() if pin_memory else batch
        return
    loaded: DataLoader[ViewBatch | TinymimError] = DataLoader(
        _Adapter(source),
        batch_sampler=plan,  # type: ignore[arg-type]  # an array of items is one batch for __getitems__
        num_workers=config.workers,
        prefetch_factor=config.prefetch,
        collate_fn=_as_is,
        multiprocessing_context=worker_context(),
        worker_init_fn=prepare_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the default one would be drawn from: workers must not change a training
    )
    for batch in loaded:
        if isinstance(batch, TinymimError):
            raise batch
        yield batch
