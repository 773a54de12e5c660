"""Queries, keys and values of one attention block of any timm ViT, and a teacher that stops right there.

The tap is the call of scaled dot-product attention itself, so it sees q and k after their norms and rotary
embeddings, for fused, split and biased qkv layers alike, without a copy of any model's forward.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tinymim.configs.errors import RecipeError
from tinymim.models import backbone
from tinymim.models.drop_path import replace_drop_path, set_drop_masks

Projections = tuple[Tensor, Tensor, Tensor]  # q, k, v, each [B, H, T, D]
TappedBlock = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, and the input [B, T, C] of their projection


class _Tapped(Exception):
    """Leaves the forward pass once q, k and v are at hand."""

    def __init__(self, projections: Projections, x: Tensor) -> None:
        self.block: TappedBlock = (*projections, x)


class _AttentionTap(TorchFunctionMode):
    """Raises `_Tapped` at the first attention call; `x` is the attention layer's input."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            raise _Tapped((args[0], args[1], args[2]), self.x)
        return func(*args, **(kwargs or {}))


class CutTeacher(nn.Module):
    """A teacher cut right after block `block`'s q, k, v: nothing behind them is computed or kept.

    Args:
        model: a timm ViT.
        block: the block, counted from 1.

    Raises:
        RecipeError: the model has no such block.
    """

    def __init__(self, model: nn.Module, block: int) -> None:
        super().__init__()
        blocks = backbone.blocks(model)
        if not 1 <= block <= len(blocks):
            raise RecipeError("teacher.block is outside the teacher", got=block, expected=f"1..{len(blocks)}")
        self.model = model
        self.attention: nn.Module = backbone.attention(model, block)
        if not hasattr(self.attention, "fused_attn"):
            raise RecipeError(
                f"the tap does not know the attention layer {type(self.attention).__name__}",
                hint="use a ViT whose attention calls scaled_dot_product_attention",
            )
        self.attention.fused_attn = True  # type: ignore[assignment]  # the unfused path makes no call to tap
        del blocks[block:]

    def compile_blocks(self) -> None:
        """Compile what is whole: the blocks before the tapped one, of which only norm1 and qkv are run."""
        for block in backbone.blocks(self.model)[:-1]:
            block.compile()

    def forward(self, images: Tensor) -> TappedBlock:
        """q, k, v of the block, each [B, H, T, D], and its normed input [B, T, C], for normalised [B, 3, S, S]."""
        try:
            with ExitStack() as armed:

                def arm(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                    # Only now: blocks that are compiled do not run below a mode.
                    armed.enter_context(_AttentionTap(args[0]))

                armed.callback(self.attention.register_forward_pre_hook(arm).remove)
                self.model.forward_features(images)  # type: ignore[operator]
        except _Tapped as tapped:
            return tapped.block
        raise RecipeError(
            "the teacher's block never called attention", got=type(self.attention).__name__, expected="a plain ViT"
        )


def split_qkv(qkv: Tensor, heads: int) -> Projections:
    """[B, T, 3 x H x D] -> q, k, v, each [B, H, T, D], in timm's (and MAE's) layout."""
    batch, tokens, width = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


class StudentWithTap(nn.Module):
    """A plain ViT with a qkv projection on its final norm, the place where it is compared with the teacher.

    The tap is the norm1 + qkv of a thirteenth block whose norm *is* the exported model's final norm: all twelve
    blocks and the norm are trained by the relation loss, and only `tap`, of no use without a teacher, is dropped
    at export (docs/decisions/002-thirteenth-tap.md).
    """

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit
        heads, width = backbone.heads(vit), backbone.widths(vit)[-1]
        assert heads is not None, "a plain ViT has attention"
        self.heads = heads
        self.drop_paths = replace_drop_path(vit)
        self.tap = nn.Linear(width, 3 * width)
        nn.init.xavier_uniform_(self.tap.weight)
        nn.init.zeros_(self.tap.bias)

    def draw(self, generator: torch.Generator, places: Tensor, batch_size: int) -> None:
        """Draw the stochastic depth of the next forward pass in training; arguments of `drop_path.set_drop_masks`."""
        set_drop_masks(self.drop_paths, generator, places, batch_size, self.tap.weight.device)

    def forward(self, images: Tensor) -> Projections:
        """q, k, v in the student's own heads, each [B, H, T, D], for normalised images [B, 3, S, S]."""
        return split_qkv(self.tap(self.vit.forward_features(images)), self.heads)
