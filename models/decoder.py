"""The light decoder of masked pre-training: what it predicts of hidden cells, and how good that is."""

import math

import torch
from jaxtyping import Float, Int64
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tinymim.configs.sections.decoders import DecoderConfig, LightDecoderConfig, PredictedConfig
from tinymim.models import backbone
from tinymim.models.hiding import take
from tinymim.models.hog import CELL, FEATURES, HOG_MEAN, hog
from tinymim.models.initialise import sincos_table
from tinymim.models.vit import patchify


class LightDecoder(nn.Module):
    """Transformer blocks on an encoder's tokens that predict hidden cells.

    Shapes: B image, S pixel, P prefix token, M visible token, N cell of the image, H hidden cell, F feature of a
    cell.

    Args:
        model: the encoder, which gives the width, the last grid and the prefix tokens.
        config: the decoder's sizes.
        target: what is predicted.
        img_size: side of the images; a plain ViT has a grid of its own, so it may be left out.
        cell: side in pixels of what is compared, a divisor of the last stride. Default: the last stride.
        normed: normalise the tokens first, because they are from before the encoder's final norm.
        encoder: a module that is to be part of this one, in front of the decoder.
        token: zeros in the shape of what stands in the place of hidden cells. Default: a token of the decoder.
    """

    position: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        config: LightDecoderConfig,
        target: PredictedConfig,
        img_size: int | None = None,
        cell: int | None = None,
        normed: bool = False,
        encoder: nn.Module | None = None,
        token: Tensor | None = None,
    ) -> None:
        super().__init__()
        if encoder is not None:
            self.encoder = encoder
        self.target, self.prefix, stride = target, backbone.prefix_tokens(model), backbone.strides(model)[-1]
        self.cell = cell or stride
        self.parts = stride // self.cell  # cells along a side of a token's square
        dim, width = config.dim, backbone.final_width(model)
        self.decoder_input: nn.Module = LayerNorm(width) if normed else nn.Identity()
        self.decoder_embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim) if token is None else token)
        grid = backbone.grid(model, img_size)
        self.register_buffer("position", sincos_table(dim, *grid, prefix=self.prefix) if config.position else None)
        self.decoder_blocks = nn.ModuleList(
            Block(dim, config.heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(config.depth)
        )
        self.decoder_norm = LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, self.parts**2 * num_features(target, self.cell))
        nn.init.normal_(self.mask_token, std=0.02)
        for name, module in self.named_modules():
            if name.startswith("decoder") and isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if target.name == "hog" and target.normalise:
            # Bins are never negative. Where the network has to learn their mean, it moves all tokens of all images the
            # same way, until they no longer tell one image from another (docs/log.md).
            nn.init.zeros_(self.decoder_pred.weight)
            nn.init.constant_(self.decoder_pred.bias, HOG_MEAN)

    def compared(
        self, tokens: Tensor, images: Float[Tensor, "B 3 S S"], ranks: Int64[Tensor, "B N"], num_visible: int
    ) -> tuple[Float[Tensor, "B H F"], Float[Tensor, "B H F"]]:
        """What is predicted of the H hidden cells, and what they hold. All images hide as many.

        Args:
            tokens: the encoder's tokens [B, P + M, C]: of all patches in raster order, or of the visible ones.
            images: normalised pixels; the target is computed from these.
            ranks: the numbers of the cells: first the visible ones, in the order of `tokens`.
            num_visible: how many of them are visible.
        """
        hidden = ranks[:, num_visible:]
        predicted = take(self._predicted(tokens, ranks), hidden)
        with torch.no_grad():
            return predicted, take(features(images, self.target, self.cell), hidden).to(predicted.dtype)

    def _predicted(self, tokens: Tensor, ranks: Tensor) -> Float[Tensor, "B N F"]:
        """Predicted cells in raster order."""
        tokens = self.decoder_embed(self.decoder_input(tokens))
        prefix, raster = tokens[:, : self.prefix], tokens[:, self.prefix :]
        if (missing := ranks.shape[1] // self.parts**2 - raster.shape[1]) > 0:
            hidden = self.mask_token.expand(len(tokens), missing, -1)
            raster = take(torch.cat([raster, hidden.to(tokens.dtype)], dim=1), ranks.argsort(dim=1))
        tokens = torch.cat([prefix, raster], dim=1)
        tokens = tokens if self.position is None else tokens + self.position
        for block in self.decoder_blocks:
            tokens = block(tokens)
        cells = self.decoder_pred(self.decoder_norm(tokens))[:, self.prefix :]
        side = math.isqrt(cells.shape[1])
        squares = cells.unflatten(2, (self.parts, self.parts, -1)).unflatten(1, (side, side))
        found: Tensor = squares.permute(0, 1, 3, 2, 4, 5).flatten(1, 4)
        return found


def pixels_decoder(config: DecoderConfig) -> tuple[LightDecoderConfig, PredictedConfig]:
    """Sizes of MAE's decoder, which has positions, and what it predicts."""
    sizes = {"dim": config.decoder_dim, "depth": config.decoder_depth, "heads": config.decoder_heads}
    decoder = LightDecoderConfig.model_validate(sizes | {"position": True})
    return decoder, PredictedConfig(name="pixels", normalise=config.norm_pixels)


def r2(predicted: Float[Tensor, "B H F"], wanted: Float[Tensor, "B H F"]) -> Tensor:
    """The coefficient of determination R^2, a scalar: 1 is a perfect prediction, 0 the best constant one.

    That constant is the mean of each feature over the cells of this batch. No gradient flows.
    """
    predicted, wanted = predicted.detach().float(), wanted.float()
    constant = wanted.var((0, 1), correction=0).mean()
    return 1 - nn.functional.mse_loss(predicted, wanted) / constant.clamp_min(1e-12)


def num_features(target: PredictedConfig, cell: int) -> int:
    """Numbers that are predicted of a cell of `cell` x `cell` pixels."""
    return 3 * cell**2 if target.name == "pixels" else FEATURES * (cell // CELL) ** 2


def features(images: Float[Tensor, "B 3 S S"], target: PredictedConfig, cell: int) -> Float[Tensor, "B N F"]:
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
