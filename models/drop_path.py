"""Stochastic depth (Huang et al., ECCV 2016) whose draws are handed in: the same for any ranks, parts and device."""

from collections.abc import Sequence

import torch
from timm.layers import DropPath
from torch import Tensor, nn


class HandedDropPath(nn.Module):
    """timm's DropPath, with the draws of a step's whole batch taken from outside.

    Attributes:
        scale: float32 [B]: 0 for a sample whose path is dropped, else 1 / (1 - drop_prob); set by `set_drop_masks`.
    """

    scale: Tensor | None

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.keep_prob = 1.0 - drop_prob
        self.scale = None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...], whole samples of it scaled; as it is outside training."""
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
                setattr(module, name, HandedDropPath(child.drop_prob or 0.0))
                found.append(getattr(module, name))
    return found


def set_drop_masks(
    paths: Sequence[HandedDropPath],
    generator: torch.Generator,
    places: Tensor,
    batch_size: int,
    device: torch.device,
) -> None:
    """Draw for a whole batch, and keep what belongs to the samples that are computed here.

    Args:
        paths: from `replace_drop_path`.
        generator: on the CPU, whatever the device of the model; named by (run seed, step).
        places: int64 [B] on the CPU, where the samples of the next forward pass stand in the batch over all ranks.
        batch_size: samples of that batch.
        device: where the model is.
    """
    if not paths:
        return
    kept = [torch.empty(batch_size).bernoulli_(path.keep_prob, generator=generator)[places] for path in paths]
    scales = torch.stack([each.div_(path.keep_prob) for each, path in zip(kept, paths, strict=True)])
    for path, scale in zip(paths, scales.to(device, non_blocking=True), strict=True):
        path.scale = scale
