"""A student during training: the timm ViT that is exported, and its heads, which are not part of it.

Shapes: B view, S pixel, T token, C width.
"""

from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from tinymim.configs.taps import Shapes
from tinymim.models import backbone
from tinymim.models.drop_path import replace_drop_path, set_drop_masks

Answers = tuple[Tensor, ...]  # of one head; first axis views


class Heads(nn.ModuleList):
    """Several heads on the same tokens [B, T, C]; their answers are a tuple of tuples."""

    def forward(self, tokens: Tensor) -> tuple[Answers, ...]:
        """The answers of each head."""
        return tuple(head(tokens) for head in self)


class StudentModel(nn.Module):
    """A plain ViT with one or more heads on its final tokens, whose answers are compared with the teacher.

    Args:
        vit: the model to export.
        heads: each maps final tokens [B, T, C] to answers, a tuple of tensors.
    """

    def __init__(self, vit: VisionTransformer, *heads: nn.Module) -> None:
        super().__init__()
        self.vit = vit
        self.drop_paths = replace_drop_path(vit)
        # A single head is not in a list, so that the names of its weights in a state are those of older states.
        self.head: nn.Module = heads[0] if len(heads) == 1 else Heads(heads)

    def draw(self, generator: torch.Generator, places: Tensor, batch_size: int) -> None:
        """Draw the stochastic depth of the next forward pass in training; arguments as `set_drop_masks`."""
        set_drop_masks(self.drop_paths, generator, places, batch_size, next(self.parameters()).device)

    def tokens(self, images: Tensor) -> Tensor:
        """The tokens [B, T, C] after the final norm, for normalised images [B, 3, S, S]."""
        tokens: Tensor = self.vit.forward_features(images)
        return tokens

    def forward(self, images: Tensor) -> tuple[Any, ...]:
        """The answers for normalised images [B, 3, S, S]: of the only head, or a tuple of them."""
        answers: tuple[Any, ...] = self.head(self.tokens(images))
        return answers

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        """The heads, in the order given."""
        return tuple(self.head) if isinstance(self.head, Heads) else (self.head,)

    def by_head(self, answers: tuple[Any, ...]) -> tuple[Answers, ...]:
        """What `forward` returned, as a tuple over heads."""
        return answers if isinstance(self.head, Heads) else (answers,)


def shapes_of(vit: nn.Module) -> Shapes:
    """Sizes of a plain ViT; its device may be meta."""
    heads, width = backbone.heads(vit), backbone.widths(vit)[-1]
    assert heads is not None, "a plain ViT has attention"
    (rows, columns), prefix = backbone.grid(vit), backbone.prefix_tokens(vit)
    return Shapes(heads, width // heads, rows * columns + prefix, prefix, (rows, columns))
