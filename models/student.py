"""A student during training: the timm model that is exported, and its heads, which are not part of it.

Shapes: B view, S pixel, T token, C width.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinymim.configs.taps import Shapes, Tap
from tinymim.models import backbone
from tinymim.models.drop_path import replace_drop_path, set_drop_masks
from tinymim.models.taps import WHOLE_VIEW

Answers = tuple[Tensor, ...]  # of one head; first axis views


class Fit(NamedTuple):
    """How a student's grid of patches becomes a teacher's.

    Attributes:
        pool: side of the squares of patches whose mean is one patch.
        grow: side of the squares of patches that a learned linear layer makes of one patch.
    """

    pool: int = 1
    grow: int = 1


class StudentModel(nn.Module):
    """A model with one or more heads on its final tokens, whose answers are compared with the teacher.

    Args:
        vit: the model to export.
        heads: each maps final tokens [B, T, C] to answers, a tuple of tensors.
        fits: for each head how its tokens are made from the final ones, by `fit_of`; none: the final tokens.
    """

    def __init__(self, vit: nn.Module, *heads: nn.Module, fits: Sequence[Fit] = ()) -> None:
        super().__init__()
        self.vit = vit
        self.fits = tuple(fits) or (Fit(),) * len(heads)
        self.drop_paths = replace_drop_path(vit)
        # A single head is not in a list, so that the names of its weights in a state are those of older states.
        self.head: nn.Module = heads[0] if len(heads) == 1 else nn.ModuleList(heads)
        width = backbone.final_width(vit)
        self.grown = nn.ModuleDict(
            {str(n): nn.Linear(width, fit.grow**2 * width) for n, fit in enumerate(self.fits) if fit.grow > 1}
        )

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm spares from weight decay, such as tables of relative positions."""
        return {f"vit.{name}" for name in getattr(self.vit, "no_weight_decay", set)()}

    def draw(self, generator: torch.Generator, places: Tensor, batch_size: int) -> None:
        """Draw the stochastic depth of the next forward pass in training; arguments as `set_drop_masks`."""
        set_drop_masks(self.drop_paths, generator, places, batch_size, next(self.parameters()).device)

    def tokens(self, images: Tensor) -> Tensor:
        """The tokens [B, T, C] after the final norm, for normalised images [B, 3, S, S]; see `final_tokens`."""
        return final_tokens(self.vit, images)

    def forward(self, images: Tensor) -> tuple[Any, ...]:
        """The answers for normalised images [B, 3, S, S]: of the only head, or a tuple of them."""
        tokens = self.tokens(images)
        answers = tuple(head(self._fitted(tokens, number)) for number, head in enumerate(self.heads))
        return answers if isinstance(self.head, nn.ModuleList) else answers[0]

    def _fitted(self, tokens: Tensor, number: int) -> Tensor:
        """Tokens [B, T, C] as the grid of a head; prefix tokens stay."""
        pool, grow = self.fits[number]
        if pool == grow == 1:
            return tokens
        count = _prefix(self.vit)
        prefix, patches = tokens[:, :count], tokens[:, count:]
        rows, columns = _sides(patches.shape[1])
        if pool > 1:
            patches = patches.unflatten(1, (rows // pool, pool, columns // pool, pool)).mean((2, 4)).flatten(1, 2)
        else:
            squares = self.grown[str(number)](patches).unflatten(2, (grow, grow, -1)).unflatten(1, (rows, columns))
            patches = squares.permute(0, 1, 3, 2, 4, 5).flatten(1, 4)
        return torch.cat([prefix, patches], 1)

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        """The heads, in the order given."""
        return tuple(self.head) if isinstance(self.head, nn.ModuleList) else (self.head,)

    def by_head(self, answers: tuple[Any, ...]) -> tuple[Answers, ...]:
        """What `forward` returned, as a tuple over heads."""
        return answers if isinstance(self.head, nn.ModuleList) else (answers,)


def fit_of(student: Shapes, teacher: Shapes, taps: Sequence[Tap]) -> Fit:
    """How a student's patches become a teacher's at some taps: by a whole factor between their grids, if there is one.

    Tokens are not grown for targets of the whole view, which have no grid.
    """
    pool = _factor(student.grid, teacher.grid)
    grow = 1 if all(tap.kind in WHOLE_VIEW for tap in taps) else _factor(teacher.grid, student.grid)
    return Fit(pool, grow)


def _factor(fine: tuple[int, int], coarse: tuple[int, int]) -> int:
    """The whole number of one grid's cells along a side of the other's; 1 where there is none."""
    sides = {own / its for own, its in zip(fine, coarse, strict=True)}
    side = sides.pop()
    return 1 if sides or side != int(side) else int(side)


def fitted_shapes(student: Shapes, fit: Fit) -> Shapes:
    """The shapes of a student's tokens as a head gets them."""
    rows, columns = (each * fit.grow // fit.pool for each in student.grid)
    return replace(student, tokens=student.prefix_tokens + rows * columns, grid=(rows, columns))


def final_tokens(model: nn.Module, images: Tensor) -> Tensor:
    """The final tokens [B, T, C] of a student.

    In front of a model's map stands the embedding that its classifier reads, in the place of a class token, where it
    has the map's width. So losses on the class token train the pooling and its norm.
    """
    timm_model: Any = model
    features: Tensor = timm_model.forward_features(images)
    tokens = backbone.flat(model, features)
    if not _pooled_first(model):
        return tokens
    return torch.cat([backbone.classified(model, features, logits=False)[:, None], tokens], 1)


def shapes_of(model: nn.Module, img_size: int | None = None) -> Shapes:
    """Sizes of a student's final tokens; its device may be meta.

    Args:
        model: the model to export.
        img_size: side of its input; a plain ViT has one of its own.
    """
    width, prefix = backbone.final_width(model), _prefix(model)
    heads = backbone.heads(model) if backbone.is_plain(model) else _heads(width)
    assert heads is not None, "a plain ViT has attention"
    rows, columns = backbone.grid(model, img_size)
    return Shapes(heads, width // heads, rows * columns + prefix, prefix, (rows, columns))


def _pooled_first(model: nn.Module) -> bool:
    same = backbone.pooled_width(model) == backbone.final_width(model)
    return same and not backbone.is_plain(model) and not backbone.prefix_tokens(model)


def _prefix(model: nn.Module) -> int:
    return backbone.prefix_tokens(model) + _pooled_first(model)


def _heads(width: int) -> int:
    """Heads for the answers of a model that has none of its own: of 32 channels, as far as they divide the width."""
    return math.gcd(width, width // 32) if width >= 64 else 1


def _sides(patches: int) -> tuple[int, int]:
    """Rows and columns of a square image's patches."""
    side = math.isqrt(patches)
    assert side * side == patches, f"{patches} patches of a square image"
    return side, side
