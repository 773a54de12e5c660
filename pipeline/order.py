"""The order of samples: a function of (seed, epoch) alone, whatever the number of workers (I10).

Shards are permuted, then cut into groups of `shuffle_units`; the samples of one group are permuted together.
A reader thus needs the records of a few units at a time and reads each of them front to back (I9).
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tinymim.configs.schema import OrderConfig

Items = npt.NDArray[np.int64]  # [samples, 3]: shard index, sample index within the shard, view index


def _permutation(length: int, *identity: object) -> npt.NDArray[np.int64]:
    """A permutation of range(length), named by `identity`.

    Philox's raw stream is fixed by its definition; numpy's `permutation` may change between versions.
    """
    digest = hashlib.blake2b("/".join(map(str, identity)).encode(), digest_size=16, person=b"tinymim/order").digest()
    raw = np.random.Philox(key=int.from_bytes(digest, "big")).random_raw(length)
    return np.argsort(raw, kind="stable")


def epoch_items(counts: Sequence[int], order: OrderConfig, epoch: int, view: int) -> Items:
    """All samples of one epoch in training order.

    Args:
        counts: samples per shard.
        order: seed and mixing width.
        epoch: epoch number from 0.
        view: the view index that this epoch uses.

    Returns:
        int64 [sum(counts), 3].
    """
    units = _permutation(len(counts), "units", order.seed, epoch)
    groups = []
    for start in range(0, len(units), order.shuffle_units):
        group = units[start : start + order.shuffle_units]
        rows = np.concatenate(
            [np.stack([np.full(counts[u], u), np.arange(counts[u]), np.full(counts[u], view)], axis=1) for u in group]
        )
        groups.append(rows[_permutation(len(rows), "samples", order.seed, epoch, start)])
    return np.concatenate(groups).astype(np.int64)


def steps_per_epoch(counts: Sequence[int], batch_size: int) -> int:
    """Whole batches of one epoch; the remainder is dropped (it changes from epoch to epoch)."""
    return sum(counts) // batch_size


def training_batches(
    counts: Sequence[int], order: OrderConfig, batch_size: int, num_views: int | None, first_step: int, last_step: int
) -> Iterator[Items]:
    """The batches of steps [first_step, last_step), each int64 [batch_size, 3].

    Epoch e uses view e mod `num_views`; with `num_views=None` views never repeat (epoch e uses view e).
    """
    per_epoch = steps_per_epoch(counts, batch_size)
    step = first_step
    while step < last_step:
        epoch, offset = divmod(step, per_epoch)
        items = epoch_items(counts, order, epoch, epoch if num_views is None else epoch % num_views)
        for index in range(offset, min(per_epoch, offset + last_step - step)):
            yield items[index * batch_size : (index + 1) * batch_size]
            step += 1


def numbered_batches(
    counts: Sequence[int], order: OrderConfig, batch_size: int, num_views: int, first_step: int, last_step: int
) -> Iterator[Items]:
    """As `training_batches`, with a running number as a fourth column [batch_size, 4].

    Numbers start from 0 at `first_step`: a run that resumes elsewhere checks its first views like a new one.
    """
    plan = training_batches(counts, order, batch_size, num_views, first_step, last_step)
    for step, items in enumerate(plan):
        numbers = np.arange(step * batch_size, (step + 1) * batch_size)
        yield np.concatenate([items, numbers[:, None]], axis=1)


def view_batches(unit: int, num_samples: int, views: Sequence[int], images_per_batch: int) -> Iterator[Items]:
    """Every one of `views` of every sample of one shard, in tar order; the views of an image are adjacent.

    Yields:
        int64 [images x views, 3] per batch; the last one may be shorter.
    """
    for start in range(0, num_samples, images_per_batch):
        samples = np.arange(start, min(start + images_per_batch, num_samples))
        rows = np.repeat(samples, len(views))
        columns = [np.full(len(rows), unit), rows, np.tile(np.asarray(views), len(samples))]
        yield np.stack(columns, axis=1).astype(np.int64)
