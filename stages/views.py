"""`tinymim views`: a contact sheet of a recipe's views: every view with its box, flip, operations, partner and mask."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tinymim.configs.errors import RecipeError, SourceError
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.pretrain import PretrainMaeRecipe, PretrainRecipe
from tinymim.configs.sections.masks import MaskConfig
from tinymim.models import backbone, hiding
from tinymim.models.vit import build_model
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.decode import decode
from tinymim.pipeline.masks import mask_order
from tinymim.pipeline.order import Items
from tinymim.pipeline.shards import ShardSet, open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages.pages.numbers import view_law
from tinymim.stages.pages.views import ImageRow, ViewCell, sheet, sheet_page
from tinymim.stages.run.device import require_view_size
from tinymim.storage.atomic import write_bytes_atomic

Mask = npt.NDArray[np.bool_]


class Options(NamedTuple):
    """What to draw.

    Attributes:
        target: the page's file; the picture gets the same name with .png.
        images: number of images, spread evenly over the source.
        views: views of each image, from view 0.
    """

    target: Path
    images: int
    views: int


def run(recipe: CacheTeacherRecipe | PretrainMaeRecipe | PretrainRecipe, options: Options) -> dict[str, object]:
    """Write the sheet as a self-contained page and as PNG.

    Returns:
        The two files, the law in words, and the number of images and views.

    Raises:
        RecipeError: nothing to draw, or a target that is not a page.
        SourceError: bad shards, or no image can be read.
    """
    if options.target.suffix != ".html":
        raise RecipeError("the contact sheet is a page and a picture", got=options.target, expected="FILE.html")
    if not 1 <= options.images <= 100 or not 1 <= options.views <= 100:
        raise RecipeError(
            "the contact sheet is too large or empty",
            got=f"{options.images} images, {options.views} views",
            expected="1 to 100 of each",
        )
    source, law, mask, seed = (
        open_shards(recipe.source),
        RandomViews(recipe.views),
        _mask_law(recipe),
        recipe.views.seed,
    )
    rows = [_row(source, law, seed, mask, place, options.views) for place in _places(source, options.images)]
    words = view_law(recipe.views.identity())
    if isinstance(recipe, PretrainRecipe):
        words += f", masks: {recipe.mask.ratio} of squares of {recipe.mask.block} pixels, seed {recipe.run.seed}"
    elif law_of_masks := _masks(recipe):
        words += f", masks: {law_of_masks.ratio} of units of {law_of_masks.unit} patches, seed {law_of_masks.seed}"
    image = options.target.with_suffix(".png")
    write_bytes_atomic(image, sheet(rows))
    write_bytes_atomic(options.target, sheet_page(rows, words, str(recipe.source.shards)).encode())
    return {
        "page": str(options.target),
        "picture": str(image),
        "law": words,
        "images": len(rows),
        "views": options.views,
    }


def _places(source: ShardSet, count: int) -> list[tuple[int, int]]:
    """(shard, sample) of `count` images spread evenly over the source, or of all."""
    ends = np.cumsum([shard.num_samples for shard in source.shards])
    total = int(ends[-1])
    if not total:
        raise SourceError("the source holds no image", got=source.num_samples)
    chosen = np.unique(np.arange(count) * total // count)
    shards = np.searchsorted(ends, chosen, side="right")
    starts = np.concatenate([[0], ends])
    return [(shard, place - int(starts[shard])) for shard, place in zip(shards.tolist(), chosen.tolist(), strict=True)]


def _row(
    source: ShardSet,
    law: RandomViews,
    seed: int,
    mask: Callable[[str, int], Mask | None],
    place: tuple[int, int],
    count: int,
) -> ImageRow:
    shard, sample = place
    key = source.shards[shard].members().keys[sample]
    items: Items = np.array([[shard, sample, view] for view in range(count)], dtype=np.int64)
    batch = ImageViews(source.shards, law, seed).batch(items)
    if batch.unreadable:
        return ImageRow(key, batch.unreadable[0][1], None, [])
    image = decode(source.shards[shard].read(sample)).numpy()
    partners = batch.partners
    paired = [("", None)] * count if partners is None else list(zip(partners.keys, partners.mixes, strict=True))
    cells = [
        ViewCell(number, view, law.steps(key, number), pixels, mask(key, number), *paired[number])
        for number, (view, pixels) in enumerate(zip(batch.views, batch.pixels.numpy(), strict=True))
    ]
    return ImageRow(key, None, image, cells)


def _masks(recipe: CacheTeacherRecipe | PretrainMaeRecipe) -> MaskConfig | None:
    """The law of masks: of several layers of a cache, that of the first masked one."""
    if isinstance(recipe, PretrainMaeRecipe):
        return MaskConfig(ratio=recipe.mae.mask_ratio, unit=recipe.mae.mask_unit, seed=recipe.run.seed)
    return next((mask for mask in recipe.masks.values() if mask is not None), None)


def _mask_law(recipe: CacheTeacherRecipe | PretrainMaeRecipe | PretrainRecipe) -> Callable[[str, int], Mask | None]:
    """The hidden patches of a view, bool [rows, columns]; None where the recipe has no mask."""
    if isinstance(recipe, PretrainRecipe):
        require_view_size(recipe.views.size, recipe.model, "model")
        side, shown = recipe.views.size // recipe.mask.block, recipe.mask.num_visible(recipe.views.size)
        own = recipe.run.seed
        return lambda key, view: (mask_order(own, key, view, side, side) >= shown).reshape(side, side)
    mask = _masks(recipe)
    if mask is None:
        return lambda key, view: None
    if isinstance(recipe, PretrainMaeRecipe):
        require_view_size(recipe.views.size, recipe.model, "model")
        with torch.device("meta"):
            rows, columns = backbone.grid(build_model(recipe.model), recipe.views.size)
        recipe.mae.num_visible(rows, columns)  # refuses under the names of its own fields
    else:
        require_view_size(recipe.views.size, recipe.teacher, "teacher")
        with torch.device("meta"):
            teacher = build_model(recipe.teacher)
        hiding.check_masked(teacher)
        rows, columns = backbone.grid(teacher)
    visible = mask.num_visible(rows, columns)

    def hidden(key: str, view: int) -> Mask:
        return (mask_order(mask.seed, key, view, rows, columns, mask.unit) >= visible).reshape(rows, columns)

    return hidden
