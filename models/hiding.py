"""A model that sees a part of an image: patches left out of its input, or a token in the place of patches.

Shapes: B image, P prefix token, N patch, M visible patch, C channel.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timm.models import Eva, Hiera
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError
from tinymim.models.backbone import PlainViT, prefix_tokens, strides


def check_masked(model: nn.Module) -> None:
    """Raises RecipeError where a model cannot run on visible patches alone."""
    if not isinstance(model, PlainViT):
        raise RecipeError(
            f"{type(model).__name__} cannot run on visible patches alone",
            got="a mask",
            expected="a plain ViT, or one with rotary positions",
            hint="leave the mask out",
        )


class _Kept(nn.Module):
    """Stands in the place of timm's patch dropout: after the positions were added, before the first block."""

    def __init__(self, kept: Tensor, prefix: int, returns_indices: bool) -> None:
        super().__init__()
        self._kept, self._prefix, self._returns_indices = kept, prefix, returns_indices

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        found = torch.cat([tokens[:, : self._prefix], take(tokens[:, self._prefix :], self._kept)], dim=1)
        # timm then takes the rows of rotary embeddings at the same indices.
        return (found, self._kept) if self._returns_indices else found


@contextmanager
def seeing(model: nn.Module, kept: Tensor | None) -> Iterator[None]:
    """Within the context, the model runs on its prefix tokens and some patches alone.

    Args:
        model: a plain ViT, or one with rotary positions; of a Hiera, whose patches are mask units of its last stride,
            `forward_features` alone.
        kept: int64 [B, M], raster-order numbers of the patches to keep, in the order that their tokens get; None: all.

    Raises:
        RecipeError: the model cannot leave patches out.
    """
    if kept is None:
        yield
        return
    timm_model: Any = model
    if isinstance(model, Hiera):
        timm_model.forward_features = partial(_hiera_features, timm_model.forward_features, model, kept)
        try:
            yield
        finally:
            del timm_model.forward_features  # the class's method shows again
        return
    check_masked(model)
    held = timm_model.patch_drop
    timm_model.patch_drop = _Kept(kept, prefix_tokens(model), returns_indices=isinstance(model, Eva))
    try:
        yield
    finally:
        timm_model.patch_drop = held


def _hiera_features(whole: Callable[..., Tensor], model: Hiera, kept: Tensor, images: Tensor) -> Tensor:
    """What `forward_features` gives of visible mask units; timm gives them in raster order."""
    visible = kept.new_zeros(len(kept), math.prod(model.mask_spatial_shape), dtype=torch.bool).scatter(1, kept, True)
    return take(whole(images, mask=visible), kept.argsort(dim=1).argsort(dim=1))


def can_drop(model: nn.Module) -> bool:
    """Whether `seeing` can leave patches out of the model's input."""
    if isinstance(model, Hiera):  # a token at the end for each mask unit
        return strides(model)[-1] == model.mask_unit_size[0] * model.patch_stride[0]
    return isinstance(model, PlainViT)


def embedded_stride(model: nn.Module) -> int | None:
    """Pixels along a side of the patches that the model embeds first; None where these overlap or are not square."""
    embedding = getattr(model, "patch_embed", None)
    size = getattr(embedding, "patch_size", None)
    apart = getattr(getattr(embedding, "proj", None), "stride", None) == size
    return int(size[0]) if isinstance(size, tuple) and apart and size[0] == size[-1] else None


def embedded_width(model: nn.Module) -> int:
    """Channels of the embedded patches; 1 where the model embeds none."""
    projection = getattr(getattr(model, "patch_embed", None), "proj", None)
    return int(getattr(projection, "out_channels", 1))


@contextmanager
def replaced(model: nn.Module, hidden: Tensor, token: Tensor) -> Iterator[None]:
    """Within the context, `token` [1, 1, C] stands in the place of hidden embedded patches, bool [B, rows, columns]."""
    timm_model: Any = model

    def replace(_module: nn.Module, _args: Any, patches: Tensor) -> Tensor:
        at = (hidden if patches.ndim == 4 else hidden.flatten(1))[..., None]
        return torch.where(at, token.to(patches.dtype).view(-1), patches)

    handle = timm_model.patch_embed.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def painted(model: nn.Module, kept: Tensor, token: Tensor) -> Iterator[None]:
    """Within the context, `token` [1, 1, C] replaces the embeddings of all patches but `kept`, int64 [B, M]."""
    embedding: Any = model.patch_embed

    def paint(_module: nn.Module, _args: Any, patches: Tensor) -> Tensor:
        visible = torch.zeros(patches.shape[:2], dtype=torch.bool, device=kept.device).scatter(1, kept, True)
        return torch.where(visible[..., None], patches, token.to(patches.dtype))

    handle = embedding.register_forward_hook(paint)
    try:
        yield
    finally:
        handle.remove()


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B, N, C] at index [B, M] -> [B, M, C]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
