"""Masked image modelling with any encoder: hide squares of an image, predict what they hold, compare there alone.

How squares are hidden is one choice, what is predicted another: FastMIM paints pixels and predicts HOG (Guo et al.,
2022), SimMIM replaces embedded patches by a token and predicts pixels (Xie et al., CVPR 2022), MAE leaves patches out
(He et al., CVPR 2022).

Shapes: B image, S pixel, N cell that is compared, R row of such cells.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError
from tinymim.configs.sections.decoders import LightDecoderConfig, MaeConfig, PredictedConfig
from tinymim.configs.sections.masks import PretrainMaskConfig
from tinymim.models import backbone, hiding
from tinymim.models.decoder import LightDecoder, pixels_decoder, r2
from tinymim.models.hog import CELL


class MaskedModel(LightDecoder):
    """An encoder, a light decoder, and the mean squared error of what is predicted of hidden squares.

    Args:
        encoder: the model to export; plain ViT, windowed, pyramid or convolutional.
        img_size: side of its input.
        mask: which squares are hidden, and how.
        target: what is predicted.
        decoder: sizes of the decoder.

    Attributes:
        rows: rows of cells that are compared, and columns.
        unit: rows of cells of a square of the mask.

    Raises:
        RecipeError: the squares do not fit the image or the encoder's cells, or the encoder cannot hide them this way.
    """

    def __init__(
        self,
        encoder: nn.Module,
        img_size: int,
        mask: PretrainMaskConfig,
        target: PredictedConfig,
        decoder: LightDecoderConfig,
    ) -> None:
        stride = backbone.strides(encoder)[-1]
        cell = min(mask.block, stride)
        squares = mask.num_visible(img_size)
        _check(encoder, mask, target, stride)
        token = _token(encoder, mask.hide, decoder.dim)
        super().__init__(encoder, decoder, target, img_size, cell, encoder=encoder, token=token)
        self.hide, self.rows, self.unit = mask.hide, img_size // cell, mask.block // cell
        self.num_visible = squares * self.unit**2

    def forward(self, images: Float[Tensor, "B 3 S S"], order: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and R^2 (see `r2`), scalars.

        Args:
            images: normalised pixels; the target is computed from these.
            order: int64 or float [B, N], distinct per row; cells with the least values stay visible.
        """
        ranks = order.argsort(dim=1)
        predicted, wanted = self.compared(self._encoded(images, ranks), images, ranks, self.num_visible)
        return nn.functional.mse_loss(predicted, wanted), r2(predicted, wanted)

    def _encoded(self, images: Tensor, ranks: Tensor) -> Tensor:
        """The encoder's tokens of images with hidden cells; with `drop`, of visible patches alone, in their order."""
        if self.hide == "drop":
            with hiding.seeing(self.encoder, ranks[:, : self.num_visible]):
                return backbone.tokens_at(self.encoder, images, None)
        flat = torch.zeros_like(ranks, dtype=torch.bool).scatter(1, ranks[:, self.num_visible :], True)
        hidden = flat.unflatten(1, (self.rows, self.rows))
        if self.hide == "paint":
            at = _grown(hidden, self.cell)[:, None]
            return backbone.tokens_at(self.encoder, torch.where(at, self.mask_token.to(images.dtype), images), None)
        side = hiding.embedded_stride(self.encoder)
        assert side is not None  # by `_check`
        with hiding.replaced(self.encoder, _grown(hidden, self.cell // side), self.mask_token):
            return backbone.tokens_at(self.encoder, images, None)


def masked_autoencoder(encoder: nn.Module, img_size: int, config: MaeConfig) -> MaskedModel:
    """MAE: dropped patches, pixels, a decoder with positions. Raises RecipeError as `MaskedModel`."""
    config.num_visible(*backbone.grid(encoder, img_size))  # refuses under the names of its own fields
    block = config.mask_unit * backbone.strides(encoder)[-1]
    mask = PretrainMaskConfig(hide="drop", ratio=config.mask_ratio, block=block)
    decoder, target = pixels_decoder(config)
    return MaskedModel(encoder, img_size, mask, target, decoder)


def _check(encoder: nn.Module, mask: PretrainMaskConfig, target: PredictedConfig, stride: int) -> None:
    large, small = max(mask.block, stride), min(mask.block, stride)
    if large % small:
        raise RecipeError(
            "mask.block does not fit the encoder's cells",
            got=f"{mask.block} pixels, cells of {stride}",
            expected=f"a multiple or a divisor of {stride}",
        )
    if target.name == "hog" and small % CELL:
        raise RecipeError(
            "HOG needs squares and cells of whole 8 x 8 pixels",
            got=f"mask.block {mask.block}, cells of {stride}",
            expected="multiples of 8",
        )
    if mask.hide == "drop" and mask.block % stride:
        raise RecipeError(
            "only whole patches can be dropped",
            got=f"mask.block {mask.block}, patches of {stride}",
            expected=f"a multiple of {stride}",
        )
    if mask.hide == "drop" and not hiding.can_drop(encoder):
        raise RecipeError(
            f"{type(encoder).__name__} cannot leave patches out",
            got="mask.hide: drop",
            expected="a plain ViT or Hiera",
            hint="tinymim pretrain with mask.hide: paint, which any encoder can",
        )
    if mask.hide == "token":
        side = hiding.embedded_stride(encoder)
        if side is None or mask.block % side:
            raise RecipeError(
                f"{type(encoder).__name__} has no embedded patches that fit mask.block"
                if side
                else f"{type(encoder).__name__} embeds no patches that a token could replace",
                got=f"mask.block {mask.block}" + (f", patches of {side}" if side else ""),
                hint=f"mask.block={max(1, mask.block // side) * side}" if side else "mask.hide=paint",
            )


def _token(encoder: nn.Module, hide: str, decoder_dim: int) -> Tensor:
    """Zeros in the shape of what stands in the place of hidden cells: a colour, or a token."""
    if hide == "paint":
        return torch.zeros(1, 3, 1, 1)
    return torch.zeros(1, 1, decoder_dim if hide == "drop" else hiding.embedded_width(encoder))


def _grown(mask: Bool[Tensor, "B R R"], factor: int) -> Bool[Tensor, "B R2 R2"]:
    return mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
