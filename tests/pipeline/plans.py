"""The batches of a run on one rank, as the tests of the order compare them, and a whole pass of a lane."""

from collections.abc import Iterator, Sequence

import numpy as np

from tinymim.configs.sections.loader import OrderConfig
from tinymim.pipeline.order import Items, SampleOrder, epoch_groups


def training_batches(
    counts: Sequence[int], order: OrderConfig, batch_size: int, num_views: int | None, first_step: int, last_step: int
) -> Iterator[Items]:
    """The batches of steps [first_step, last_step) of a run on one rank, each int64 [batch_size, 3]."""
    for items in numbered_batches(counts, order, batch_size, num_views, first_step, last_step):
        yield items[:, :3]


def numbered_batches(
    counts: Sequence[int], order: OrderConfig, batch_size: int, num_views: int | None, first_step: int, last_step: int
) -> Iterator[Items]:
    """As `training_batches`, with a running number from 0 at `first_step` as a fourth column [batch_size, 4]."""
    samples = SampleOrder(counts, order, batch_size, num_views)
    samples.step = first_step
    for _, items in samples.steps(last_step):
        yield items


def epoch_items(counts: Sequence[int], order: OrderConfig, epoch: int, lane: int = 0) -> Items:
    """All samples of a lane in one pass, int64 [n, 3]."""
    return np.concatenate([np.empty((0, 3), np.int64), *epoch_groups(counts, order, epoch, lane)])
