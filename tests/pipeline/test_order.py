"""The order of samples: permutations seeded by (seed, epoch), and equal batches after a resume."""

import numpy as np
import pytest

from tinymim.configs.sections.loader import OrderConfig
from tinymim.pipeline.order import Items, steps_per_epoch, view_batches
from tinymim.tests.pipeline.plans import epoch_items, numbered_batches, training_batches

COUNTS = [7, 1, 12, 5, 9]


def _pairs(items: Items) -> list[tuple[int, int]]:
    return [(int(unit), int(sample)) for unit, sample, _ in items]


@pytest.mark.parametrize("shuffle_units", [1, 2, 100])
def test_an_epoch_is_a_permutation_of_all_samples(shuffle_units: int) -> None:
    items = epoch_items(COUNTS, OrderConfig(shuffle_units=shuffle_units), epoch=3)
    assert items.dtype == np.int64 and items.shape == (sum(COUNTS), 3)
    assert sorted(_pairs(items)) == [(u, s) for u, count in enumerate(COUNTS) for s in range(count)]
    assert set(items[:, 2]) == {0}


def test_only_seed_and_epoch_change_the_order() -> None:
    base = _pairs(epoch_items(COUNTS, OrderConfig(), 0))
    np.random.seed(7)  # the global state must not matter
    assert _pairs(epoch_items(COUNTS, OrderConfig(), 0)) == base
    assert _pairs(epoch_items(COUNTS, OrderConfig(), 1)) != base
    assert _pairs(epoch_items(COUNTS, OrderConfig(seed=1), 0)) != base


def test_golden_order() -> None:
    items = epoch_items([3, 4], OrderConfig(seed=5), epoch=2)
    assert _pairs(items) == [(0, 1), (0, 0), (1, 3), (1, 2), (1, 0), (0, 2), (1, 1)]


def test_a_reader_needs_few_units_at_a_time() -> None:
    units = [unit for unit, _ in _pairs(epoch_items([4] * 12, OrderConfig(shuffle_units=3), 0))]
    groups = [set(units[start : start + 12]) for start in range(0, 48, 12)]
    assert [len(group) for group in groups] == [3, 3, 3, 3]
    assert set.union(*groups) == set(range(12))


def test_views_cycle_with_the_epoch() -> None:
    per_epoch = steps_per_epoch(COUNTS, 8)
    for num_views, expected in ((2, [0, 1, 0, 1, 0]), (3, [0, 1, 2, 0, 1]), (None, [0, 1, 2, 3, 4])):
        seen = [batch[:, 2] for batch in training_batches(COUNTS, OrderConfig(), 8, num_views, 0, 5 * per_epoch)]
        assert [set(view.tolist()) for view in seen[::per_epoch]] == [{view} for view in expected]
        assert all(len(set(view.tolist())) == 1 for view in seen)


def test_no_sample_twice_within_an_epoch_and_whole_batches_only() -> None:
    per_epoch = steps_per_epoch(COUNTS, 8)
    assert per_epoch == 4
    epoch = np.concatenate(list(training_batches(COUNTS, OrderConfig(), 8, 2, 0, per_epoch)))
    assert len(set(_pairs(epoch))) == 32


@pytest.mark.parametrize("num_views", [None, 2])
def test_resume_at_every_step_gives_the_same_rest(num_views: int | None) -> None:
    last = 3 * steps_per_epoch(COUNTS, 8) + 2
    whole = list(training_batches(COUNTS, OrderConfig(), 8, num_views, 0, last))
    assert len(whole) == last
    for step in range(last + 1):
        rest = list(training_batches(COUNTS, OrderConfig(), 8, num_views, step, last))
        np.testing.assert_array_equal(np.array(rest).reshape(-1, 8, 3), np.array(whole[step:]).reshape(-1, 8, 3))


def test_items_are_numbered_from_the_start_or_resume() -> None:
    whole = np.concatenate(list(numbered_batches(COUNTS, OrderConfig(), 8, 2, 0, 9)))
    np.testing.assert_array_equal(whole[:, 3], np.arange(72))
    tail = np.concatenate(list(numbered_batches(COUNTS, OrderConfig(), 8, 2, 5, 9)))
    np.testing.assert_array_equal(tail[:, :3], whole[40:, :3])
    np.testing.assert_array_equal(tail[:, 3], np.arange(32))


@pytest.mark.parametrize("images_per_batch", [1, 3, 5, 100])
def test_caching_order_is_the_tars_with_views_adjacent(images_per_batch: int) -> None:
    parts = list(view_batches(4, 5, (2, 3), images_per_batch))
    expected = [[4, sample, view] for sample in range(5) for view in (2, 3)]
    assert np.concatenate(parts).tolist() == expected
    assert all(len(part) <= 2 * images_per_batch for part in parts)
    assert list(view_batches(0, 0, (0,), 4)) == []
