"""Augmentations are functions of (run seed, view) and (run seed, step, lane), and timm's."""

import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor

from tinymim.configs.errors import RecipeError, SourceError
from tinymim.configs.sections import AugmentConfig, LoaderConfig, SourceConfig, ViewConfig
from tinymim.models.vit import IMAGENET_MEAN
from tinymim.pipeline.augment import AugmentedViews, Mixing, erase, global_generators, rand_augment
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import Items
from tinymim.pipeline.shards import Shard, open_shards
from tinymim.pipeline.views import RandomViews

STRONG = "rand-m9-mstd0.5-inc1"
CLASSES = 10


def views(shards: Path, config: str | None = STRONG, seed: int = 0) -> AugmentedViews:
    source = ImageViews(open_shards(SourceConfig(shards=shards)).shards, RandomViews(ViewConfig(size=32)), seed=seed)
    return AugmentedViews(source, config, IMAGENET_MEAN)


def some_items(count: int = 12) -> Items:
    return np.stack([np.zeros(count), np.arange(count), np.full(count, 3)], axis=1).astype(np.int64)


@pytest.fixture(autouse=True)
def untouched_generators() -> Iterator[None]:
    """No test may change the state of the global generators."""
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    yield
    assert random.getstate() == before[0] and str(np.random.get_state()) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


# ---------------------------------------------------------------- RandAugment


def test_what_a_view_becomes_depends_on_no_batch_and_no_worker(drawn_shards: Path) -> None:
    items, source = some_items(), views(drawn_shards)
    whole = source.batch(items)
    backwards = source.batch(items[::-1])
    assert torch.equal(backwards.pixels.flip(0), whole.pixels)
    plan = [items[:5], items[5:9], items[9:]]
    for workers in (0, 1):
        found = torch.cat([batch.pixels for batch in batches(source, plan, LoaderConfig(workers=workers))])
        assert torch.equal(found, whole.pixels)
    assert torch.equal(pickle.loads(pickle.dumps(source)).batch(items).pixels, whole.pixels)


def test_another_seed_or_view_is_another_image_and_null_is_the_view_itself(drawn_shards: Path) -> None:
    items = some_items(25)
    plain = views(drawn_shards, None).batch(items)
    first, other = (views(drawn_shards, seed=seed).batch(items) for seed in (0, 1))
    assert plain.views == first.views == other.views
    for a, b in ((first, other), (first, plain)):
        changed = (a.pixels != b.pixels).flatten(1).any(dim=1)
        assert int(changed.sum()) > 12  # of 25: each of two operations is skipped with probability 1/2
    later = items.copy()
    later[:, 2] += 1
    assert not torch.equal(views(drawn_shards).batch(later).pixels, first.pixels)


def test_what_timm_does_not_understand_is_refused() -> None:
    for config in ("strong", "rand-m9-zz3", ""):
        with pytest.raises(RecipeError, match="rand_augment"):
            rand_augment(config, 32, IMAGENET_MEAN)


# ---------------------------------------------------------------- images that cannot be read


class Holes(ImageViews):
    """Some samples of the first shard are unreadable."""

    holes = (2, 5)

    def batch(self, items: Items) -> ViewBatch:
        whole = super().batch(items)
        kept = np.array([row for row in range(len(items)) if items[row, 1] not in self.holes], dtype=np.int64)
        found = whole.pick(kept)
        found.unreadable.extend((key, "hole") for row, key in enumerate(whole.keys) if row not in kept)
        return found


def test_an_unreadable_image_leaves_all_others_where_they_are(drawn_shards: Path) -> None:
    items, whole = some_items(), views(drawn_shards).batch(some_items())
    shards: tuple[Shard, ...] = open_shards(SourceConfig(shards=drawn_shards)).shards
    source = AugmentedViews(Holes(shards, RandomViews(ViewConfig(size=32)), seed=0), STRONG, IMAGENET_MEAN)
    found = source.batch(items)
    holes = torch.zeros(len(items), dtype=torch.bool)
    holes[list(Holes.holes)] = True
    assert torch.equal(found.pixels[~holes], whole.pixels[~holes]) and found.keys == whole.keys
    assert found.labels.tolist() == torch.where(holes, -1, whole.labels).tolist()
    assert torch.equal(found.view_keys, whole.view_keys) and np.array_equal(found.items, whole.items)
    assert found.pixels[2, :, 0, 0].tolist() == [124, 116, 104] and len(found.pixels[2].unique()) == 3
    with pytest.raises(SourceError, match="no image of a batch"):
        source.batch(items[[2, 5]])


# ---------------------------------------------------------------- erasing


def noise(count: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.full((count, 3, 32, 32), 9.0), torch.randint(2**62, (count,), generator=generator)


def test_erasing_belongs_to_the_view() -> None:
    images, keys = noise()
    erase(images, keys, 0.25)
    erased = (images != 9.0).any(dim=1)
    share = erased.flatten(1).float().mean(dim=1)
    assert 8 <= int((share > 0).sum()) <= 24 and float(share.max()) < 0.4
    box = images.permute(0, 2, 3, 1)[erased]
    assert abs(float(box.mean())) < 0.1 and float(box.std()) == pytest.approx(1.0, abs=0.1)
    apart, _ = noise()
    for part in (slice(40, 64), slice(0, 40)):
        erase(apart[part], keys[part], 0.25)
    assert torch.equal(apart, images)
    none, _ = noise()
    erase(none, keys, 0.0)
    assert bool((none == 9.0).all())


# ---------------------------------------------------------------- mixup and CutMix


def mixed(lanes: list[int], rows: slice = slice(None), **config: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(16, 3, 8, 8, generator=generator), torch.arange(16) % CLASSES
    images, labels = images[rows].clone(), labels[rows]
    targets = Mixing(AugmentConfig.model_validate(config), 0.1, CLASSES)(images, labels, lanes, 0, 7)
    return images, targets


@pytest.mark.parametrize("config", [{}, {"cutmix": 0}, {"mixup": 0}], ids=str)
def test_a_lane_is_mixed_alike_on_one_rank_and_on_many(config: dict[str, Any]) -> None:
    whole = mixed([0, 1, 2, 3], **config)
    halves = [mixed([0, 1], slice(0, 8), **config), mixed([2, 3], slice(8, 16), **config)]
    for number in range(2):
        assert torch.equal(torch.cat([half[number] for half in halves]), whole[number])
    original, _ = mixed([0], mixup=0, cutmix=0)
    assert not torch.equal(whole[0], original) and torch.allclose(whole[1].sum(dim=1), torch.ones(16))
    shares = {round(float(row.max()), 4) for row in whole[1]}
    assert len(shares) >= 2  # every lane draws for itself


def test_one_lane_is_timms_mixup() -> None:
    images, targets = mixed([0])
    original, _ = mixed([0], mixup=0, cutmix=0)
    with global_generators() as seed:
        seed("mix", 0, 7, 0)
        wanted = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES)(original, torch.arange(16) % CLASSES)
    assert torch.equal(images, wanted[0]) and torch.equal(targets, wanted[1])


def test_without_mixing_the_loss_is_that_of_smoothed_labels() -> None:
    images, targets = mixed([0], mixup=0, cutmix=0)
    logits = images.mean(dim=(2, 3)) @ torch.linspace(-1, 1, 3 * CLASSES).view(3, CLASSES)
    smoothed = LabelSmoothingCrossEntropy(0.1)(logits, torch.arange(16) % CLASSES)
    torch.testing.assert_close(SoftTargetCrossEntropy()(logits, targets), smoothed)


def test_a_stand_in_trains_nothing_and_takes_nothing_from_its_partner() -> None:
    images, labels = torch.rand(4, 3, 8, 8, generator=torch.Generator()), torch.tensor([3, 1, -1, -1])
    targets = Mixing(AugmentConfig(cutmix=0), 0.0, CLASSES)(images, labels, [0], 0, 7)
    wanted = torch.zeros(4, CLASSES)
    wanted[0, 3] = wanted[1, 1] = 1.0
    torch.testing.assert_close(targets, wanted)
