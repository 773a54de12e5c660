"""Sections of augmentation that only the student sees."""

from typing import Annotated

from pydantic import AfterValidator, Field

from tinymim.configs.rand_augment import checked_rand_augment
from tinymim.configs.sections.base import Section
from tinymim.configs.sections.values import Fraction


class JitterConfig(Section):
    """Colour jitter for the student only, fresh at every step (I3). The factor is drawn from 1 - x to 1 + x."""

    brightness: Fraction = Field(default=0.4, description="Largest change x of brightness.")
    contrast: Fraction = Field(default=0.4, description="Largest change x of contrast.")
    saturation: Fraction = Field(default=0.4, description="Largest change x of saturation.")


class AugmentConfig(Section):
    """Augmentation in fine-tuning, by timm's laws. If mixup and CutMix are both on, each batch of a lane gets one."""

    rand_augment: Annotated[str | None, AfterValidator(checked_rand_augment)] = Field(
        default="rand-m9-mstd0.5-inc1", description="RandAugment in timm's notation. null: none."
    )
    erasing: Fraction = Field(default=0.25, description="Share of images in which a box becomes noise.")
    mixup: float = Field(default=0.8, ge=0, le=1000, description="Alpha of mixup. 0: none.")
    cutmix: float = Field(default=1.0, ge=0, le=1000, description="Alpha of CutMix. 0: none.")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0
