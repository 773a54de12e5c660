"""Units of view layers without a teacher: the images are decoded and cut again, and every view gets its digest."""

import contextlib
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.loader import batches
from tinymim.pipeline.mismatch import PartnersSeen, other_images
from tinymim.pipeline.order import view_batches
from tinymim.pipeline.shards import ShardSet
from tinymim.pipeline.views import RandomViews
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.progress import Meter
from tinymim.stages.units.draft import low_digests
from tinymim.stages.units.ledger import parts_of
from tinymim.storage.blocks import DIGEST, Array, key_arrays
from tinymim.storage.commit import UnitInfo, key_digest
from tinymim.storage.layout import VIEWS, UnitId, size_of
from tinymim.storage.writer import CacheWriter


def render_units(
    writer: CacheWriter,
    recipe: CacheTeacherRecipe,
    source: ShardSet,
    units: Sequence[UnitId],
    known: Mapping[str, UnitInfo],
    layer: str = VIEWS,
) -> None:
    """Write missing units of a view layer; they get the bytes that `cache-teacher` writes.

    Args:
        writer: the writer of the cache.
        recipe: its recipe, for the view law, the loader and the sizes of batches.
        source: the shards.
        units: the units.
        known: by shard a committed unit, whose images these must be.
        layer: the view layer.

    Raises:
        SourceError: a shard cannot be read.
        CacheMismatch: a shard has other images that can be read.
        UnitTaken: another writer has the unit.
        Interrupted: stopped by a signal; committed units are safe.
    """
    places = {shard.name: (number, shard.num_samples) for number, shard in enumerate(source.shards)}
    plan = [
        (unit, len(views), items)
        for unit in units
        for views in parts_of(unit, recipe.views_per_decode)
        for items in view_batches(*places[unit.shard], views, recipe.given_batch_size)
    ]
    law = RandomViews(recipe.views).at(size_of(layer, writer.manifest))
    made = ImageViews(source.shards, law, recipe.views.seed)
    loaded = batches(made, [items for _, _, items in plan], recipe.loader, pin_memory=False, look_ahead=False)
    with contextlib.closing(loaded), StopFlag() as stop, Meter("cache repair", len(units), "units") as meter:
        steps = zip(plan, loaded, strict=True)
        for unit, some in itertools.groupby(steps, key=lambda step: step[0][0]):
            digests: list[Array] = []  # of each part [k, I]
            keys: dict[int, list[str]] = {}
            unreadable: dict[str, str] = {}
            partners = PartnersSeen()
            parts: dict[int, list[Array]] = {}
            for (_, num_views, items), batch in some:
                if stop.requested:
                    raise Interrupted("committed units are safe; the same command continues", stop.requeue)
                first = int(items[0, 2])  # the part
                keys.setdefault(first, []).extend(batch.keys[::num_views])
                parts.setdefault(first, []).append(low_digests(batch).reshape(-1, num_views).T)
                unreadable |= dict(batch.unreadable)
                partners.add(batch.partners)
            partners.require(unit.shard, unreadable)
            digests = [np.concatenate(part, axis=1) for part in parts.values()]
            own = keys[unit.first_view]
            _require_same(unit, own, unreadable, known.get(unit.shard))
            with writer.begin(layer, unit, own) as draft:
                for part in digests:
                    draft.add({DIGEST: np.ascontiguousarray(part, "<u4")})
                lost = [[key, reason] for key, reason in unreadable.items()]
                draft.commit({"unreadable": lost} if layer == VIEWS else {})
            writer.give_back(unit)
            meter.advance(1)


def _require_same(unit: UnitId, keys: list[str], unreadable: Mapping[str, str], known: UnitInfo | None) -> None:
    if known is not None and key_digest(key_arrays(keys)) != known.key_digest:
        lost = "".join(f", '{key}' is unreadable ({reason})" for key, reason in itertools.islice(unreadable.items(), 1))
        raise other_images(
            unit.shard,
            got=f"{len(keys)} images that can be read{lost}",
            expected=f"the {known.num_images} images of unit {known}",
        )
