"""timm's RandAugment, random erasing, mixup and CutMix, with every draw named by (run seed, view) or (run seed, step).

timm draws from the global generators of Python, numpy and torch. Here they are seeded for every image, or for every
lane of a step's batch, and handed back as they were: what an image gets depends on no worker, rank, device or stop.
Unlike a view (docs/views.md) it does depend on the versions of timm, Pillow and Python, which the run folder names.

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
    """Yields a function that seeds Python's, numpy's and torch's CPU generator by a name; at the end all is undone."""
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
    """timm's RandAugment as its training transform builds it, for images of `size` pixels; `mean` (0..1) fills gaps.

    Raises:
        RecipeError: timm does not understand `config`.
    """
    fill = tuple(min(255, round(255 * value)) for value in mean)
    options = {"translate_const": int(size * 0.45), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    try:
        transform: Callable[[Image.Image], Image.Image] = rand_augment_transform(config, options)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise RecipeError(
            "timm does not understand augment.rand_augment",
            got=config,
            expected="something like rand-m9-mstd0.5-inc1, or null",
        ) from error
    return transform


class AugmentedViews:
    """Views with RandAugment upon them, as many as are asked for.

    The place of an image that cannot be read is taken by a grey one without a label, so that all others stay where
    they are in the batch.

    Args:
        views: with a seed.
        config: timm's notation; None: the views as they are.
        mean: of pixels, 0..1.
    """

    def __init__(self, views: ImageViews, config: str | None, mean: Sequence[float]) -> None:
        self.shards = views.shards
        self._views, self._grey = views, torch.tensor(mean).mul(255).round().to(torch.uint8).view(3, 1, 1)
        self._transform = None if config is None else rand_augment(config, views.law.size, mean)

    def batch(self, items: Items) -> ViewBatch:
        """The views that `items` [B, 3 or more] names, B of them."""
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
    """timm's random erasing in place: of a share of the images a box of 2 % to a third becomes normal noise.

    Args:
        images: standardised, on any device.
        view_keys: on the CPU.
        probability: the share.
    """
    if not probability:
        return
    erasing = RandomErasing(probability, mode="pixel", device="cpu")  # drawn there for every device
    with global_generators() as seed:
        for image, key in zip(images, view_keys.tolist(), strict=True):
            seed("erase", key)
            erasing(_Written(image))


class _Written:
    """An image as `RandomErasing` uses one: what it writes goes to a GPU without waiting for what that is at."""

    def __init__(self, image: Float[Tensor, "3 S S"]) -> None:
        self._image, self.dtype = image, image.dtype

    def size(self) -> torch.Size:
        return self._image.size()

    def __setitem__(self, box: Any, noise: Tensor) -> None:
        noise = noise.pin_memory() if self._image.is_cuda else noise
        self._image[box].copy_(noise, non_blocking=True)


class Mixing:
    """timm's Mixup: of every batch of a lane either mixup or CutMix, each image with the one at the lane's other end.

    A lane is what a GPU's batch is to timm: it lies on one rank, so the mixture is the same for every number of ranks.

    Args:
        config: which of both, how strongly.
        smoothing: of labels.
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
            images: of whole lanes, one after the other.
            labels: on the CPU; `UNLABELLED` for the stand-in of an image that cannot be read.
            lanes: their numbers.
            name: of the draws: run seed, step.

        Returns:
            the targets, which sum to one; those of stand-ins are zero, and train nothing.
        """
        targets = []
        with global_generators() as seed:
            shares = zip(lanes, images.chunk(len(lanes)), labels.chunk(len(lanes)), strict=True)
            for lane, mixed, own in shares:
                # A stand-in dims its partner, or covers part of it, and has the partner's label.
                known = torch.where(own == UNLABELLED, own.flip(0), own).clamp(min=0)
                known = known.to(images.device, non_blocking=True)
                if self._mixup is None:
                    targets.append(mixup_target(known, self._num_classes, 1.0, self._smoothing))
                else:
                    seed("mix", *name, lane)
                    targets.append(self._mixup(mixed, known)[1])
        stand_ins = (labels == UNLABELLED).to(images.device, non_blocking=True)
        return torch.cat(targets).masked_fill_(stand_ins[:, None], 0.0)
