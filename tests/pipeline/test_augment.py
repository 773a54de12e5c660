"""Augmentations are functions of (run seed, view) and (run seed, step, lane); mixing is timm's to the bit."""

import hashlib
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

from tinymim.configs.errors import SourceError
from tinymim.configs.sections.augment import AugmentConfig
from tinymim.configs.sections.loader import LoaderConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.views import ViewConfig
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.pipeline.augment import AugmentedViews, Mixing, policies_of
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.loader import batches
from tinymim.pipeline.operations.registry import apply
from tinymim.pipeline.order import Items
from tinymim.pipeline.policies import Constants
from tinymim.pipeline.shards import Shard, open_shards
from tinymim.pipeline.views import RandomViews, operation_rng

STRONG = "rand-m9-mstd0.5-inc1"
CLASSES = 10
CONSTANTS = Constants.of(IMAGENET_MEAN, IMAGENET_STD)


def augmented(source: ImageViews, config: str | None = STRONG, erasing: float = 0.25) -> AugmentedViews:
    policies = policies_of(AugmentConfig(rand_augment=config, erasing=erasing), CONSTANTS)
    return AugmentedViews(source, policies, CONSTANTS.fill)


def views(shards: Path, config: str | None = STRONG, erasing: float = 0.25, seed: int = 0) -> AugmentedViews:
    source = ImageViews(open_shards(SourceConfig(shards=shards)).shards, RandomViews(ViewConfig(size=32)), seed=seed)
    return augmented(source, config, erasing)


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
    plain = views(drawn_shards, None, erasing=0).batch(items)
    first, other = (views(drawn_shards, seed=seed).batch(items) for seed in (0, 1))
    assert plain.views == first.views == other.views
    for a, b in ((first, other), (first, plain)):
        changed = (a.pixels != b.pixels).flatten(1).any(dim=1)
        assert int(changed.sum()) > 12  # of 25: each of two operations is skipped with probability 1/2
    later = items.copy()
    later[:, 2] += 1
    assert not torch.equal(views(drawn_shards).batch(later).pixels, first.pixels)


def test_a_view_is_what_its_policies_draw(drawn_shards: Path) -> None:
    items = some_items()
    plain, strong = (views(drawn_shards, *given).batch(items) for given in ((None, 0), (STRONG, 0.25)))
    policies = policies_of(AugmentConfig(), CONSTANTS)
    for row, key in enumerate(plain.keys):
        draws = operation_rng(0, key, 3)
        steps = [step for policy in policies for step in policy.draw(draws, 32, 32)]
        assert np.array_equal(apply(plain.pixels[row].numpy(), steps), strong.pixels[row].numpy())


def test_views_without_a_seed_are_refused(drawn_shards: Path) -> None:
    shards = open_shards(SourceConfig(shards=drawn_shards)).shards
    with pytest.raises(ValueError, match="seed"):
        augmented(ImageViews(shards, RandomViews(ViewConfig(size=32))))


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
    source = augmented(Holes(shards, RandomViews(ViewConfig(size=32)), seed=0))
    found = source.batch(items)
    holes = torch.zeros(len(items), dtype=torch.bool)
    holes[list(Holes.holes)] = True
    assert torch.equal(found.pixels[~holes], whole.pixels[~holes]) and found.keys == whole.keys
    assert found.labels.tolist() == torch.where(holes, -1, whole.labels).tolist()
    assert torch.equal(found.view_keys, whole.view_keys) and np.array_equal(found.items, whole.items)
    assert found.pixels[2, :, 0, 0].tolist() == [124, 116, 104] and len(found.pixels[2].unique()) == 3
    with pytest.raises(SourceError, match="no image of a batch"):
        source.batch(items[[2, 5]])


def test_erasing_belongs_to_the_view(drawn_shards: Path) -> None:
    items = np.concatenate([some_items(16) + np.array([0, 0, number]) for number in range(8)])
    plain, erased = (views(drawn_shards, None, share).batch(items) for share in (0.0, 0.25))
    share = (plain.pixels != erased.pixels).any(dim=1).flatten(1).float().mean(dim=1)
    assert 20 <= int((share > 0).sum()) <= 44 and float(share.max()) < 0.4
    apart = [views(drawn_shards, None).batch(items[part]).pixels for part in (slice(40, 128), slice(0, 40))]
    assert torch.equal(torch.cat(apart[::-1]), erased.pixels)


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


@pytest.mark.parametrize("config", [{}, {"cutmix": 0}, {"mixup": 0}, {"mixup": 0.3, "cutmix": 0.4}], ids=str)
def test_one_lane_is_timms_mixup(config: dict[str, Any]) -> None:
    """To the bit, if timm's generator is seeded as that of the lane."""
    original, _ = mixed([0], mixup=0, cutmix=0)
    theirs = Mixup(config.get("mixup", 0.8), config.get("cutmix", 1.0), label_smoothing=0.1, num_classes=CLASSES)
    state = np.random.get_state()
    for lane in range(12):
        images, targets = mixed([lane], **config)
        name = f"mix/0/7/{lane}".encode()
        number = int.from_bytes(hashlib.blake2b(name, digest_size=8, person=b"tinymim/augment").digest(), "big")
        np.random.seed([number >> 32, number & 0xFFFFFFFF])
        wanted = theirs(original.clone(), torch.arange(16) % CLASSES)
        assert torch.equal(images, wanted[0]) and torch.equal(targets, wanted[1])
    np.random.set_state(state)


def test_an_odd_lane_is_refused() -> None:
    with pytest.raises(ValueError, match="in pairs, got 3"):
        mixed([0], slice(0, 3))


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
