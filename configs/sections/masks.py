"""Sections of the masks: hidden patches of views, hidden squares in pre-training."""

import math
from typing import Literal

from pydantic import Field

from tinymim.configs.errors import RecipeError
from tinymim.configs.sections.base import Section
from tinymim.configs.sections.values import Seed, Side


class MaskConfig(Section):
    """Hidden patches of a view, drawn from (seed, sample key, view index) alone (I1)."""

    version: Literal[1] = Field(default=1, description="Version of the law of masks.")
    ratio: float = Field(default=0.75, gt=0, lt=1, description="Share of hidden patches.")
    unit: Side = Field(default=1, description="Patches are hidden in squares of N x N (1: MAE; SimMIM: 32 pixels).")
    seed: Seed = Field(default=0, description="Seed of all masks.")

    def num_visible(self, rows: int, columns: int, ratio: str = "mask.ratio", unit: str = "mask.unit") -> int:
        """Visible patches of a grid, a whole number of units; `ratio` and `unit` are the fields' names in messages.

        Raises:
            RecipeError: the unit does not divide the grid, or all patches would be hidden, or none.
        """
        if rows % self.unit or columns % self.unit:
            raise RecipeError(
                f"{unit} does not divide the patch grid",
                got=f"{self.unit}, grid {rows} x {columns}",
                expected=f"a divisor of {math.gcd(rows, columns)}",
            )
        units = rows * columns // self.unit**2
        visible = round(units * (1 - self.ratio))
        if not 0 < visible < units:
            raise RecipeError(
                f"{ratio} leaves no patch to see or none to predict",
                got=f"{self.ratio} of {units} {'patches' if self.unit == 1 else 'units'}",
                expected=f"{1 / units:.3g} to {1 - 1 / units:.3g}" if units > 1 else f"smaller {unit}",
            )
        return visible * self.unit**2


class StudentMaskConfig(MaskConfig):
    """Hidden patches of the student's view (docs/views.md). Of a masked layer, the mask must be the teacher's."""

    hide: Literal["drop", "token"] = Field(
        default="drop",
        description="`drop` runs the student on visible patches alone, `token` puts a learned token in place of each "
        "hidden patch, which is not exported.",
    )


class PretrainMaskConfig(Section):
    """Hidden squares of an image, drawn from (seed, sample key) alone (I1)."""

    hide: Literal["paint", "token", "drop"] = Field(
        default="paint",
        description="`paint` gives hidden pixels a learned colour (any model), `token` replaces embedded patches "
        "(ViTs, Swin), `drop` leaves patches out (ViTs, Hiera).",
    )
    ratio: float = Field(default=0.75, gt=0, lt=1, description="Share of hidden squares.")
    block: Side = Field(default=32, description="Width of a square in pixels.")

    def num_visible(self, img_size: int) -> int:
        """Visible squares of an image.

        Raises:
            RecipeError: squares do not fill the image, or all would be hidden, or none.
        """
        if img_size % self.block:
            raise RecipeError("mask.block does not divide the image", got=f"{self.block} and {img_size} pixels")
        squares = (img_size // self.block) ** 2
        visible = round(squares * (1 - self.ratio))
        if not 0 < visible < squares:
            raise RecipeError(
                "mask.ratio leaves no square to see or none to predict",
                got=f"{self.ratio} of {squares} squares",
                expected=f"{1 / squares:.3g} to {1 - 1 / squares:.3g}" if squares > 1 else "a smaller mask.block",
            )
        return visible
