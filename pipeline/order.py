"""The order of samples: a function of (seed, epoch), independent of the number of workers and ranks (I10).

Shards are permuted and dealt to lanes. Every lane cuts its shards into groups of `shuffle_units` and permutes the
samples of a group together. A batch takes equally many samples from every lane, and a rank takes whole lanes. A rank
thus needs the records of a few units at a time and reads each of them once per pass (I9). Groups are permuted when they
are needed, so an epoch starts at once, whatever its length. docs/decisions/007-order.md gives the reasons.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from tinymim.configs.errors import RecipeError
from tinymim.configs.sections.loader import OrderConfig
from tinymim.storage.atomic import canonical_json, digest_hex
from tinymim.storage.identity import Identity

Items = npt.NDArray[np.int64]  # [samples, 3]: shard index, sample index within the shard, view index
# By shard and view, the partner of every sample of the shard, its own number where it has none: int64 [samples].
PartnersOf = Callable[[int, int], npt.NDArray[np.int64]]
_WHOLE = 2**32  # the share 1


def _permutation(length: int, *identity: object) -> npt.NDArray[np.int64]:
    """A permutation of range(length), seeded by `identity`.

    It uses Philox's raw stream, which is fixed by definition; numpy's `permutation` may change between versions.
    """
    digest = hashlib.blake2b("/".join(map(str, identity)).encode(), digest_size=16, person=b"tinymim/order").digest()
    raw = np.random.Philox(key=int.from_bytes(digest, "big")).random_raw(length)
    return np.argsort(raw, kind="stable")


def _beside(rows: Items, partners: PartnersOf, view: int) -> Items:
    """The samples with every second partner of `view` moved up behind the first one, so that they share decodes."""
    first = np.arange(len(rows))
    for shard in np.unique(rows[:, 0]).tolist():
        at, of_shard = np.flatnonzero(rows[:, 0] == shard), partners(shard, view)
        places = np.full(len(of_shard), len(rows))
        places[rows[at, 1]] = at
        first[at] = np.minimum(at, places[of_shard[rows[at, 1]]])
    return rows[np.argsort(first, kind="stable")]


def epoch_groups(
    counts: Sequence[int],
    order: OrderConfig,
    epoch: int,
    lane: int = 0,
    skip: int = 0,
    partners: PartnersOf | None = None,
    view: int = 0,
) -> Iterator[Items]:
    """The samples of one lane in one pass over the images, in training order, group by group.

    Lanes are cut by samples, not by shards, so that all are equally long. Neighbouring lanes may share a shard. The
    next group is permuted when it is needed; in memory are one group, and some integers per shard.

    Args:
        counts: samples per shard.
        order: seed, `shuffle_units` and number of lanes.
        epoch: index of the pass, from 0.
        lane: lane index, below `order.lanes`.
        skip: samples to leave out at the beginning; groups that end before it cost nothing.
        partners: the pairs of a view law, which then stand next to each other.
        view: the view of which they are pairs.

    Yields:
        int64 [n, 3] with view 0; the samples of all lanes sum to sum(counts), those of two lanes differ by at most one.
    """
    units = _permutation(len(counts), "units", order.seed, epoch)
    sizes = np.asarray(counts, dtype=np.int64)[units]
    begins = np.cumsum(sizes) - sizes
    low, high = (int(sizes.sum()) * end // order.lanes for end in (lane, lane + 1))
    first, end = (np.clip(edge - begins, 0, sizes) for edge in (low, high))
    kept = np.flatnonzero((end > first) | (order.lanes == 1))
    name: tuple[object, ...] = () if order.lanes == 1 else ("lane", lane)
    before = np.concatenate([[0], np.cumsum((end - first)[kept])])
    for start in range(0, len(kept), order.shuffle_units):
        group = kept[start : start + order.shuffle_units]
        begin, stop = before[start], before[start + len(group)]
        if stop <= skip:
            continue
        samples = [np.arange(first[unit], end[unit]) for unit in group]
        shards = np.repeat(units[group], [len(each) for each in samples])
        rows = np.stack([shards, np.concatenate(samples), np.zeros(len(shards), np.int64)], axis=1)
        rows = rows[_permutation(len(rows), "samples", order.seed, epoch, start, *name)]
        rows = rows if partners is None else _beside(rows, partners, view)
        yield rows[max(0, skip - begin) :]


def _runs(groups: Iterator[Items], length: int) -> Iterator[Items]:
    """The samples of `groups` in runs of `length`, int64 [length, 3]; a shorter rest is left out."""
    held = np.empty((0, 3), dtype=np.int64)
    for group in groups:
        held = np.concatenate([held, group])
        whole = len(held) // length * length
        yield from held[:whole].reshape(-1, length, 3)
        held = held[whole:]


def steps_per_epoch(counts: Sequence[int], batch_size: int) -> int:
    """Whole batches of one view per image. The remainder is dropped; it differs from epoch to epoch."""
    return sum(counts) // batch_size


class SampleOrder:
    """The batches of one rank, step by step. Its only state is the number of steps done.

    An epoch is one or more passes over the images. A pass uses k = `views_per_decode` views of every image: k batches
    in a row hold the same images, each batch with another view. Every batch thus has distinct images. Pass p uses the
    views (p * k + j) mod `num_views`, j < k. The batches over all ranks are the same for every number of ranks.

    Args:
        counts: samples per shard.
        order: the recipe's section.
        batch_size: samples of a step over all ranks.
        num_views: views per image; None: unlimited, no view repeats.
        rank: index of this rank, below `world_size`.
        world_size: number of ranks.
        partners: the pairs of the view law. With one view a decode, partners stand next to each other in a batch.
        fresh: share of the views that are new. A shard's new views are `num_views`, `num_views` + 1, ... in turn; none
            comes twice. In between it goes on with the first `num_views`.

    Attributes:
        step: number of steps done. The caller sets it, since a loader takes batches ahead of training.
        steps_per_epoch: whole batches of an epoch.
        places: int64 [samples of this rank], the place of each of them in the batch over all ranks. Draws that depend
            on this place are the same for every number of ranks.

    Raises:
        RecipeError: lanes, ranks, views and batch size do not divide each other.
    """

    def __init__(
        self,
        counts: Sequence[int],
        order: OrderConfig,
        batch_size: int,
        num_views: int | None,
        rank: int = 0,
        world_size: int = 1,
        partners: PartnersOf | None = None,
        fresh: float = 0.0,
    ) -> None:
        assert 0 <= rank < world_size
        _refuse_misfit(order, batch_size, num_views, world_size)
        self.counts, self.order, self.batch_size, self.num_views = list(counts), order, batch_size, num_views
        # Several views of an image have several partners, and no order brings all of them together.
        self.partners = partners if order.views_per_decode == 1 else None
        # By shard, so that a pass reads whole slices of the others. Phases are evenly spread over the shards: every
        # pass renders the same share of them anew. Integers, so that no rounding differs between machines.
        self._fresh, self._phases = round(fresh * _WHOLE), np.zeros(0, np.int64)
        if self._fresh and num_views is not None:
            self._phases = _permutation(len(counts), "fresh", order.seed) * _WHOLE // len(counts)
        self.lanes = range(rank, order.lanes, world_size)
        lane_size = batch_size // order.lanes
        self.places: npt.NDArray[np.int64] = np.concatenate(
            [np.arange(lane * lane_size, (lane + 1) * lane_size) for lane in self.lanes]
        )
        views = num_views if order.views_per_epoch == "all" else order.views_per_epoch
        assert views is not None  # refused above
        self.steps_per_epoch = steps_per_epoch(counts, batch_size) * views
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """The plain values "step", "identity" and "fields", equal on every rank."""
        return {"step": self.step, **self._identity().stated()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume after the steps of `state`, which may come from any number of ranks.

        Raises:
            CheckpointError: the state belongs to another order.
        """
        self._identity().require(
            state,
            "the saved order of samples belongs to another recipe or cache",
            "resume with the source, cache, num_views, optim.batch_size and `order` of the saved run",
        )
        self.step = int(state["step"])

    def plan(self, last_step: int) -> Iterator[Items]:
        """The batches from `step` up to `last_step` (exclusive). The batches of one decode come together.

        Yields:
            int64 [batches, samples of this rank, 4]: shard, sample, view, and a running number. The number starts at 0
            in the first batch, so that a resumed run checks its first views, too.
        """
        first = step = self.step
        at_once = self.order.views_per_decode
        per_pass = steps_per_epoch(self.counts, self.batch_size) * at_once
        while step < last_step:
            number, offset = divmod(step, per_pass)
            count, skipped = self.batch_size // self.order.lanes, offset // at_once
            pairs = self.partners, number if self.num_views is None else number % self.num_views
            groups = [
                epoch_groups(self.counts, self.order, number, lane, skipped * count, *pairs) for lane in self.lanes
            ]
            images = zip(*(_runs(lane, count) for lane in groups), strict=False)  # lanes differ by a sample
            for chunk, parts in enumerate(islice(images, per_pass // at_once - skipped), start=skipped):
                done = step - number * per_pass - chunk * at_once  # above 0 if the run stopped within this chunk
                views = range(done, min(at_once, done + last_step - step))
                items = np.stack([self._batch(parts, number, chunk, view) for view in views])
                numbers = np.arange(items.shape[0] * items.shape[1]) + (step - first) * items.shape[1]
                yield np.concatenate([items, numbers.reshape(*items.shape[:2], 1)], axis=2)
                step += len(items)
                if step == last_step:
                    return

    def steps(self, last_step: int) -> Iterator[tuple[int, Items]]:
        """`plan` batch by batch: the step and its items, int64 [samples of this rank, 4]."""
        step = self.step
        for entry in self.plan(last_step):
            for items in entry:
                yield step, items
                step += 1

    def whole_batch(self, step: int) -> Items:
        """The samples of one step over all ranks, int64 [batch_size, 3], in the order of a single rank."""
        order = SampleOrder(
            self.counts,
            self.order,
            self.batch_size,
            self.num_views,
            partners=self.partners,
            fresh=self._fresh / _WHOLE,
        )
        order.step = step
        return next(order.plan(step + 1))[0, :, :3]

    @property
    def slices_per_lane(self) -> int:
        """The number of slices, one view of one shard each, that samples of one lane are taken from at a time."""
        return self.order.shuffle_units * self.order.views_per_decode

    def _batch(self, images: Sequence[Items], number: int, chunk: int, view: int) -> Items:
        """View `view` of a chunk's images, given by lane; int64 [samples of this rank, 3]."""
        name = ("batch", self.order.seed, number, chunk, view)
        if view:
            lanes = zip(self.lanes, images, strict=True)
            images = [part[_permutation(len(part), *name, lane)] for lane, part in lanes]
        batch = np.concatenate(images)
        index = number * self.order.views_per_decode + view
        batch[:, 2] = index if self.num_views is None else index % self.num_views
        if len(self._phases) and self.num_views is not None:
            before, after = ((each * self._fresh + self._phases[batch[:, 0]]) // _WHOLE for each in (index, index + 1))
            batch[:, 2] = np.where(after > before, self.num_views + before, (index - before) % self.num_views)
        return batch

    def _identity(self) -> Identity:
        named = {
            "order": self.order.model_dump(mode="json"),
            "images by shard": self.counts,
            "batch_size": self.batch_size,
            "num_views": self.num_views,
            "pairs": self.partners is not None,
            "fresh": self._fresh / _WHOLE,
        }
        fields = [named["order"], self.counts, self.batch_size, self.num_views]
        fields += [] if self.partners is None else ["pairs"]
        fields += [self._fresh] if self._fresh else []
        return Identity(digest_hex(canonical_json({"order": fields})), named)


def _refuse_misfit(order: OrderConfig, batch_size: int, num_views: int | None, world_size: int) -> None:
    """Raises RecipeError if lanes, ranks, views or batch size do not divide each other."""
    if batch_size % order.lanes:
        raise RecipeError(
            "order.lanes does not divide optim.batch_size",
            got=f"{order.lanes} lanes, batches of {batch_size}",
            hint="choose a multiple of order.lanes: every batch takes equally many samples of every lane",
        )
    if order.lanes % world_size:
        raise RecipeError(
            "the number of ranks does not divide order.lanes",
            got=f"{world_size} ranks, {order.lanes} lanes",
            hint="start on a number of ranks that divides order.lanes; it is fixed for the whole run",
        )
    if num_views is None:
        if order.views_per_epoch == "all":
            raise RecipeError(
                "order.views_per_epoch is all, but this run draws new views without end",
                got="all",
                expected="a number of views",
            )
        return
    for name, used in (("views_per_decode", order.views_per_decode), ("views_per_epoch", order.views_per_epoch)):
        if used != "all" and used > num_views:
            raise RecipeError(f"order.{name} is more than the cache holds", got=used, expected=f"at most {num_views}")
    if order.views_per_epoch == "all" and num_views % order.views_per_decode:
        raise RecipeError(
            "order.views_per_decode does not divide the number of cached views",
            got=f"{order.views_per_decode} of {num_views} views",
            expected="a divisor, because order.views_per_epoch is all",
        )


def view_batches(unit: int, num_samples: int, views: Sequence[int], images_per_batch: int) -> Iterator[Items]:
    """All `views` of all samples of one shard, in tar order. The views of an image are adjacent.

    Yields:
        Batches, int64 [images x views, 3]; the last one may be shorter.
    """
    for start in range(0, num_samples, images_per_batch):
        samples = np.arange(start, min(start + images_per_batch, num_samples))
        rows = np.repeat(samples, len(views))
        columns = [np.full(len(rows), unit), rows, np.tile(np.asarray(views), len(samples))]
        yield np.stack(columns, axis=1).astype(np.int64)
