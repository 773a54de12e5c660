"""Masked autoencoder (He et al., CVPR 2022) around any plain timm ViT; the recipe gives the decoder's sizes."""

import math

import torch
from timm.layers import LayerNorm
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError
from tinymim.configs.sections import MaeConfig
from tinymim.models import backbone
from tinymim.models.backbone import take
from tinymim.models.vit import patchify, sincos_table


class MaskedAutoencoder(nn.Module):
    """Encoder on visible tokens only, light decoder, mean squared error on masked patches.

    Args:
        encoder: a plain ViT, trained in place and exported without the decoder.
        config: mask ratio and decoder sizes.
    """

    position: Tensor

    def __init__(self, encoder: VisionTransformer, config: MaeConfig) -> None:
        super().__init__()
        if backbone.prefix_tokens(encoder) != 1 or backbone.positions(encoder) is None:
            raise RecipeError(
                "masked pre-training needs a ViT with a class token and no register tokens",
                got=f"{backbone.prefix_tokens(encoder)} prefix tokens",
            )
        rows, columns = backbone.grid(encoder)
        if rows % config.mask_unit or columns % config.mask_unit:
            raise RecipeError(
                "mae.mask_unit does not divide the patch grid",
                got=f"{config.mask_unit}, grid {rows} x {columns}",
                expected=f"a divisor of {math.gcd(rows, columns)}",
            )
        patches, units = rows * columns, rows * columns // config.mask_unit**2
        if not 0 < config.num_visible(patches) < patches:
            raise RecipeError(
                "mae.mask_ratio leaves no patch to see or none to predict",
                got=f"{config.mask_ratio} of {units} {'patches' if config.mask_unit == 1 else 'units'}",
                expected=f"{1 / units:.3g} to {1 - 1 / units:.3g}" if units > 1 else "smaller mae.mask_unit",
            )
        self.encoder = encoder
        self.config = config
        self.patch = backbone.strides(encoder)[-1]
        dim = config.decoder_dim
        self.decoder_embed = nn.Linear(backbone.widths(encoder)[-1], dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("position", sincos_table(dim, rows, columns, prefix=1))
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

    def forward(self, images: Tensor, order: Tensor) -> Tensor:
        """Mean squared error on masked patches.

        Args:
            images: normalised pixels [B, 3, S, S].
            order: int64 or float [B, patches], distinct per row; patches with the least values stay visible.

        Returns:
            The scalar loss.
        """
        ranks = order.argsort(dim=1)
        num_visible = self.config.num_visible(order.shape[1])
        visible, masked = ranks[:, :num_visible], ranks[:, num_visible:]
        prediction = self._decode(backbone.tokens_of_patches(self.encoder, images, visible), ranks)
        return nn.functional.mse_loss(take(prediction, masked), take(self._target(images), masked).to(prediction.dtype))

    def _decode(self, tokens: Tensor, ranks: Tensor) -> Tensor:
        """Predicted patches [B, patches, p*p*3] in raster order."""
        tokens = self.decoder_embed(tokens)
        cls, tokens = tokens[:, :1], tokens[:, 1:]
        missing = self.mask_token.expand(len(tokens), ranks.shape[1] - tokens.shape[1], -1)
        raster = take(torch.cat([tokens, missing.to(tokens.dtype)], dim=1), ranks.argsort(dim=1))
        tokens = torch.cat([cls, raster], dim=1) + self.position
        for block in self.decoder_blocks:
            tokens = block(tokens)
        out: Tensor = self.decoder_pred(self.decoder_norm(tokens))[:, 1:]
        return out

    def _target(self, images: Tensor) -> Tensor:
        patches = patchify(images, self.patch)
        if not self.config.norm_pixels:
            return patches
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()
