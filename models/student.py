"""A student during training: the timm ViT that is exported, and its heads, which are not part of it.

Shapes: B view, S pixel, T token, C width.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from tinymim.configs.sections import MimConfig, ModelConfig
from tinymim.configs.taps import Shapes
from tinymim.models import backbone
from tinymim.models.custom import own_shapes, require_student
from tinymim.models.drop_path import replace_drop_path, set_drop_masks
from tinymim.models.mae import PixelDecoder
from tinymim.models.vit import build_model, build_timm_student

Answers = tuple[Tensor, ...]  # of one head; first axis views


def build_student(config: ModelConfig, drop_path: float = 0.0) -> nn.Module:
    """The student of a recipe: timm's model, from `build_timm_student`, or the module of its factory.

    A factory decides over its module's initial weights and drop path.

    Raises:
        RecipeError: it cannot be built, or `custom.require_student` refuses it.
    """
    if config.factory is None:
        return build_timm_student(config, drop_path)
    model = build_model(config)
    if not isinstance(model, VisionTransformer):
        require_student(model, config.img_size)
    return model


class StudentModel(nn.Module):
    """A plain ViT with one or more heads on its final tokens, whose answers are compared with the teacher.

    Args:
        vit: the model to export: a timm ViT, or a module that `build_student` makes.
        heads: each maps final tokens [B, T, C] to answers, a tuple of tensors.
        pools: for each head the side of the squares of patches whose mean it gets, from `pool_side`; none: 1.
        paints: put a learned token in place of hidden patches; else they are dropped.
        mim: the loss on hidden patches; None: there is none.
    """

    def __init__(
        self,
        vit: nn.Module,
        *heads: nn.Module,
        pools: Sequence[int] = (),
        paints: bool = False,
        mim: MimConfig | None = None,
    ) -> None:
        super().__init__()
        self.vit: Any = vit  # timm carries no types for what is read of it
        self.mask_token: nn.Parameter | None = None
        if paints:
            self.mask_token = nn.Parameter(torch.empty(1, 1, backbone.widths(vit)[-1]).normal_(std=0.02))
        self.mim_block = None if mim is None else mim.block
        self.decoder = None if mim is None else PixelDecoder(vit, mim, normed=mim.block is not None)
        self.pools = tuple(pools) or (1,) * len(heads)
        self.drop_paths = replace_drop_path(vit)
        # A single head is not in a list, so that the names of its weights in a state are those of older states.
        self.head: nn.Module = heads[0] if len(heads) == 1 else nn.ModuleList(heads)

    def draw(self, generator: torch.Generator, places: Tensor, batch_size: int) -> None:
        """Draw the stochastic depth of the next forward pass in training; arguments as `set_drop_masks`."""
        set_drop_masks(self.drop_paths, generator, places, batch_size, next(self.parameters()).device)

    def tokens(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """The tokens [B, T, C] after the final norm, for normalised images [B, 3, S, S].

        `kept`, int64 [B, M], are the visible patches; None: all are.
        """
        if kept is None or self.mask_token is None:
            hidden = backbone.seeing(self.vit, kept)
        else:
            hidden = backbone.painted(self.vit, kept, self.mask_token)
        with hidden:
            tokens: Tensor = self.vit.forward_features(images)
        return tokens

    def answers(self, images: Tensor, kept: Tensor | None = None) -> tuple[Answers, ...]:
        """The answers of every head for normalised images [B, 3, S, S]; `kept` is as for `tokens`."""
        return self._answers(self.tokens(images, kept))

    def forward(self, images: Tensor, kept: Tensor | None = None) -> tuple[Any, ...]:
        """The answers for normalised images [B, 3, S, S]: of the only head, or a tuple of them.

        With a decoder, a tuple of them and the scalar loss on hidden patches; `kept` is as for `tokens`.
        """
        if self.decoder is None:
            answers = self.answers(images, kept)
            return answers if isinstance(self.head, nn.ModuleList) else answers[0]
        assert kept is not None, "a loss on hidden patches needs a mask"
        if self.mim_block is None:
            tokens = read = self.tokens(images, kept)
        else:
            with backbone.tokens_after(self.vit, self.mim_block) as found:
                tokens = self.tokens(images, kept)
            [read] = found
        return *self._answers(tokens), self._mim(self.decoder, read, images, kept)

    def _answers(self, tokens: Tensor) -> tuple[Answers, ...]:
        shapes = shapes_of(self.vit)
        return tuple(head(_pooled(tokens, shapes, side)) for head, side in zip(self.heads, self.pools, strict=True))

    def _mim(self, decoder: PixelDecoder, tokens: Tensor, images: Tensor, kept: Tensor) -> Tensor:
        rows, columns = backbone.grid(self.vit)
        hidden = torch.ones(len(kept), rows * columns, dtype=torch.int8, device=kept.device).scatter(1, kept, 0)
        # Stable: visible patches, then hidden ones, both ascending. No size depends on the values, so no GPU waits.
        return decoder.error(tokens, images, hidden.argsort(dim=1, stable=True), kept.shape[1])

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        """The heads, in the order given."""
        return tuple(self.head) if isinstance(self.head, nn.ModuleList) else (self.head,)

    def by_head(self, answers: tuple[Any, ...]) -> tuple[Answers, ...]:
        """What `forward` returned, as a tuple over heads, without the loss of a decoder."""
        if self.decoder is not None:
            return answers[:-1]
        return answers if isinstance(self.head, nn.ModuleList) else (answers,)


def pool_side(student: Shapes, teacher: Shapes) -> int:
    """The whole number of student patches along a side of a teacher patch; 1 where there is none, or a mask."""
    if student.masked or teacher.masked:
        return 1
    sides = {own / its for own, its in zip(student.grid, teacher.grid, strict=True)}
    side = sides.pop()
    return 1 if sides or side != int(side) else int(side)


def pooled_shapes(student: Shapes, side: int) -> Shapes:
    """The shapes of a student's tokens after `side` x `side` patches have become one."""
    if side == 1:
        return student
    rows, columns = (each // side for each in student.grid)
    return replace(student, tokens=student.prefix_tokens + rows * columns, grid=(rows, columns))


def _pooled(tokens: Tensor, shapes: Shapes, side: int) -> Tensor:
    """Tokens [B, T, C] with the mean of every square of `side` x `side` patches; prefix tokens stay."""
    if side == 1:
        return tokens
    prefix, patches = tokens[:, : shapes.prefix_tokens], tokens[:, shapes.prefix_tokens :]
    rows, columns = (each // side for each in shapes.grid)
    squares = patches.unflatten(1, (rows, side, columns, side))
    return torch.cat([prefix, squares.mean((2, 4)).flatten(1, 2)], 1)


def shapes_of(vit: nn.Module) -> Shapes:
    """Sizes of a student; its device may be meta."""
    if (own := own_shapes(vit)) is not None:
        return own
    heads, width = backbone.heads(vit), backbone.widths(vit)[-1]
    assert heads is not None, "a plain ViT has attention"
    (rows, columns), prefix = backbone.grid(vit), backbone.prefix_tokens(vit)
    return Shapes(heads, width // heads, rows * columns + prefix, prefix, (rows, columns))
