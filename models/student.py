"""A student during training: the timm ViT that is exported, and a head, which is not part of it.

Shapes: B view, S pixel, T token, C width.
"""

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from tinymim.configs.taps import Shapes
from tinymim.models import backbone
from tinymim.models.drop_path import replace_drop_path, set_drop_masks


class StudentModel(nn.Module):
    """A plain ViT with a head on its final tokens, whose answers are compared with the teacher.

    Args:
        vit: the model to export.
        head: maps final tokens [B, T, C] to answers, a tuple of tensors.
    """

    def __init__(self, vit: VisionTransformer, head: nn.Module) -> None:
        super().__init__()
        self.vit = vit
        self.drop_paths = replace_drop_path(vit)
        self.head = head

    def draw(self, generator: torch.Generator, places: Tensor, batch_size: int) -> None:
        """Draw the stochastic depth of the next forward pass in training; arguments as `set_drop_masks`."""
        set_drop_masks(self.drop_paths, generator, places, batch_size, next(self.parameters()).device)

    def tokens(self, images: Tensor) -> Tensor:
        """The tokens [B, T, C] after the final norm, for normalised images [B, 3, S, S]."""
        tokens: Tensor = self.vit.forward_features(images)
        return tokens

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The head's answers for normalised images [B, 3, S, S]."""
        answers: tuple[Tensor, ...] = self.head(self.tokens(images))
        return answers


def shapes_of(vit: nn.Module) -> Shapes:
    """Sizes of a plain ViT; its device may be meta."""
    heads, width = backbone.heads(vit), backbone.widths(vit)[-1]
    assert heads is not None, "a plain ViT has attention"
    (rows, columns), prefix = backbone.grid(vit), backbone.prefix_tokens(vit)
    return Shapes(heads, width // heads, rows * columns + prefix, prefix, (rows, columns))
