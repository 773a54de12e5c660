"""Masked image modelling with any encoder: hide squares of an image, predict what they hold, compare there alone.

How squares are hidden is one choice, what is predicted another: FastMIM paints pixels and predicts HOG (Guo et al.,
2022), SimMIM replaces embedded patches by a token and predicts pixels (Xie et al., CVPR 2022), MAE leaves patches out
(He et al., CVPR 2022).

Shapes: B image, S pixel, U square of the mask, N cell of the encoder's last grid, M cell that is compared, F feature.
"""

import math

import torch
from jaxtyping import Bool, Float, Int64
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError
from tinymim.configs.sections import LightDecoderConfig, PredictedConfig, PretrainMaskConfig
from tinymim.models import backbone
from tinymim.models.hog import CELL, FEATURES, hog
from tinymim.models.vit import patchify, sincos_table


class MaskedModel(nn.Module):
    """An encoder, a light decoder, and the mean squared error of what is predicted of hidden squares.

    Args:
        encoder: the model to export; plain ViT, windowed, pyramid or convolutional.
        img_size: side of its input.
        mask: which squares are hidden, and how.
        target: what is predicted.
        decoder: sizes of the decoder.

    Raises:
        RecipeError: the squares do not fit the image or the encoder's cells, or the encoder cannot hide them this way.
    """

    position: Tensor | None

    def __init__(
        self,
        encoder: nn.Module,
        img_size: int,
        mask: PretrainMaskConfig,
        target: PredictedConfig,
        decoder: LightDecoderConfig,
    ) -> None:
        super().__init__()
        self.hide, self.target = mask.hide, target
        self.stride, self.prefix = backbone.strides(encoder)[-1], backbone.prefix_tokens(encoder)
        self.num_visible = mask.num_visible(img_size)
        self.block, self.cell = mask.block, min(mask.block, self.stride)
        self._check(encoder, mask)
        self.encoder = encoder
        rows, columns = backbone.grid(encoder, img_size)
        self.hidden_paint = nn.Parameter(_paint_shape(encoder, self.hide, decoder.dim))
        nn.init.normal_(self.hidden_paint, std=0.02)
        self.decoder_embed = nn.Linear(backbone.final_width(encoder), decoder.dim)
        table = sincos_table(decoder.dim, rows, columns, prefix=self.prefix) if decoder.position else None
        self.register_buffer("position", table)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder.dim, decoder.heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(decoder.depth)
        )
        self.decoder_norm = LayerNorm(decoder.dim)
        self.decoder_pred = nn.Linear(decoder.dim, (self.stride // self.cell) ** 2 * num_features(target, self.cell))
        for name, module in self.named_modules():
            if name.startswith("decoder") and isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def _check(self, encoder: nn.Module, mask: PretrainMaskConfig) -> None:
        large, small = max(self.block, self.stride), self.cell
        if large % small:
            raise RecipeError(
                "mask.block does not fit the encoder's cells",
                got=f"{self.block} pixels, cells of {self.stride}",
                expected=f"a multiple or a divisor of {self.stride}",
            )
        if self.target.name == "hog" and small % CELL:
            raise RecipeError(
                "HOG needs squares and cells of whole 8 x 8 pixels",
                got=f"mask.block {self.block}, cells of {self.stride}",
                expected="multiples of 8",
            )
        if mask.hide == "drop" and self.block % self.stride:
            raise RecipeError(
                "only whole patches can be dropped",
                got=f"mask.block {self.block}, patches of {self.stride}",
                expected=f"a multiple of {self.stride}",
            )
        if mask.hide == "drop" and not backbone.can_drop(encoder):
            raise RecipeError(
                f"{type(encoder).__name__} cannot leave patches out",
                got="mask.hide: drop",
                expected="a plain ViT",
                hint="mask.hide=paint, which any encoder can",
            )
        if mask.hide == "token":
            side = backbone.embedded_stride(encoder)
            if side is None or self.block % side:
                raise RecipeError(
                    f"{type(encoder).__name__} has no embedded patches that fit mask.block"
                    if side
                    else f"{type(encoder).__name__} embeds no patches that a token could replace",
                    got=f"mask.block {self.block}" + (f", patches of {side}" if side else ""),
                    hint=f"mask.block={max(1, self.block // side) * side}" if side else "mask.hide=paint",
                )

    def forward(self, images: Float[Tensor, "B 3 S S"], order: Int64[Tensor, "B U"]) -> Tensor:
        """The loss, a scalar.

        Args:
            images: normalised pixels; the target is computed from these.
            order: the place of each square, in raster order, in the order in which squares stay visible.
        """
        side = math.isqrt(order.shape[1])
        hidden = (order >= self.num_visible).unflatten(1, (side, side))
        predicted = self._predicted(self._encoded(images, hidden))
        error = (predicted - self._target(images).to(predicted.dtype)).square().mean(-1)
        compared = _grown(hidden, self.block // self.cell).flatten(1)
        return error[compared].mean()  # all images hide as many cells

    def _encoded(self, images: Tensor, hidden: Bool[Tensor, "B R R"]) -> Tensor:
        """The encoder's tokens [B, P + N, C] of images with hidden squares; with `drop`, of visible patches alone."""
        if self.hide == "paint":
            at = _grown(hidden, self.block)[:, None]
            return backbone.tokens_at(self.encoder, torch.where(at, self.hidden_paint.to(images.dtype), images), None)
        if self.hide == "token":
            side = backbone.embedded_stride(self.encoder)
            assert side is not None  # by `_check`
            with backbone.replaced(self.encoder, _grown(hidden, self.block // side), self.hidden_paint):
                return backbone.tokens_at(self.encoder, images, None)
        patches = _grown(hidden, self.block // self.stride).flatten(1)
        kept = (~patches).nonzero()[:, 1].view(len(images), -1)
        with backbone.seeing(self.encoder, kept):
            tokens = backbone.tokens_at(self.encoder, images, None)
        # The decoder's width: what stands in the place of dropped patches is put in behind `decoder_embed`.
        embedded = self.decoder_embed(tokens)
        raster = self.hidden_paint.to(embedded.dtype).expand(len(images), patches.shape[1], -1)
        raster = raster.scatter(1, kept[..., None].expand(-1, -1, raster.shape[2]), embedded[:, self.prefix :])
        return torch.cat([embedded[:, : self.prefix], raster], 1)

    def _predicted(self, tokens: Tensor) -> Float[Tensor, "B M F"]:
        x = tokens if self.hide == "drop" else self.decoder_embed(tokens)
        x = x if self.position is None else x + self.position
        for block in self.decoder_blocks:
            x = block(x)
        cells = self.decoder_pred(self.decoder_norm(x))[:, self.prefix :]
        side, parts = math.isqrt(cells.shape[1]), self.stride // self.cell
        squares = cells.unflatten(2, (parts, parts, -1)).unflatten(1, (side, side))
        found: Tensor = squares.permute(0, 1, 3, 2, 4, 5).flatten(1, 4)
        return found

    @torch.no_grad()
    def _target(self, images: Tensor) -> Float[Tensor, "B M F"]:
        return features(images, self.target, self.cell)


def num_features(target: PredictedConfig, cell: int) -> int:
    """Numbers that are predicted of a cell of `cell` x `cell` pixels."""
    return 3 * cell**2 if target.name == "pixels" else FEATURES * (cell // CELL) ** 2


def features(images: Float[Tensor, "B 3 S S"], target: PredictedConfig, cell: int) -> Float[Tensor, "B M F"]:
    """What is predicted of every cell of `cell` x `cell` pixels, in raster order.

    Pixels are in MAE's order, channels last, normalised by the cell's mean and unbiased variance. Of HOG, F counts
    channels, then rows, then columns of its cells within one of ours.
    """
    if target.name == "hog":
        found, side = hog(images, target.normalise), cell // CELL
        rows = found.shape[2] // side
        tiles = found.unflatten(3, (rows, side)).unflatten(2, (rows, side))  # [B, 27, row, in, column, in]
        grouped: Tensor = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)
        return grouped
    patches = patchify(images, cell)
    if not target.normalise:
        return patches
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def _paint_shape(encoder: nn.Module, hide: str, decoder_dim: int) -> Tensor:
    """Zeros in the shape of what stands in the place of hidden squares: a colour, or a token."""
    if hide == "paint":
        return torch.zeros(1, 3, 1, 1)
    return torch.zeros(1, 1, decoder_dim if hide == "drop" else backbone.embedded_width(encoder))


def _grown(mask: Bool[Tensor, "B R R"], factor: int) -> Bool[Tensor, "B R2 R2"]:
    return mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
