"""Masks: fixed by (seed, key, view) for all time, uniform over the patches, and whole units."""

import numpy as np
import pytest
import torch

from tinymim.configs.sections.masks import MaskConfig
from tinymim.pipeline.masks import mask_order, mask_orders, visible_patches

GOLDEN = {
    (0, "n01440764/10026", 0, 1): [2, 5, 12, 8, 11, 10, 15, 13, 9, 0, 3, 7, 6, 14, 4, 1],
    (7, "n01440764/10026", 3, 1): [14, 11, 2, 4, 1, 15, 8, 12, 13, 7, 9, 3, 10, 5, 0, 6],
    (7, "Ä/b", 3, 2): [12, 13, 0, 1, 14, 15, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11],
}


@pytest.mark.parametrize("name", list(GOLDEN))
def test_golden_masks_fix_the_law(name: tuple[int, str, int, int]) -> None:
    seed, key, view, unit = name
    assert mask_order(seed, key, view, 4, 4, unit).tolist() == GOLDEN[name]


@pytest.mark.parametrize(("rows", "columns", "unit"), [(14, 14, 1), (14, 14, 2), (6, 9, 3), (1, 1, 1)])
def test_a_mask_is_an_order_of_the_patches(rows: int, columns: int, unit: int) -> None:
    order = mask_order(0, "a", 0, rows, columns, unit)
    assert sorted(order.tolist()) == list(range(rows * columns))


def test_seed_key_and_view_give_other_masks() -> None:
    names = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "1/a", 0)]
    assert len({tuple(mask_order(*name, 14, 14).tolist()) for name in names}) == len(names)


@pytest.mark.parametrize("unit", [1, 2])
def test_every_patch_is_hidden_as_often_and_pairs_are_independent(unit: int) -> None:
    """5000 masks of 75 %: five standard deviations of the binomial law."""
    orders = np.stack([mask_order(0, "a", view, 4, 4, unit) for view in range(5000)])
    hidden = orders >= 4
    assert (hidden.sum(axis=1) == 12).all()
    assert np.abs(hidden.mean(axis=0) - 0.75).max() < 5 * np.sqrt(0.75 * 0.25 / 5000)
    units = 16 // unit**2
    other = hidden[:, 0] & hidden[:, -1]  # of two units, without replacement
    both = 0.75 * (0.75 * units - 1) / (units - 1)
    assert abs(other.mean() - both) < 5 * np.sqrt(both * (1 - both) / 5000)


def test_a_unit_is_hidden_as_a_whole() -> None:
    for view in range(50):
        hidden = mask_order(0, "a", view, 8, 8, 2).reshape(4, 2, 4, 2) >= 40
        assert (hidden == hidden[:, :1, :, :1]).all()


def test_visible_patches_are_the_first_of_the_order_in_raster_order() -> None:
    mask, named = MaskConfig(ratio=0.75, seed=7), [("n01440764/10026", 3), ("b", 5)]
    kept = visible_patches(mask, named, (4, 4), torch.device("cpu"))
    assert kept is not None
    assert kept[0].tolist() == [2, 4, 11, 14]  # of the golden order above
    assert kept[1].tolist() == [patch for patch, at in enumerate(mask_order(7, "b", 5, 4, 4).tolist()) if at < 4]
    assert visible_patches(None, named, (4, 4), torch.device("cpu")) is None


def test_a_batch_holds_the_masks_of_its_views() -> None:
    named = [("a", 0), ("b", 5)]
    orders = mask_orders(3, named, 4, 6, 2)
    assert orders.dtype == torch.int64 and orders.shape == (2, 24)
    assert [row.tolist() for row in orders] == [mask_order(3, *name, 4, 6, 2).tolist() for name in named]
