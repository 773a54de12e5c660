"""Masked autoencoder (He et al., CVPR 2022) around any plain timm ViT; the recipe gives the decoder's sizes."""

import torch
from timm.layers import LayerNorm
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError
from tinymim.configs.sections import DecoderConfig, MaeConfig
from tinymim.models import backbone
from tinymim.models.backbone import take
from tinymim.models.vit import patchify, sincos_table


class PixelDecoder(nn.Module):
    """A light decoder on an encoder's tokens that predicts hidden patches, compared by their mean squared error.

    Args:
        vit: the encoder, which gives the width, the patches and the prefix tokens.
        config: the decoder's sizes.
        normed: normalise the tokens first, because they are from before the encoder's final norm.
        encoder: a module that is to be part of this one, in front of the decoder.
    """

    position: Tensor

    def __init__(
        self, vit: nn.Module, config: DecoderConfig, normed: bool = False, encoder: nn.Module | None = None
    ) -> None:
        super().__init__()
        if encoder is not None:
            self.encoder = encoder
        self.norm_pixels, self.prefix = config.norm_pixels, backbone.prefix_tokens(vit)
        self.patch, dim, width = backbone.strides(vit)[-1], config.decoder_dim, backbone.widths(vit)[-1]
        self.decoder_input: nn.Module = LayerNorm(width) if normed else nn.Identity()
        self.decoder_embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("position", sincos_table(dim, *backbone.grid(vit), prefix=self.prefix))
        self.decoder_blocks = nn.ModuleList(
            Block(dim, config.decoder_heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, self.patch**2 * 3)
        nn.init.normal_(self.mask_token, std=0.02)
        for name, module in self.named_modules():
            if name.startswith("decoder") and isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def error(self, tokens: Tensor, images: Tensor, ranks: Tensor, num_visible: int) -> Tensor:
        """Mean squared error on hidden patches, a scalar.

        Args:
            tokens: the encoder's tokens [B, P + M, C]: of all patches in raster order, or of the visible ones.
            images: normalised pixels [B, 3, S, S].
            ranks: int64 [B, patches], the numbers of the patches: first the visible ones, in the order of `tokens`.
            num_visible: how many of them are visible.
        """
        hidden = ranks[:, num_visible:]
        prediction = self._decode(tokens, ranks)
        return nn.functional.mse_loss(take(prediction, hidden), take(self._target(images), hidden).to(prediction.dtype))

    def _decode(self, tokens: Tensor, ranks: Tensor) -> Tensor:
        """Predicted patches [B, patches, p*p*3] in raster order."""
        tokens = self.decoder_embed(self.decoder_input(tokens))
        prefix, raster = tokens[:, : self.prefix], tokens[:, self.prefix :]
        if raster.shape[1] != ranks.shape[1]:
            missing = self.mask_token.expand(len(tokens), ranks.shape[1] - raster.shape[1], -1)
            raster = take(torch.cat([raster, missing.to(tokens.dtype)], dim=1), ranks.argsort(dim=1))
        tokens = torch.cat([prefix, raster], dim=1) + self.position
        for block in self.decoder_blocks:
            tokens = block(tokens)
        out: Tensor = self.decoder_pred(self.decoder_norm(tokens))[:, self.prefix :]
        return out

    def _target(self, images: Tensor) -> Tensor:
        patches = patchify(images, self.patch)
        if not self.norm_pixels:
            return patches
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()


class MaskedAutoencoder(PixelDecoder):
    """Encoder on visible tokens only, light decoder, mean squared error on masked patches.

    Args:
        encoder: a plain ViT, trained in place and exported without the decoder.
        config: mask ratio and decoder sizes.
    """

    encoder: VisionTransformer

    def __init__(self, encoder: VisionTransformer, config: MaeConfig) -> None:
        if backbone.prefix_tokens(encoder) != 1 or backbone.positions(encoder) is None:
            raise RecipeError(
                "masked pre-training needs a ViT with a class token and no register tokens",
                got=f"{backbone.prefix_tokens(encoder)} prefix tokens",
            )
        visible = config.num_visible(*backbone.grid(encoder))
        super().__init__(encoder, config, encoder=encoder)
        self.num_visible = visible

    def forward(self, images: Tensor, order: Tensor) -> Tensor:
        """Mean squared error on masked patches.

        Args:
            images: normalised pixels [B, 3, S, S].
            order: int64 or float [B, patches], distinct per row; patches with the least values stay visible.

        Returns:
            The scalar loss.
        """
        ranks = order.argsort(dim=1)
        with backbone.seeing(self.encoder, ranks[:, : self.num_visible]):
            tokens = self.encoder.forward_features(images)
        return self.error(tokens, images, ranks, self.num_visible)
