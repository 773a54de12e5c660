"""Sections of the view law: boxes and flips, operations on the pixels, pairs of images."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from tinymim.configs.rand_augment import checked_rand_augment
from tinymim.configs.sections.base import Section
from tinymim.configs.sections.values import Fraction, Seed, Side

Aspect = Annotated[float, Field(ge=1e-3, le=1e3)]
Level = Annotated[int, Field(ge=0, le=255)]
Spread = Annotated[float, Field(ge=0.0, le=255.0)]
Sigma = Annotated[float, Field(gt=0.0, le=20.0)]


class OperationsConfig(Section):
    """Operations on a view's pixels, in the order of the fields, drawn from (seed, sample key, view index) alone (I1).

    They change the pixels that teacher and student see. Fill and noise are levels of 255 and part of the law, so they
    do not depend on a model's normalisation.
    """

    version: Literal[1] = Field(default=1, description="Version of the laws of this section.")
    color_jitter: tuple[Fraction, Fraction, Fraction, Annotated[float, Field(ge=0.0, le=0.5)]] = Field(
        default=(0.0, 0.0, 0.0, 0.0), description="Largest changes of brightness, contrast, saturation and hue."
    )
    color_jitter_share: Fraction = Field(default=0.8, description="Share of the views that `color_jitter` changes.")
    grayscale: Fraction = Field(default=0.0, description="Share of the views that become grey.")
    blur: Fraction = Field(default=0.0, description="Share of the views with a Gaussian blur.")
    blur_sigma: tuple[Sigma, Sigma] = Field(default=(0.1, 2.0), description="Limits of the blur's deviation in pixels.")
    solarize: Fraction = Field(default=0.0, description="Share of the views whose values from 128 on are inverted.")
    rand_augment: Annotated[str | None, AfterValidator(checked_rand_augment)] = Field(
        default=None, description="RandAugment in timm's notation, e.g. rand-m9-mstd0.5-inc1. null: none."
    )
    erasing: Fraction = Field(default=0.0, description="Share of the views in which a box is erased.")
    erasing_mode: Literal["const", "pixel"] = Field(
        default="pixel", description="Erase with the colour `fill` (const), or with normal noise per pixel (pixel)."
    )
    fill: tuple[Level, Level, Level] = Field(
        default=(124, 116, 104), description="Colour of gaps in levels of 255. Default: ImageNet's mean."
    )
    noise_mean: tuple[Spread, Spread, Spread] = Field(
        default=(123.675, 116.28, 103.53), description="Mean of the noise per channel in levels of 255."
    )
    noise_std: tuple[Spread, Spread, Spread] = Field(
        default=(58.395, 57.12, 57.375), description="Standard deviation of the noise per channel in levels of 255."
    )

    @model_validator(mode="after")
    def _draws_something(self) -> "OperationsConfig":
        jitter = self.color_jitter_share and any(self.color_jitter)
        if not any([jitter, self.grayscale, self.blur, self.solarize, self.rand_augment, self.erasing]):
            raise ValueError("no operation is on; set operations to null for boxes and flips alone")
        if self.blur_sigma[0] > self.blur_sigma[1]:
            raise ValueError(f"blur_sigma must be low <= high, got {self.blur_sigma}")
        return self


Alpha = Annotated[float, Field(ge=0.0, le=4.0)]  # of Beta(alpha, alpha)


class PairsConfig(Section):
    """Mixup and CutMix of a view with its partner's, another image of the shard, drawn anew in every view (I1).

    Operations are applied to both before. The record belongs to the mixed view.
    """

    version: Literal[1] = Field(default=1, description="Version of the laws of this section.")
    mixup: Alpha = Field(default=0.8, description="Alpha of mixup. 0: none; else at least 0.05.")
    cutmix: Alpha = Field(default=1.0, description="Alpha of CutMix. 0: none; else at least 0.05.")
    cutmix_share: Fraction = Field(default=0.5, description="Share of CutMix among the pairs, if mixup is on, too.")
    share: Fraction = Field(default=1.0, description="Share of the pairs that are mixed.")

    @model_validator(mode="after")
    def _mixes_something(self) -> "PairsConfig":
        if not self.share or not (self.mixup or self.cutmix):
            raise ValueError("nothing is mixed; set pairs to null for views of single images")
        for name, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            if 0.0 < alpha < 0.05:
                raise ValueError(f"{name} must be 0, or from 0.05 to 4, got {alpha}")
        return self


class ViewConfig(Section):
    """The view law: RandomResizedCrop, flip, operations, drawn from (seed, sample key, view index) alone (I1).

    Pairs are drawn from seed, view index and all keys of the image's shard.
    These fields are part of a cache's identity: other values need another cache.
    """

    size: Side = Field(default=224, description="Width and height of a view in pixels; the model's `img_size`.")
    scale: tuple[Fraction, Fraction] = Field(default=(0.2, 1.0), description="Crop area as a share of the image area.")
    ratio: tuple[Aspect, Aspect] = Field(
        default=(3 / 4, 4 / 3), description="Crop width / height, drawn log-uniformly."
    )
    interpolation: Literal["bicubic", "bilinear"] = Field(default="bicubic", description="Filter of the resize.")
    flip: Fraction = Field(default=0.5, description="Probability of a horizontal flip.")
    seed: Seed = Field(default=0, description="Seed of all views.")
    scaled_decode: bool = Field(
        default=True,
        description="Decode JPEGs at 1/2, 1/4 or 1/8 if the crop stays at least `size` long (docs/views.md).",
    )
    operations: OperationsConfig | None = Field(
        default=None, description="Operations on the pixels: RandAugment, erasing and more (docs/views.md). null: none."
    )
    pairs: PairsConfig | None = Field(
        default=None, description="Mixup and CutMix with another image of the shard (docs/views.md). null: none."
    )

    def identity(self) -> dict[str, Any]:
        """The law as a cache's manifest holds it: a field that is newer than format 2 is left out where it is off."""
        off = {name for name in ("scaled_decode", "operations", "pairs") if not getattr(self, name)}
        return self.model_dump(mode="json", exclude=off)

    @model_validator(mode="after")
    def _ordered(self) -> "ViewConfig":
        if not 0.0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be 0 < low <= high, got {self.scale}")
        if not 0.0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be 0 < low <= high, got {self.ratio}")
        return self
