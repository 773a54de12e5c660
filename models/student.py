"""A student during training: the timm model that is exported, and its heads, which are not part of it.

Shapes: B view, S pixel, T token, C width.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError
from tinymim.configs.sections.decoders import MimConfig
from tinymim.configs.sections.models import ModelConfig
from tinymim.configs.taps import Shapes, Tap
from tinymim.models import backbone, hiding
from tinymim.models.custom import own_shapes, require_student
from tinymim.models.decoder import LightDecoder, pixels_decoder
from tinymim.models.drop_path import replace_drop_path, set_drop_masks
from tinymim.models.taps import WHOLE_VIEW, check_tap, inner, joined
from tinymim.models.vit import build_model, build_timm_student

Answers = tuple[Tensor, ...]  # of one head; first axis views


class Fit(NamedTuple):
    """How a student's grid of patches becomes a teacher's.

    Attributes:
        pool: side of the squares of patches whose mean is one patch.
        grow: side of the squares of patches that a learned linear layer makes of one patch.
    """

    pool: int = 1
    grow: int = 1


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
    """A model with one or more heads on its tokens, whose answers are compared with the teacher.

    Args:
        vit: the model to export: a timm ViT, or a module that `build_student` makes.
        heads: each maps final tokens [B, T, C] to answers, a tuple of tensors.
        fits: for each head how its tokens are made from those it reads, by `fit_of`; none: as they are.
        reads: for each head the tap inside a plain ViT that it reads, as `taps.joined` gives it; None: the final
            tokens, which all heads read by default.
        paints: put a learned token in place of hidden patches; else they are dropped.
        mim: the loss on hidden patches; None: there is none.
    """

    def __init__(
        self,
        vit: nn.Module,
        *heads: nn.Module,
        fits: Sequence[Fit] = (),
        reads: Sequence[Tap | None] = (),
        paints: bool = False,
        mim: MimConfig | None = None,
    ) -> None:
        super().__init__()
        self.vit: Any = vit  # timm carries no types for what is read of it
        self.mask_token: nn.Parameter | None = None
        if paints:
            self.mask_token = nn.Parameter(torch.empty(1, 1, backbone.widths(vit)[-1]).normal_(std=0.02))
        self.mim_reads = None if mim is None or mim.block is None else Tap("tokens", mim.block)
        self.decoder: LightDecoder | None = None
        if mim is not None:
            self.decoder = LightDecoder(vit, *pixels_decoder(mim), normed=mim.block is not None)
        self.fits = tuple(fits) or (Fit(),) * len(heads)
        self.reads = tuple(reads) or (None,) * len(heads)
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

    def tokens(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """The tokens [B, T, C] after the final norm, for normalised images [B, 3, S, S]; see `final_tokens`.

        `kept`, int64 [B, M], are the visible patches; None: all are.
        """
        if kept is None or self.mask_token is None:
            hidden = hiding.seeing(self.vit, kept)
        else:
            hidden = hiding.painted(self.vit, kept, self.mask_token)
        with hidden:
            return final_tokens(self.vit, images)

    def answers(self, images: Tensor, kept: Tensor | None = None) -> tuple[Answers, ...]:
        """The answers of every head for normalised images [B, 3, S, S]; `kept` is as for `tokens`."""
        return self._answers(self._read(images, kept), images.shape[-1])

    def forward(self, images: Tensor, kept: Tensor | None = None) -> tuple[Any, ...]:
        """The answers for normalised images [B, 3, S, S]: of the only head, or a tuple of them.

        With a decoder, a tuple of them and the scalar loss on hidden patches; `kept` is as for `tokens`.
        """
        if self.decoder is None:
            answers = self.answers(images, kept)
            return answers if isinstance(self.head, nn.ModuleList) else answers[0]
        assert kept is not None, "a loss on hidden patches needs a mask"
        read = self._read(images, kept)
        return *self._answers(read, images.shape[-1]), self._mim(self.decoder, read[self.mim_reads], images, kept)

    def _read(self, images: Tensor, kept: Tensor | None) -> dict[Tap | None, Tensor]:
        """What heads and decoder read, by tap; None: the final tokens."""
        with ExitStack() as hooks:
            taps = {tap for tap in (*self.reads, self.mim_reads) if tap is not None}
            found = {tap: hooks.enter_context(inner(self.vit, tap)) for tap in taps}
            tokens = self.tokens(images, kept)
        return {None: tokens} | {tap: joined(tap, tensors) for tap, tensors in found.items()}

    def _answers(self, read: Mapping[Tap | None, Tensor], img_size: int) -> tuple[Answers, ...]:
        each = zip(self.heads, self.reads, strict=True)
        return tuple(head(self._fitted(read[tap], img_size, number)) for number, (head, tap) in enumerate(each))

    def _mim(self, decoder: LightDecoder, tokens: Tensor, images: Tensor, kept: Tensor) -> Tensor:
        rows, columns = backbone.grid(self.vit)
        hidden = torch.ones(len(kept), rows * columns, dtype=torch.int8, device=kept.device).scatter(1, kept, 0)
        # Stable: visible patches, then hidden ones, both ascending. No size depends on the values, so no GPU waits.
        ranks = hidden.argsort(dim=1, stable=True)
        return nn.functional.mse_loss(*decoder.compared(tokens, images, ranks, kept.shape[1]))

    def _fitted(self, tokens: Tensor, img_size: int, number: int) -> Tensor:
        """Tokens [B, T, C] as the grid of a head; prefix tokens stay."""
        pool, grow = self.fits[number]
        if pool == grow == 1:
            return tokens
        shapes = shapes_of(self.vit, img_size)
        prefix, patches = tokens[:, : shapes.prefix_tokens], tokens[:, shapes.prefix_tokens :]
        rows, columns = shapes.grid
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
        """What `forward` returned, as a tuple over heads, without the loss of a decoder."""
        if self.decoder is not None:
            return answers[:-1]
        return answers if isinstance(self.head, nn.ModuleList) else (answers,)


def fit_of(student: Shapes, teacher: Shapes, taps: Sequence[Tap]) -> Fit:
    """How a student's patches become a teacher's at some taps: by a whole factor between their grids, if there is one.

    Masked tokens stay as they are. Tokens are not grown for targets of the whole view, which have no grid.
    """
    if student.masked or teacher.masked:
        return Fit()
    pool = _factor(student.grid, teacher.grid)
    grow = 1 if all(tap.kind in WHOLE_VIEW for tap in taps) else _factor(teacher.grid, student.grid)
    return Fit(pool, grow)


def _factor(fine: tuple[int, int], coarse: tuple[int, int]) -> int:
    """The whole number of one grid's cells along a side of the other's; 1 where there is none."""
    sides = {own / its for own, its in zip(fine, coarse, strict=True)}
    side = sides.pop()
    return 1 if sides or side != int(side) else int(side)


def check_inner(model: nn.Module, tap: Tap, fit: Fit) -> None:
    """Make a student ready for a head at a tap inside it, which is one of its blocks.

    Raises:
        RecipeError: it has no such block; or the head reads its attention, and its grid is not the teacher's, or the
            tap does not support the attention layer.
    """
    depth = len(backbone.blocks(model)) if backbone.is_plain(model) else 0
    if not 1 <= tap.place <= depth:
        raise RecipeError(
            "student_block is outside the student" if depth else "student_block needs a plain ViT, which has blocks",
            got=tap.place if depth else f"{type(model).__name__}, student_block {tap.place}",
            expected=f"1..{depth}" if depth else "a plain ViT as student",
            hint="leave student_block out: a head then reads the final tokens",
        )
    if tap.kind == "tokens":
        return
    check_tap(model, tap)
    if fit != Fit():
        raise RecipeError(
            "student_block compares the student's own attention, whose grid is not the teacher's",
            got=f"patches {'pooled' if fit.pool > 1 else 'grown'} by {max(fit)} a side",
            expected="equal grids",
            hint="leave student_block out, or train on a target of tokens (features, ff, cls)",
        )


def fitted_shapes(student: Shapes, fit: Fit) -> Shapes:
    """The shapes of a student's tokens as a head gets them."""
    if fit == Fit():
        return student
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
    if (own := own_shapes(model)) is not None:
        return own
    width, prefix = backbone.final_width(model), _prefix(model)
    heads = backbone.heads(model) if backbone.is_plain(model) else _heads(width)
    assert heads is not None, "a plain ViT has attention"
    rows, columns = backbone.grid(model, img_size)
    return Shapes(heads, width // heads, rows * columns + prefix, prefix, (rows, columns))


def _pooled_first(model: nn.Module) -> bool:
    if own_shapes(model) is not None or backbone.is_plain(model) or backbone.prefix_tokens(model):
        return False
    return backbone.pooled_width(model) == backbone.final_width(model)


def _prefix(model: nn.Module) -> int:
    return backbone.prefix_tokens(model) + _pooled_first(model)


def _heads(width: int) -> int:
    """Heads for the answers of a model that has none of its own: of 32 channels, as far as they divide the width."""
    return math.gcd(width, width // 32) if width >= 64 else 1
