"""Images of a source that a cache has records of: a cache joined with the shards that it was made from."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import numpy as np
import numpy.typing as npt

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, RecipeError, UserError
from tinymim.pipeline.mismatch import other_images
from tinymim.pipeline.order import PartnersOf
from tinymim.pipeline.pairs import partners_of
from tinymim.pipeline.records import UnitReader, Units
from tinymim.pipeline.shards import Shard, ShardSet
from tinymim.pipeline.views import law_of, view_key
from tinymim.storage import layout
from tinymim.storage.commit import UnitInfo
from tinymim.storage.layout import VIEWS, is_views
from tinymim.storage.manifest import Manifest
from tinymim.storage.reader import CacheReader, views_from_zero

_Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CachedSource:
    """The shards of a source for which a cache holds all wanted views, with their units.

    Attributes:
        shards: covered shards in source order; item arrays index into this.
        num_views: views per image, from view 0.
        units: the committed units of the layers of the records, of the view layer and of that of the views' size, by
            layer and shard, ascending by view.
        skipped: names of source shards that the cache does not cover.
        without_record: readable images of the covered shards for which the cache holds no record.
    """

    shards: tuple[Shard, ...]
    num_views: int
    units: Units
    skipped: tuple[str, ...] = ()
    without_record: int = 0

    @property
    def layers(self) -> list[str]:
        """The layers of the records."""
        return [layer for layer in self.units if not is_views(layer)]

    @property
    def digests(self) -> str:
        """The layer with the digests of the views: the view layer, or that of another size."""
        return [layer for layer in self.units if is_views(layer)][-1]

    @property
    def counts(self) -> list[int]:
        """Cached images per covered shard."""
        return [self.units[VIEWS][shard.name][0].num_images for shard in self.shards]


def join(
    source: ShardSet,
    reader: CacheReader,
    layers: Sequence[str | None] = (None,),
    num_views: int | None = None,
    on_missing: Literal["refuse", "skip"] = "refuse",
    size: int | None = None,
) -> CachedSource:
    """Match source shards with committed units by name and content.

    Args:
        source: the images.
        reader: the cache.
        layers: the layers of the records; None: the only one.
        num_views: wanted views per image, from view 0; None: as many as all shards have in all layers, or with `skip`
            all shards that have any.
        on_missing: whether images without a record raise an error or are left out. Images that were unreadable in
            stage one are always left out.
        size: the size of the views to train on, one of the cache's; None: that of its manifest.

    Raises:
        CacheMismatch: a shard's bytes differ from those the teacher saw, its units hold different images, or images
            have no record and `on_missing` is refuse.
        UserError: the cache covers no shard of this source, or not all of them and `on_missing` is refuse, or it has no
            such layer.
        RecipeError: no shard has as many views as `num_views`.
    """
    refuse_changed(source, reader.manifest)
    names = [VIEWS, layout.view_layer(reader.manifest, size), *(reader.layer(each).name for each in layers)]
    units = {each: reader.by_shard(each) for each in names}
    views = {each: {s: views_from_zero(infos) for s, infos in by_shard.items()} for each, by_shard in units.items()}
    held = {shard.name: min(counts.get(shard.name, 0) for counts in views.values()) for shard in source.shards}
    present = [count for count in held.values() if count]
    wanted = num_views or (min(present) if present else 1)
    covered = tuple(shard for shard in source.shards if held[shard.name] >= wanted)
    skipped = tuple(shard.name for shard in source.shards if held[shard.name] < wanted)
    if not covered or (skipped and on_missing == "refuse"):
        existing = "; ".join(f"layer {each}: {_existing(source, counts)}" for each, counts in views.items())
        short = [each for each, counts in views.items() if any(counts.get(name, 0) < wanted for name in skipped)]
        raise _lacking(reader.place, short, skipped, list(held.values()), wanted, existing)
    in_use = {
        each: {shard.name: _first_views(by_shard[shard.name], wanted) for shard in covered}
        for each, by_shard in units.items()
    }
    without_record = 0
    for shard in covered:
        info = same_images(shard.name, [info for each in in_use.values() for info in each[shard.name]])
        without_record += (lost := _without_record(shard, info))
        if lost and on_missing == "refuse":
            _refuse_missing(shard, info, reader)
    return CachedSource(covered, wanted, in_use, skipped, without_record)


def refuse_changed(source: ShardSet, manifest: Manifest) -> None:
    """Raises CacheMismatch where a shard is not the one in the manifest."""
    for shard in source.shards:
        stored = manifest.shards.get(shard.name)
        if stored is not None and stored.content_hash != shard.content_hash:
            raise CacheMismatch(
                f"source.{shard.name}.content_hash differs: the shard is not the one the teacher saw",
                got=shard.content_hash,
                expected=stored.content_hash,
                hint="restore the shard, or make a new cache of the changed images",
            )


def _first_views(infos: Sequence[UnitInfo], num_views: int) -> tuple[UnitInfo, ...]:
    """The units that hold any of the views 0 to `num_views` - 1."""
    return tuple(takewhile(lambda info: info.unit.first_view < num_views, infos))


def _lacking(
    place: object, layers: Sequence[str], skipped: Sequence[str], held: Sequence[int], wanted: int, existing: str
) -> UserError:
    """The error for shards without all wanted views.

    Args:
        place: the cache.
        layers: the layers that lack them.
        skipped: names of these shards.
        held: number of views of each shard.
        wanted: number of wanted views.
        existing: what the cache holds.
    """
    present, lacking = [views for views in held if views], f"layer {' and layer '.join(layers)}"
    if present and wanted > max(present):
        return RecipeError(
            f"num_views is more than the cache holds in {lacking}",
            got=wanted,
            expected=f"at most {max(present)}; {existing}",
            hint="`tinymim cache-teacher` with a larger num_views adds to the cache; `tinymim train-student` with "
            "on_missing: teacher computes the rest",
        )
    hint = "run `tinymim cache-teacher` to its end with the same source"
    if not present:
        return UserError(f"the cache {place} covers no shard of this source in {lacking}", got=existing, hint=hint)
    if wanted > min(present):
        hint += f", or set num_views: {min(present)}"
    return UserError(
        f"the cache {place} lacks {len(skipped)} of {len(held)} shards of this source in {lacking}, the first is "
        f"{skipped[0]}",
        got=existing,
        expected=f"views 0 to {wanted - 1} of every shard",
        hint=f"{hint}, or on_missing: skip to leave these shards out; `tinymim train-student` can compute them with "
        "on_missing: teacher",
    )


def _existing(source: ShardSet, views: Mapping[str, int]) -> str:
    """The number of shards by their number of views, for a message: "3 shards have 2 views, 1 shard has none"."""
    counts = Counter(views.get(shard.name, 0) for shard in source.shards)
    return ", ".join(
        f"{shards:,} {'shard has' if shards == 1 else 'shards have'} "
        + (f"{number} view{'s' if number > 1 else ''}" if number else "none")
        for number, shards in sorted(counts.items(), reverse=True)
    )


def same_images(shard: str, infos: Sequence[UnitInfo]) -> UnitInfo:
    """The first of a shard's units. Raises CacheMismatch unless all hold the same images."""
    if len({info.key_digest for info in infos}) > 1:
        held = (
            f"{info.layer} {info.unit.view_range}: {info.num_images} images, digest of keys {info.key_digest[:8]}"
            for info in infos
        )
        raise other_images(shard, ", ".join(held), "the same sample keys in every unit of a shard")
    return infos[0]


def unreadable_keys(info: UnitInfo) -> frozenset[str]:
    """The keys that a unit of the view layer lists as unreadable."""
    listed = info.statistics.get("unreadable", ())
    rows = listed if isinstance(listed, list) else ()
    return frozenset(str(row[0]) for row in rows if isinstance(row, list) and row)


def lost_partners(units: Mapping[str, Sequence[UnitInfo]]) -> dict[str, frozenset[str]]:
    """By shard, the keys of unreadable images, from its units of the view layer. No view is mixed with them."""
    return {shard: unreadable_keys(infos[0]) for shard, infos in units.items()}


def partners_of_source(source: CachedSource, reader: UnitReader, manifest: Manifest) -> PartnersOf | None:
    """The pairs of a cache's views among its cached images, numbered as in items; None: its law has no pairs."""
    law = law_of(manifest.views, manifest.environment)
    if law.pairs is None:
        return None
    seed, lost = law.pairs.seed, lost_partners(source.units[VIEWS])

    def partners(shard: int, view: int) -> _Index:
        name = source.shards[shard].name
        keys = reader.keys(name)
        everything = [*keys, *lost[name]]
        found = partners_of(np.array([view_key(seed, key, view) for key in everything], np.int64))[: len(keys)]
        return np.where(found < len(keys), found, np.arange(len(keys)))

    return partners


def _without_record(shard: Shard, info: UnitInfo) -> int:
    """The number of a shard's images without a record, except those listed as unreadable."""
    unreadable = info.statistics.get("unreadable", ())
    return shard.num_samples - info.num_images - (len(unreadable) if isinstance(unreadable, list) else 0)


def places_in_tar(shard: Shard, keys: Sequence[str], lost: Collection[str] | None = None) -> dict[str, int]:
    """By key, the index in its tar of every image of a shard (I8).

    Args:
        shard: the shard.
        keys: the keys that the cache holds of it.
        lost: the keys that the cache lists as unreadable, where its views are pairs. Partners depend on all keys.

    Raises:
        CacheCorrupt: the shard lacks a key of the cache.
        CacheMismatch: views are pairs, and the shard does not have the same images as in stage one.
    """
    places = {key: place for place, key in enumerate(shard.members().keys)}
    for key in keys:
        if key not in places:
            raise CacheCorrupt(f"key '{key}' of the cache is not in shard {shard.name}")
    if lost is not None and (other := sorted(places.keys() ^ {*keys, *lost})):
        known = other[0] not in places
        raise CacheMismatch(
            f"shard {shard.name} does not hold the images of stage one, so partners in views.pairs differ",
            got=f"{'no ' if known else ''}image '{other[0]}'{f' and {len(other) - 1} more' if other[1:] else ''}",
            expected=f"{len(keys) + len(lost)} images, {len(lost)} of them unreadable",
            hint="restore the shard, or make a new cache",
        )
    return places


def _refuse_missing(shard: Shard, info: UnitInfo, reader: CacheReader) -> None:
    """Raises CacheMismatch with the keys that the cache lacks."""
    held = set(reader.keys(shard.name))
    lost = [key for key in shard.members().keys if key not in held | unreadable_keys(info)]
    raise CacheMismatch(
        f"the cache {reader.place} holds no record of {len(lost)} image(s) of shard {shard.name}",
        got=f"no record of {', '.join(map(repr, lost[:3]))}{', ...' if len(lost) > 3 else ''}",
        expected="a record of every image",
        hint="`tinymim cache repair` computes the unit again, or set on_missing: skip to leave these images out",
    )
