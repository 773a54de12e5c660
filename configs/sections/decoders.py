"""Sections of what is predicted of hidden patches, and of the decoders that predict it."""

from typing import Any, Literal

from pydantic import Field, model_validator

from tinymim.configs.sections.base import Section
from tinymim.configs.sections.masks import MaskConfig
from tinymim.configs.sections.values import Depth, Positive, Side, Weight, Width


class PredictedConfig(Section):
    """What is predicted of hidden squares."""

    name: Literal["hog", "pixels"] = Field(
        default="hog", description="`hog`: histograms of oriented gradients in cells of 8 x 8 pixels; `pixels`."
    )
    normalise: bool = Field(
        default=True,
        description="Divide the histogram of each cell and colour by its length; normalise pixels per cell.",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_teacher(cls, data: Any) -> Any:
        name = data.get("name") if isinstance(data, dict) else data
        if name in ("tokens", "features", "teacher"):
            raise ValueError(
                f"'{name}' cannot be computed from an image alone; hog and pixels can. To predict a teacher's tokens, "
                "cache them and give `mask` to `tinymim train-student`; start from the recipe tinyimagenet40-masked"
            )
        return data


class LightDecoderConfig(Section):
    """The decoder: transformer blocks on the encoder's last grid. Defaults are FastMIM's for ViT-B."""

    dim: Width = Field(default=256, description="Width.")
    depth: Depth = Field(default=1, description="Blocks.")
    heads: Width = Field(default=8, description="Attention heads.")
    position: bool = Field(default=False, description="Add a fixed position embedding. `mask.hide: drop` needs it.")

    @model_validator(mode="after")
    def _whole_heads(self) -> "LightDecoderConfig":
        if self.dim % self.heads or (self.position and self.dim % 4):
            raise ValueError(f"dim must be a multiple of heads, and of 4 with position; got {self.dim}, {self.heads}")
        return self


class DecoderConfig(Section):
    """A decoder that predicts hidden patches. Defaults are MAE-Lite's decoder for ViT-T."""

    decoder_dim: Width = Field(default=96, description="Width of the decoder.")
    decoder_depth: Depth = Field(default=1, description="Blocks of the decoder.")
    decoder_heads: Width = Field(default=3, description="Attention heads of the decoder.")
    norm_pixels: bool = Field(default=True, description="Predict pixels that are normalised per patch.")

    @model_validator(mode="after")
    def _whole_heads(self) -> "DecoderConfig":
        if self.decoder_dim % 4 or self.decoder_dim % self.decoder_heads:
            raise ValueError(
                f"decoder_dim must be a multiple of 4 and of decoder_heads; "
                f"got {self.decoder_dim} and {self.decoder_heads}"
            )
        return self


class MaeConfig(DecoderConfig):
    """Masked autoencoder (He et al., CVPR 2022). Defaults are MAE-Lite's decoder for ViT-T."""

    mask_ratio: float = Field(default=0.75, gt=0, lt=1, description="Share of patches hidden from the encoder.")
    mask_unit: Side = Field(
        default=1, description="Patches are hidden in squares of N x N (1: MAE; SimMIM, FastMIM: 32 pixels)."
    )

    def num_visible(self, rows: int, columns: int) -> int:
        """As `MaskConfig.num_visible`."""
        mask = MaskConfig(ratio=self.mask_ratio, unit=self.mask_unit)
        return mask.num_visible(rows, columns, "mae.mask_ratio", "mae.mask_unit")


class MimConfig(DecoderConfig):
    """A loss beside those of the layers: the squared error of pixels that a light decoder predicts of hidden patches.

    The pixels are those of the student's own image. The decoder is dropped at export.
    """

    weight: Weight = Field(default=1.0, description="Factor on the loss.")
    block: Positive | None = Field(
        default=None,
        description="The decoder reads the tokens after this block of the student, counted from 1, through a norm of "
        "its own. Default: the final tokens.",
    )
