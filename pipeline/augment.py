"""Augmented views of fine-tuning, and mixup and CutMix, with draws seeded by (run seed, view) or (run seed, step).

Results do not depend on workers, ranks, devices or interruptions. The operations of a view have the same bytes on every
machine (pipeline/operations/). Mixing follows timm's law and numpy's legacy stream, which numpy keeps.

Shapes: B view, S pixel, K class.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tinymim.configs.errors import SourceError
from tinymim.configs.rand_augment import parse_rand_augment
from tinymim.configs.sections.augment import AugmentConfig
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.operations.registry import apply
from tinymim.pipeline.order import Items
from tinymim.pipeline.policies import Constants, Policy, RandAugment, RandomErasing
from tinymim.pipeline.tar import UNLABELLED
from tinymim.pipeline.views import View, operation_rng, view_key


def policies_of(config: AugmentConfig, constants: Constants) -> tuple[Policy, ...]:
    """The policies of fine-tuning, in their order."""
    policies: list[Policy] = []
    if config.rand_augment is not None:
        policies.append(RandAugment(parse_rand_augment(config.rand_augment), constants.fill))
    if config.erasing:
        policies.append(RandomErasing(config.erasing, "pixel", constants))
    return tuple(policies)


class AugmentedViews:
    """Views with the operations that policies draw, always one view per item.

    A plain image without a label replaces an unreadable image, so that the other images keep their places in the batch.

    Args:
        views: views under a law, with the seed of the draws.
        policies: the policies, in their order.
        fill: colour of the replacement.
    """

    def __init__(self, views: ImageViews, policies: Sequence[Policy], fill: tuple[int, int, int]) -> None:
        if views.seed is None:
            raise ValueError("views need a seed to be augmented")
        self.shards = views.shards
        self._views, self._seed, self._policies = views, views.seed, tuple(policies)
        self._fill = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1)

    def batch(self, items: Items) -> ViewBatch:
        """The B views of `items`, int64 [B, 3 or more]: shard, sample, view index."""
        batch = self._views.batch(items)
        for pixels, key, view in zip(batch.pixels.numpy(), batch.keys, batch.items[:, 2].tolist(), strict=True):
            draws = operation_rng(self._seed, key, view)
            steps = [step for policy in self._policies for step in policy.draw(draws, *pixels.shape[1:])]
            if steps:
                pixels[:] = apply(pixels, steps)
        return self._filled(batch, items[:, :3]) if batch.unreadable else batch

    def _filled(self, batch: ViewBatch, items: Items) -> ViewBatch:
        if not batch.keys:
            raise SourceError("no image of a batch can be read", got=batch.unreadable[0])
        found = {tuple(row): number for number, row in enumerate(batch.items.tolist())}
        rows = [found.get(tuple(row), -1) for row in items.tolist()]
        missing = torch.tensor(rows) < 0
        whole = batch.pick(np.maximum(rows, 0))
        whole.pixels[missing] = self._fill
        whole.labels[missing] = UNLABELLED
        for place in missing.nonzero().flatten().tolist():
            unit, sample, view = items[place].tolist()
            whole.keys[place] = self._views.shards[unit].members().keys[sample]
            whole.views[place] = View(0, 0, 0, 0, False)
            whole.view_keys[place] = view_key(self._seed, whole.keys[place], view)
        return replace(whole, items=np.ascontiguousarray(items))


class Mixing:
    """timm's Mixup by batch: mixup or CutMix per lane. Image i of a lane is mixed with image i from its other end.

    timm mixes a GPU's batch. A lane lies on one rank, so mixing lanes is the same for every number of ranks.

    Args:
        config: strengths of mixup and CutMix.
        smoothing: label smoothing.
        num_classes: K.
    """

    def __init__(self, config: AugmentConfig, smoothing: float, num_classes: int) -> None:
        self._config, self._smoothing, self._num_classes = config, smoothing, num_classes

    def __call__(
        self, images: Float[Tensor, "B 3 S S"], labels: Int64[Tensor, " B"], lanes: Sequence[int], *name: int
    ) -> Float[Tensor, "B K"]:
        """Mix the images in place.

        Args:
            images: images of whole lanes, lane after lane.
            labels: class numbers on the CPU; `UNLABELLED` for the replacement of an unreadable image.
            lanes: lane indices.
            name: the seed of the draws: run seed, step.

        Returns:
            The targets, each summing to one. Targets of replacements are zero and train nothing.
        """
        targets = []
        for lane, mixed, own in zip(lanes, images.chunk(len(lanes)), labels.chunk(len(lanes)), strict=True):
            # A replacement dims or covers part of its partner, so it gets the partner's label.
            known = torch.where(own == UNLABELLED, own.flip(0), own).clamp(min=0)
            known = known.to(images.device, non_blocking=True)
            share = _mix(mixed, self._config, _legacy_rng("mix", *name, lane)) if self._config.mixes else 1.0
            low = self._smoothing / self._num_classes
            smooth = torch.full((len(own), self._num_classes), low, device=images.device)
            smooth.scatter_(1, known[:, None], 1.0 - self._smoothing + low)
            targets.append(smooth * share + smooth.flip(0) * (1.0 - share))
        stand_ins = (labels == UNLABELLED).to(images.device, non_blocking=True)
        return torch.cat(targets).masked_fill_(stand_ins[:, None], 0.0)


def _legacy_rng(*name: object) -> np.random.RandomState:
    digest = hashlib.blake2b("/".join(map(str, name)).encode(), digest_size=8, person=b"tinymim/augment").digest()
    number = int.from_bytes(digest, "big")
    return np.random.RandomState([number >> 32, number & 0xFFFFFFFF])


def _mix(images: Float[Tensor, "B 3 S S"], config: AugmentConfig, rng: np.random.RandomState) -> float:
    """Mix each image in place with that from the other end; returns the share that it keeps. Draws in timm's order."""
    if len(images) % 2:
        raise ValueError(f"images are mixed in pairs, got {len(images)}")
    rng.rand()  # timm's probability of mixing, which is 1
    cuts = config.cutmix > 0 and (config.mixup == 0 or rng.rand() < 0.5)
    alpha = config.cutmix if cuts else config.mixup
    share = float(rng.beta(alpha, alpha))
    if share == 1.0:
        return share
    if not cuts:
        others = images.flip(0).mul_(1.0 - share)
        images.mul_(share).add_(others)
        return share
    height, width = images.shape[-2:]
    sides = [int(size * math.sqrt(1.0 - share)) for size in (height, width)]
    middles = [int(rng.randint(0, size)) for size in (height, width)]
    (top, bottom), (left, right) = (
        (max(0, middle - side // 2), min(size, middle + (side + 1) // 2))
        for middle, side, size in zip(middles, sides, (height, width), strict=True)
    )
    images[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return 1.0 - (bottom - top) * (right - left) / (height * width)
