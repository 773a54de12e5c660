"""Lanes, several views of one decode, and resumed epochs: equal for any number of workers and ranks."""

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from tinymim.configs.errors import CheckpointError, RecipeError
from tinymim.configs.sections.loader import LoaderConfig, OrderConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.views import ViewConfig
from tinymim.pipeline import order as order_module
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import Items, SampleOrder, _permutation, epoch_groups
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.tests.pipeline.plans import epoch_items, training_batches

COUNTS = [7, 1, 12, 5, 9, 0, 14]  # 48
Sample = tuple[int, int, int]


def order_of(ranks: int, rank: int, counts: list[int] = COUNTS, batch_size: int = 8, **config: Any) -> SampleOrder:
    fields = {"shuffle_units": 2, "lanes": 4, "views_per_decode": 2, "views_per_epoch": "all"} | config
    return SampleOrder(counts, OrderConfig.model_validate(fields), batch_size, 4, rank, ranks)


def samples(batch: Items) -> list[Sample]:
    return [(int(unit), int(sample), int(view)) for unit, sample, view in batch[:, :3]]


def global_steps(ranks: int, state: dict[str, Any] | None, last_step: int, **config: Any) -> list[Counter[Sample]]:
    """The samples of every remaining step over all ranks, each restored from `state`."""
    found: list[Counter[Sample]] = []
    for rank in range(ranks):
        order = order_of(ranks, rank, **config)
        if state is not None:
            order.load_state_dict(state)
        steps = list(order.steps(last_step))
        assert [step for step, _ in steps] == list(range(order.step, last_step))
        found = found or [Counter() for _ in steps]
        for seen, (_, items) in zip(found, steps, strict=True):
            assert len(items) == 8 // ranks  # split evenly
            seen.update(samples(items))
    return found


def every(counts: Iterable[int], views: int) -> Counter[Sample]:
    return Counter((u, s, v) for u, count in enumerate(counts) for s in range(count) for v in range(views))


# ---------------------------------------------------------------- the rest of an epoch


@pytest.mark.parametrize("ranks_after", [1, 2, 4])
@pytest.mark.parametrize("ranks_before", [1, 2, 4])
def test_stopped_at_every_step_the_rest_is_the_same_for_any_ranks(ranks_before: int, ranks_after: int) -> None:
    last = order_of(1, 0).steps_per_epoch
    assert last == 24
    whole = global_steps(ranks_before, None, last)
    assert sum(whole, Counter()) == every(COUNTS, 4)  # none twice, none missing
    for step in range(last + 1):
        stopped = order_of(ranks_before, 0)
        stopped.step = step
        rest = global_steps(ranks_after, stopped.state_dict(), last)
        assert rest == whole[step:] or (step == last and rest == [])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # fewer cores here
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_an_epoch_continued_with_other_workers_and_ranks_is_the_epoch(
    workers: int, ranks: int, drawn_shards: Path
) -> None:
    source = open_shards(SourceConfig(shards=drawn_shards))
    views = ImageViews(source.shards, RandomViews(ViewConfig(size=8)))
    orders = [order_of(ranks, rank, source.counts, 20, views_per_epoch=2) for rank in range(ranks)]
    last = orders[0].steps_per_epoch
    whole = [samples(items) for _, items in order_of(1, 0, source.counts, 20, views_per_epoch=2).steps(last)]
    assert sum(map(Counter, whole), Counter()) == every(source.counts, 2) and last == 6
    for step in range(last):
        stopped = order_of(1, 0, source.counts, 20, views_per_epoch=2)
        stopped.step = step
        rest: list[Counter[Sample]] = [Counter() for _ in range(step, last)]
        for order in orders:
            order.load_state_dict(stopped.state_dict())
            loader = LoaderConfig(workers=workers, prefetch=1)
            stream = batches(views, order.plan(last), loader, batches_per_entry=2)
            for seen, batch in zip(rest, stream, strict=True):
                seen.update(samples(batch.items))
        assert rest == [Counter(batch) for batch in whole[step:]]


def test_what_a_loader_takes_ahead_is_not_done() -> None:
    order = order_of(1, 0)
    plan = order.plan(10)
    next(plan), next(plan)
    assert order.state_dict()["step"] == 0


@pytest.mark.parametrize("change", [{"lanes": 2}, {"shuffle_units": 3}, {"counts": [48]}, {"batch_size": 4}])
def test_a_state_of_another_order_is_refused(change: dict[str, Any]) -> None:
    [name] = change
    field = "images by shard" if name == "counts" else name
    with pytest.raises(CheckpointError, match=rf"order of samples(.|\n)*{field} = (.|\n)*{field} = .* \(wanted\)"):
        order_of(1, 0, **change).load_state_dict(order_of(1, 0).state_dict())


# ---------------------------------------------------------------- lanes and ranks


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 8])
def test_lanes_are_equally_long_and_hold_every_sample_once(lanes: int) -> None:
    config = OrderConfig(lanes=lanes, shuffle_units=2)
    parts = [epoch_items(COUNTS, config, 3, lane) for lane in range(lanes)]
    assert sum((Counter(samples(part)) for part in parts), Counter()) == every(COUNTS, 1)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_rank_reads_only_the_shards_of_its_lanes() -> None:
    counts = [10] * 16
    seen = [
        {u for _, items in order_of(4, rank, counts, views_per_epoch=2).steps(40) for u, _, _ in samples(items)}
        for rank in range(4)
    ]
    assert [len(units) for units in seen] == [4, 4, 4, 4] and len(set.union(*seen)) == 16


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_ranks_places_are_where_one_rank_has_its_samples(ranks: int) -> None:
    orders = [order_of(ranks, rank) for rank in range(ranks)]
    assert sorted(place for order in orders for place in order.places.tolist()) == list(range(8))
    for order in orders:
        for step, items in order.steps(30):
            whole = order.whole_batch(step)
            assert samples(items) == samples(whole[order.places])
            assert order.step == 0  # reading a batch is not a step


def test_numbers_count_a_ranks_own_views() -> None:
    order = order_of(2, 1)
    order.step = 5  # in the middle of a chunk
    numbers = np.concatenate([items[:, 3] for _, items in order.steps(12)])
    np.testing.assert_array_equal(numbers, np.arange(7 * 4))


# ---------------------------------------------------------------- several views of one decode


def test_every_batch_has_distinct_images_and_only_the_batches_of_a_chunk_share_them() -> None:
    steps = [samples(items) for _, items in order_of(1, 0, shuffle_units=8).steps(24)]
    images = [[(unit, sample) for unit, sample, _ in batch] for batch in steps]
    assert all(len(set(batch)) == 8 for batch in images)
    for first in range(0, 24, 2):
        assert set(images[first]) == set(images[first + 1]) and images[first] != images[first + 1]
        assert {v for batch in steps[first : first + 2] for _, _, v in batch} == {0, 1} if first < 12 else {2, 3}
    assert len({image for batch in images[:12:2] for image in batch}) == 48  # a pass shows every image once


def test_an_entry_of_the_plan_is_a_chunk_and_a_resumed_one_its_rest() -> None:
    order = order_of(1, 0)
    assert [entry.shape for entry in order.plan(5)] == [(2, 8, 4), (2, 8, 4), (1, 8, 4)]
    whole = np.concatenate(list(order.plan(6)))
    order.step = 1
    rest = list(order.plan(6))
    assert [len(entry) for entry in rest] == [1, 2, 2]
    np.testing.assert_array_equal(np.concatenate(rest)[:, :, :3], whole[1:, :, :3])


def test_a_number_of_views_per_epoch_goes_on_with_the_next_ones() -> None:
    order = order_of(1, 0, views_per_decode=1, views_per_epoch=3)
    epochs = [order.steps_per_epoch * e for e in range(4)]
    views = [{int(v) for v in items[:, 2]} for _, items in order.steps(4 * order.steps_per_epoch)]
    assert [set.union(*views[start : start + 18]) for start in epochs] == [{0, 1, 2}, {3, 0, 1}, {2, 3, 0}, {1, 2, 3}]


def test_endless_views_never_repeat() -> None:
    order = SampleOrder(COUNTS, OrderConfig(views_per_decode=2, views_per_epoch=2), 8, None)
    seen = Counter(sample for _, items in order.steps(3 * order.steps_per_epoch) for sample in samples(items))
    assert max(seen.values()) == 1 and {view for _, _, view in seen} == set(range(6))


def test_one_view_and_one_lane_is_the_order_of_old() -> None:
    plan = list(SampleOrder(COUNTS, OrderConfig(), 8, 2).plan(14))
    assert {entry.shape for entry in plan} == {(1, 8, 4)}
    expected = list(training_batches(COUNTS, OrderConfig(), 8, 2, 0, 14))
    np.testing.assert_array_equal(np.concatenate(plan)[:, :, :3], np.stack(expected))


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("config", "num_views", "ranks", "match"),
    [
        ({"lanes": 3}, 4, 1, "lanes does not divide optim.batch_size"),
        ({"lanes": 4}, 4, 3, "ranks does not divide order.lanes"),
        ({}, 4, 2, "ranks does not divide order.lanes"),
        ({"views_per_decode": 8, "views_per_epoch": 8}, 4, 1, "views_per_decode is more than the cache holds"),
        ({"views_per_epoch": 8}, 4, 1, "views_per_epoch is more than the cache holds"),
        ({"views_per_decode": 3, "views_per_epoch": "all"}, 4, 1, "does not divide the number of cached views"),
        ({"views_per_epoch": "all"}, None, 1, "new views without end"),
    ],
)
def test_what_does_not_divide_is_refused(config: dict[str, Any], num_views: int | None, ranks: int, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        SampleOrder(COUNTS, OrderConfig.model_validate(config), 8, num_views, 0, ranks)


def test_an_epoch_of_half_a_decode_is_refused_by_the_schema() -> None:
    with pytest.raises(ValidationError, match="multiple of views_per_decode"):
        OrderConfig(views_per_decode=2)


def test_the_slices_needed_at_a_time_are_those_of_a_group() -> None:
    assert SampleOrder(COUNTS, OrderConfig(), 8, 4).slices_per_lane == 4
    assert order_of(1, 0).slices_per_lane == order_of(4, 0).slices_per_lane == 2 * 2


# ---------------------------------------------------------------- group by group, as when a pass was one array


def whole_pass(counts: list[int], order: OrderConfig, epoch: int, lane: int) -> Items:
    """The samples of one lane in one pass, made at once: the reference for `epoch_groups`."""
    units = _permutation(len(counts), "units", order.seed, epoch)
    sizes = np.asarray(counts, dtype=np.int64)[units]
    begins = np.cumsum(sizes) - sizes
    low, high = (int(sizes.sum()) * end // order.lanes for end in (lane, lane + 1))
    first, end = (np.clip(edge - begins, 0, sizes) for edge in (low, high))
    kept = np.flatnonzero((end > first) | (order.lanes == 1))
    name: tuple[object, ...] = () if order.lanes == 1 else ("lane", lane)
    groups = [np.empty((0, 3), dtype=np.int64)]
    for start in range(0, len(kept), order.shuffle_units):
        rows = np.concatenate(
            [
                np.stack(np.broadcast_arrays(units[u], np.arange(first[u], end[u]), 0), axis=1)
                for u in kept[start : start + order.shuffle_units]
            ]
        )
        groups.append(rows[_permutation(len(rows), "samples", order.seed, epoch, start, *name)])
    return np.concatenate(groups).astype(np.int64)


def whole_plan(order: SampleOrder, last_step: int) -> list[Items]:
    """The entries of `plan`, from whole passes."""
    entries, step, k = [], order.step, order.order.views_per_decode
    per_pass = sum(order.counts) // order.batch_size * k
    count = order.batch_size // order.order.lanes
    while step < last_step:
        number, offset = divmod(step, per_pass)
        lanes = [whole_pass(order.counts, order.order, number, lane) for lane in order.lanes]
        chunk, done = divmod(offset, k)
        items: list[Items] = []
        for view in range(done, min(k, done + last_step - step)):
            parts = [whole[chunk * count : (chunk + 1) * count] for whole in lanes]
            if view:
                name = ("batch", order.order.seed, number, chunk, view)
                parts = [part[_permutation(count, *name, lane)] for lane, part in zip(order.lanes, parts, strict=True)]
            batch = np.concatenate(parts)
            batch[:, 2] = (number * k + view) % (order.num_views or 2**40)
            running = (step - order.step + len(items)) * len(batch) + np.arange(len(batch))
            items.append(np.concatenate([batch, running[:, None]], axis=1))
        entries.append(np.stack(items))
        step += len(items)
    return entries


SHAPES = ([3], [7, 1, 12, 5, 9, 0, 14], [0, 0, 5, 0, 4], [4] * 23, [30, 1, 1, 1, 40, 2], [1] * 31)


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("counts", SHAPES, ids=str)
def test_groups_are_the_pass_and_what_is_skipped_changes_nothing(counts: list[int], lanes: int) -> None:
    for shuffle_units, epoch in itertools.product((1, 2, 3, 100), (0, 7)):
        config = OrderConfig(seed=11, shuffle_units=shuffle_units, lanes=lanes)
        for lane in range(lanes):
            whole = whole_pass(counts, config, epoch, lane)
            for skip in range(len(whole) + 2):
                groups = list(epoch_groups(counts, config, epoch, lane, skip))
                assert all(group.dtype == np.int64 for group in groups)
                found = np.concatenate([np.empty((0, 3), np.int64), *groups])
                np.testing.assert_array_equal(found, whole[skip:])


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("counts", SHAPES, ids=str)
def test_the_plan_is_that_of_whole_passes_from_every_step(counts: list[int], lanes: int) -> None:
    for k, shuffle_units, per_lane in itertools.product((1, 4), (1, 3), (1, 3)):
        size = per_lane * lanes
        if size > sum(counts):
            continue
        config = OrderConfig(seed=5, shuffle_units=shuffle_units, lanes=lanes, views_per_decode=k, views_per_epoch=k)
        for ranks in {1, 2, 4} & {1, lanes}:
            order = SampleOrder(counts, config, size, 4 if k < 4 else None, ranks - 1, ranks)
            per_pass = order.steps_per_epoch
            for order.step in {0, 1, per_pass // 2, per_pass - 1, per_pass}:
                last = max(order.step + 5, per_pass + 3)
                found, expected = list(order.plan(last)), whole_plan(order, last)
                assert [entry.shape for entry in found] == [entry.shape for entry in expected]
                assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_an_entry_permutes_only_the_groups_up_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def counted(length: int, *identity: object) -> npt.NDArray[np.int64]:
        lengths.append(length)
        return _permutation(length, *identity)

    monkeypatch.setattr(order_module, "_permutation", counted)
    order = SampleOrder([10] * 1000, OrderConfig(shuffle_units=4), 8, 1)
    order.step = order.steps_per_epoch // 2 + 1  # one step behind a border of groups: 5,008 of 10,000 samples
    next(order.plan(order.step + 1))
    assert lengths == [1000, 40]


# ---------------------------------------------------------------- new views

EQUAL_COUNTS = [6, 6, 6, 6, 6, 6, 6, 6]


def fresh_order(fresh: float, **order: Any) -> SampleOrder:
    return SampleOrder(EQUAL_COUNTS, OrderConfig(**order), 12, 3, fresh=fresh)


def views_by_image(order: SampleOrder, steps: int) -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for _, items in order.steps(steps):
        for shard, sample, view, _ in items.tolist():
            found.setdefault((shard, sample), []).append(view)
    return found


@pytest.mark.parametrize("views_per_decode", [1, 2])
def test_every_pass_renders_the_same_share_of_shards_anew_and_no_new_view_comes_twice(views_per_decode: int) -> None:
    order = fresh_order(0.25, views_per_decode=views_per_decode, views_per_epoch=views_per_decode)
    found = views_by_image(order, 4 * 12)
    assert len(found) == 48 and {len(views) for views in found.values()} == {12}
    for views in found.values():
        new = [view for view in views if view >= 3]
        assert new == [3, 4, 5]  # a quarter of 12
        assert [view for view in views if view < 3] == [0, 1, 2] * 3  # the others go on in turn
    for at in range(12):
        assert sum(views[at] >= 3 for views in found.values()) == 12  # of 48 in every pass
    for shard in range(8):
        assert len({tuple(found[shard, sample]) for sample in range(6)}) == 1


def test_no_new_views_are_the_order_as_before_and_all_of_them_have_no_end() -> None:
    plain = SampleOrder(EQUAL_COUNTS, OrderConfig(), 12, 3)
    for one, other in zip(plain.plan(20), fresh_order(0.0).plan(20), strict=True):
        np.testing.assert_array_equal(one, other)
    assert plain.state_dict() == fresh_order(0.0).state_dict() != fresh_order(0.5).state_dict()
    assert set(map(tuple, views_by_image(fresh_order(1.0), 12).values())) == {(3, 4, 5)}


def test_new_views_are_the_same_after_a_resume_and_for_any_number_of_ranks() -> None:
    config = OrderConfig(lanes=4)
    whole = [items for _, items in SampleOrder(EQUAL_COUNTS, config, 12, 3, fresh=0.3).steps(20)]
    parts = [SampleOrder(EQUAL_COUNTS, config, 12, 3, rank, 2, fresh=0.3) for rank in range(2)]
    for part in parts:
        part.step = 7
    for step, (left, right) in enumerate(zip(*(part.steps(20) for part in parts), strict=True), start=7):
        both = {tuple(row) for _, items in (left, right) for row in items[:, :3].tolist()}
        assert both == {tuple(row) for row in whole[step][:, :3].tolist()}
        np.testing.assert_array_equal(parts[0].whole_batch(step), whole[step][:, :3])


def test_which_shards_come_anew_is_golden() -> None:
    found = views_by_image(fresh_order(0.25), 16)
    golden = "0132 3012 3012 0312 0132 0123 0312 0123"
    assert " ".join("".join(map(str, found[shard, 0])) for shard in range(8)) == golden
