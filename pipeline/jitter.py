"""Student-only photometric jitter on the device (I3): batched, seeded by (run seed, step, sample).

The law of torchvision's ColorJitter without hue: brightness, contrast and saturation factors uniform in
[1 - x, 1 + x], applied in an order drawn per sample, each result clamped to the pixel range.
"""

import itertools

import torch
from torch import Tensor

from tinymim.configs.schema import JitterConfig

_ORDERS = tuple(itertools.permutations(range(3)))
_LUMA = (0.2989, 0.587, 0.114)  # torchvision's greyscale weights


def jitter(pixels: Tensor, config: JitterConfig, generator: torch.Generator) -> Tensor:
    """Jitter a batch of views.

    Args:
        pixels: uint8 or float [B, 3, S, S] in 0..255.
        config: the three strengths.
        generator: on the pixels' device; named by (run seed, step).

    Returns:
        float32 [B, 3, S, S] in 0..255.
    """
    images = pixels.float()
    strengths = torch.tensor([config.brightness, config.contrast, config.saturation], device=images.device)
    if not bool(strengths.any()):
        return images
    draws = torch.rand(len(images), 4, device=images.device, generator=generator)
    factors = 1.0 + strengths * (2.0 * draws[:, :3] - 1.0)
    orders = (draws[:, 3] * len(_ORDERS)).long().clamp_(max=len(_ORDERS) - 1)
    return apply_jitter(images, factors, orders)


def apply_jitter(images: Tensor, factors: Tensor, orders: Tensor) -> Tensor:
    """Blend with black, with the mean grey and with the grey image, in each sample's order.

    Args:
        images: float [B, 3, S, S] in 0..255.
        factors: float [B, 3]: brightness, contrast, saturation.
        orders: int64 [B], which of the six orders.

    Returns:
        float [B, 3, S, S] in 0..255.
    """
    table = torch.tensor(_ORDERS, device=images.device)[orders]  # [B, 3]
    luma = torch.tensor(_LUMA, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    for place in range(3):
        kind = table[:, place].view(-1, 1, 1, 1)
        factor = factors.gather(1, table[:, place : place + 1]).view(-1, 1, 1, 1)
        grey = (images * luma).sum(dim=1, keepdim=True)
        mean = grey.mean(dim=(2, 3), keepdim=True)
        other = torch.where(kind == 0, torch.zeros_like(grey), torch.where(kind == 1, mean.expand_as(grey), grey))
        images = (other + factor * (images - other)).clamp(0.0, 255.0)
    return images
