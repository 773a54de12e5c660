"""timm's RandAugment, random erasing, mixup and CutMix, with draws seeded by (run seed, view) or (run seed, step).

timm draws from the global generators of Python, numpy and torch. This module seeds them for every image, or for every
lane of a step's batch, and restores them. Results thus do not depend on workers, ranks, devices or interruptions.
Unlike a view (docs/views.md), they depend on the versions of timm, Pillow and Python, which the run folder records.

Shapes: B view, S pixel, K class.
"""

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL import Image
from timm.data import Mixup, rand_augment_transform
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from tinymim.configs.errors import RecipeError, SourceError
from tinymim.configs.sections import AugmentConfig
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.order import Items
from tinymim.pipeline.shards import UNLABELLED
from tinymim.pipeline.views import View, view_key


@contextlib.contextmanager
def global_generators() -> Iterator[Callable[..., None]]:
    """Yields a function that seeds the CPU generators of Python, numpy and torch; restores their states at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield _seed
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed(*name: object) -> None:
    digest = hashlib.blake2b("/".join(map(str, name)).encode(), digest_size=8, person=b"tinymim/augment").digest()
    number = int.from_bytes(digest, "big")
    random.seed(number)
    np.random.seed([number >> 32, number & 0xFFFFFFFF])
    torch.default_generator.manual_seed(number >> 1)


def rand_augment(config: str, size: int, mean: Sequence[float]) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment as in timm's training transform.

    Args:
        config: timm's notation, for example rand-m9-mstd0.5-inc1.
        size: side of the images in pixels.
        mean: pixel mean per channel, 0..1, which fills gaps.

    Raises:
        RecipeError: timm refuses `config`.
    """
    fill = tuple(min(255, round(255 * value)) for value in mean)
    options = {"translate_const": int(size * 0.45), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    try:
        transform: Callable[[Image.Image], Image.Image] = rand_augment_transform(config, options)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise RecipeError(
            "timm refuses augment.rand_augment",
            got=config,
            expected="a policy such as rand-m9-mstd0.5-inc1, or null",
        ) from error
    return transform


class AugmentedViews:
    """Views with RandAugment, always one per item.

    A grey image without a label replaces an unreadable image, so that the other images keep their places in the batch.

    Args:
        views: views under a law with a seed.
        config: timm's notation; None: no augmentation.
        mean: pixel mean per channel, 0..1.
    """

    def __init__(self, views: ImageViews, config: str | None, mean: Sequence[float]) -> None:
        self.shards = views.shards
        self._views, self._grey = views, torch.tensor(mean).mul(255).round().to(torch.uint8).view(3, 1, 1)
        self._transform = None if config is None else rand_augment(config, views.law.size, mean)

    def batch(self, items: Items) -> ViewBatch:
        """The B views of `items`, int64 [B, 3 or more]: shard, sample, view index."""
        batch = self._views.batch(items)
        if self._transform is not None:
            with global_generators() as seed:
                for pixels, key in zip(batch.pixels, batch.view_keys.tolist(), strict=True):
                    seed("rand-augment", key)
                    image = self._transform(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
                    pixels.copy_(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        return self._filled(batch, items[:, :3]) if batch.unreadable else batch

    def _filled(self, batch: ViewBatch, items: Items) -> ViewBatch:
        if not batch.keys:
            raise SourceError("no image of a batch can be read", got=batch.unreadable[0])
        found = {tuple(row): number for number, row in enumerate(batch.items.tolist())}
        rows = [found.get(tuple(row), -1) for row in items.tolist()]
        missing = torch.tensor(rows) < 0
        whole = batch.pick(np.maximum(rows, 0))
        whole.pixels[missing] = self._grey
        whole.labels[missing] = UNLABELLED
        for place in missing.nonzero().flatten().tolist():
            unit, sample, view = items[place].tolist()
            whole.keys[place] = self._views.shards[unit].members().keys[sample]
            whole.views[place] = View(0, 0, 0, 0, False)
            whole.view_keys[place] = view_key(self._views.seed or 0, whole.keys[place], view)
        return replace(whole, items=np.ascontiguousarray(items))


def erase(images: Float[Tensor, "B 3 S S"], view_keys: Int64[Tensor, " B"], probability: float) -> None:
    """timm's random erasing in place: normal noise replaces a box of 2 % to 33 % of the area of some images.

    Args:
        images: standardised images on any device.
        view_keys: identities of the views, on the CPU.
        probability: expected share of erased images.
    """
    if not probability:
        return
    erasing = RandomErasing(probability, mode="pixel", device="cpu")  # equal noise on every device
    with global_generators() as seed:
        for image, key in zip(images, view_keys.tolist(), strict=True):
            seed("erase", key)
            erasing(_Written(image))


class _Written:
    """The interface of an image that `RandomErasing` uses. Writes reach a GPU without waiting for its queue."""

    def __init__(self, image: Float[Tensor, "3 S S"]) -> None:
        self._image, self.dtype = image, image.dtype

    def size(self) -> torch.Size:
        return self._image.size()

    def __setitem__(self, box: Any, noise: Tensor) -> None:
        noise = noise.pin_memory() if self._image.is_cuda else noise
        self._image[box].copy_(noise, non_blocking=True)


class Mixing:
    """timm's Mixup: mixup or CutMix per lane of a batch. Image i of a lane is mixed with image i from its other end.

    timm mixes a GPU's batch. A lane lies on one rank, so mixing lanes is the same for every number of ranks.

    Args:
        config: strengths of mixup and CutMix.
        smoothing: label smoothing.
        num_classes: K.
    """

    def __init__(self, config: AugmentConfig, smoothing: float, num_classes: int) -> None:
        self._smoothing, self._num_classes = smoothing, num_classes
        self._mixup = None
        if config.mixes:
            self._mixup = Mixup(config.mixup, config.cutmix, label_smoothing=smoothing, num_classes=num_classes)

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
        with global_generators() as seed:
            shares = zip(lanes, images.chunk(len(lanes)), labels.chunk(len(lanes)), strict=True)
            for lane, mixed, own in shares:
                # A replacement dims or covers part of its partner, so it gets the partner's label.
                known = torch.where(own == UNLABELLED, own.flip(0), own).clamp(min=0)
                known = known.to(images.device, non_blocking=True)
                if self._mixup is None:
                    targets.append(mixup_target(known, self._num_classes, 1.0, self._smoothing))
                else:
                    seed("mix", *name, lane)
                    targets.append(self._mixup(mixed, known)[1])
        stand_ins = (labels == UNLABELLED).to(images.device, non_blocking=True)
        return torch.cat(targets).masked_fill_(stand_ins[:, None], 0.0)
