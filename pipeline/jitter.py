"""Photometric jitter for students, on the device (I3): batched, seeded by (run seed, step, place in the batch).

The law is torchvision's ColorJitter without hue. Brightness, contrast and saturation factors are uniform in
[1 - x, 1 + x] and applied in a random order per sample. Each result is clamped to the pixel range.
"""

import itertools
from functools import cache

import torch
from torch import Tensor

from tinymim.configs.sections.augment import JitterConfig

_ORDERS = tuple(itertools.permutations(range(3)))
_LUMA = (0.2989, 0.587, 0.114)  # torchvision's greyscale weights


def jitter(
    pixels: Tensor,
    config: JitterConfig,
    generator: torch.Generator,
    places: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Jitter a batch of views. A sample's jitter depends only on the generator and its place in the step's batch.

    Args:
        pixels: uint8 or float [B, 3, S, S] in 0..255.
        config: the three strengths.
        generator: a CPU generator for any device of the pixels, seeded by (run seed, step).
        places: int64 [B] on the CPU, the places of these samples in the step's batch over all ranks; None: they are
            the whole batch, in order.
        batch_size: samples of the whole batch; required with `places`.

    Returns:
        float32 [B, 3, S, S] in 0..255.
    """
    images = pixels.float()
    strengths = (config.brightness, config.contrast, config.saturation)
    if not any(strengths):
        return images
    # Drawn for the whole batch and on the CPU, so that a place gets the same numbers on every rank and device.
    draws = torch.rand(batch_size or len(images), 4, generator=generator)
    if places is not None:
        draws = draws[places]
    factors = 1.0 + torch.tensor(strengths) * (2.0 * draws[:, :3] - 1.0)
    orders = (draws[:, 3] * len(_ORDERS)).long().clamp_(max=len(_ORDERS) - 1)
    return apply_jitter(
        images, factors.to(images.device, non_blocking=True), orders.to(images.device, non_blocking=True)
    )


def apply_jitter(images: Tensor, factors: Tensor, orders: Tensor) -> Tensor:
    """Blend with black, with the mean grey and with the grey image, in each sample's order.

    Args:
        images: float [B, 3, S, S] in 0..255.
        factors: float [B, 3]: brightness, contrast, saturation.
        orders: int64 [B], the index of the order, 0..5.

    Returns:
        float [B, 3, S, S] in 0..255.
    """
    all_orders, luma = _tables(images.device, images.dtype)
    table = all_orders[orders]  # [B, 3]
    for place in range(3):
        kind = table[:, place].view(-1, 1, 1, 1)
        factor = factors.gather(1, table[:, place : place + 1]).view(-1, 1, 1, 1)
        grey = (images * luma).sum(dim=1, keepdim=True)
        mean = grey.mean(dim=(2, 3), keepdim=True)
        other = torch.where(kind == 0, torch.zeros_like(grey), torch.where(kind == 1, mean.expand_as(grey), grey))
        images = (other + factor * (images - other)).clamp(0.0, 255.0)
    return images


@cache
def _tables(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Orders [6, 3] and luma [1, 3, 1, 1] on a device. Cached, since every copy would wait for the GPU."""
    luma = torch.tensor(_LUMA, device=device, dtype=dtype).view(1, 3, 1, 1)
    return torch.tensor(_ORDERS, device=device), luma
