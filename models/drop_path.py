"""Stochastic depth (Huang et al., ECCV 2016) with draws handed in: equal for any ranks, micro-batches and device."""

from collections.abc import Sequence

import torch
from timm.layers import DropPath
from torch import Tensor, nn


class HandedDropPath(nn.Module):
    """timm's DropPath with draws from outside.

    Attributes:
        scale: float32 [B], set by `set_drop_masks`: 0 for a sample whose path is dropped, else 1 / (1 - drop_prob).
    """

    scale: Tensor | None

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.keep_prob = 1.0 - drop_prob
        self.scale = None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] with whole samples scaled; unchanged outside training."""
        if not self.training:
            return x
        assert self.scale is not None, "no draws were handed out"
        return x * self.scale.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def replace_drop_path(model: nn.Module) -> list[HandedDropPath]:
    """Replace every DropPath of a timm model in place. Returns the new ones in the order of a forward pass."""
    found = []
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, DropPath):
                found.append(HandedDropPath(child.drop_prob or 0.0))
                setattr(module, name, found[-1])
    return found


def drop_by(paths: Sequence[HandedDropPath], uniform: Tensor) -> None:
    """Set the draws of the next forward pass by uniform numbers in [0, 1), float64 [B, paths]."""
    for number, path in enumerate(paths):
        path.scale = (uniform[:, number] < path.keep_prob).float() / path.keep_prob


def set_drop_masks(
    paths: Sequence[HandedDropPath],
    generator: torch.Generator,
    places: Tensor,
    batch_size: int,
    device: torch.device,
) -> None:
    """Draw for the batch over all ranks, and set the draws of the samples of the next forward pass.

    Args:
        paths: the modules from `replace_drop_path`.
        generator: a CPU generator, for a model on any device; seeded by (run seed, step).
        places: int64 [B] on the CPU, positions of the next forward pass's samples in the batch over all ranks.
        batch_size: number of samples of the batch over all ranks.
        device: the model's device.
    """
    if not paths:
        return
    kept = [torch.empty(batch_size).bernoulli_(path.keep_prob, generator=generator)[places] for path in paths]
    scales = torch.stack([each.div_(path.keep_prob) for each, path in zip(kept, paths, strict=True)])
    for path, scale in zip(paths, scales.to(device, non_blocking=True), strict=True):
        path.scale = scale
