"""The deep part of `tinymim cache verify`: a sample of the records made again from images, view law and teacher."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinymim.configs.errors import CacheCorrupt, UserError
from tinymim.configs.schema import CacheTeacherRecipe
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.shards import ShardSet
from tinymim.pipeline.views import DIGEST, VIEW_ARRAYS, RandomViews, from_arrays
from tinymim.stages.cache.opened import stored_constants
from tinymim.stages.run.progress import Meter
from tinymim.stages.units.prepare import prepare
from tinymim.storage.catalog import resolve
from tinymim.storage.commit import UnitInfo
from tinymim.storage.manifest import check_same
from tinymim.storage.reader import CacheReader, UnitRecords
from tinymim.targets.kinds import make_kind

LISTED_EXAMPLES = 5
# Numbers that are stored as they are differ in their last digits on other hardware; codes and indices do or do not.
CLOSE_RTOL, CLOSE_ATOL = 1e-2, 1e-4


@dataclass
class _Seen:
    """What the sample showed so far."""

    elements: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    equal: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    records: int = 0
    unreadable: int = 0
    wrong_views: int = 0
    wrong_pixels: int = 0
    examples: list[str] = field(default_factory=list)

    def differs(self, what: str) -> None:
        """Keep the first few for the report."""
        if len(self.examples) < LISTED_EXAMPLES:
            self.examples.append(what)


def run(
    recipe: CacheTeacherRecipe,
    place: Path | str,
    sample: int = 64,
    min_agreement: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Make records again and compare: the view (I1), the pixels' digest (I2), every array of the codec.

    Args:
        recipe: by which the cache was made; it gives images and teacher.
        place: the cache, or a root that holds just one.
        sample: records to make, spread over the units.
        min_agreement: the least share of equal elements that passes.
        seed: another one chooses other records.

    Returns:
        Counts, shares and the verdict `passed`, as JSON values.

    Raises:
        CacheMismatch: the cache was made by something else than the recipe says.
        CacheCorrupt: a record cannot be read, or its key is not in its shard.
        UserError: the cache holds no record of the recipe's shards.
        RecipeError, SourceError, CheckpointError: as `cache-teacher`.
    """
    # ---- the same source, teacher and codec, by what the manifest says
    parts = prepare(recipe)
    device, source, teacher = parts.device, parts.source, parts.teacher
    reader = CacheReader(resolve(place))
    warnings = check_same(reader.manifest, parts.manifest)
    constants = stored_constants(reader.store, reader.manifest, device)
    kind = make_kind(recipe.codec, recipe.teacher.block, constants=constants)
    shards = {shard.name: number for number, shard in enumerate(source.shards)}
    units = [info for info in reader.units() if info.unit.shard in shards and info.num_records]
    if not units:
        raise UserError(
            f"the cache {reader.place} holds no record of this source",
            got=str(reader.coverage()),
            hint="name the recipe that the cache was made by",
        )

    # ---- unit by unit: views by the law, teacher, codec, comparison
    chosen = spread_records([info.num_records for info in units], sample, f"{reader.manifest.spec_id}/{seed}")
    views = ImageViews(source.shards, RandomViews(recipe.views), recipe.views.seed)
    seen = _Seen()
    with Meter("cache verify --deep", sum(map(len, chosen)), "views") as meter:
        for info, rows in zip(units, chosen, strict=True):
            if not len(rows):
                continue
            stored = reader.read_unit(info)
            items = _items(stored, info, rows, source, shards[info.unit.shard])
            for start in range(0, len(rows), recipe.given_batch_size):
                part = slice(start, start + recipe.given_batch_size)
                batch = views.batch(items[part])
                kept = _rows_of(batch, items[part], rows[part])
                seen.unreadable += len(rows[part]) - len(kept)
                for key, reason in batch.unreadable:
                    seen.differs(f"image '{key}' is unreadable: {reason}")
                if len(kept):
                    _compare_views(batch, stored, info, kept, seen)
                    made = kind.encode(teacher(batch.pixels.to(device)), batch.view_keys.to(device))
                    for name, values in made.items():
                        _compare_array(name, values.cpu().numpy(), stored.arrays, kept, seen)
                meter.advance(len(rows[part]))

    # ---- verdict
    by_array = {name: seen.equal[name] / count for name, count in sorted(seen.elements.items())}
    agreement = sum(seen.equal.values()) / max(1, sum(seen.elements.values()))
    clean = not (seen.wrong_views or seen.wrong_pixels or seen.unreadable)
    return {
        "records": seen.records,
        "units": sum(1 for rows in chosen if len(rows)),
        "wrong_views": seen.wrong_views,
        "wrong_pixels": seen.wrong_pixels,
        "unreadable": seen.unreadable,
        "agreement": agreement,
        "agreement_by_array": by_array,
        "min_agreement": min_agreement,
        "passed": clean and agreement >= min_agreement,
        "examples": seen.examples,
        "warnings": warnings,
    }


def spread_records(counts: list[int], sample: int, identity: str) -> list[npt.NDArray[np.int64]]:
    """Which records of each unit are sampled: one at a hashed place in each of `sample` equal parts of them all.

    Args:
        counts: records per unit.
        sample: how many to choose; all, where there are fewer.
        identity: what the choice is a function of, beside the counts.

    Returns:
        int64 [chosen] per unit, ascending, none twice.
    """
    total = sum(counts)
    sample = min(sample, total)
    places = []
    for part in range(sample):
        first, end = part * total // sample, (part + 1) * total // sample
        draw = hashlib.blake2b(f"{identity}/{part}".encode(), digest_size=8, person=b"tinymim/verify").digest()
        places.append(first + int.from_bytes(draw, "big") % (end - first))
    ends = np.cumsum(counts)
    chosen = np.array(places, dtype=np.int64)
    unit = np.searchsorted(ends, chosen, side="right")
    return [chosen[unit == number] - (ends[number] - count) for number, count in enumerate(counts)]


def _items(
    stored: UnitRecords, info: UnitInfo, rows: npt.NDArray[np.int64], source: ShardSet, shard: int
) -> npt.NDArray[np.int64]:
    """The items [n, 3] that records are about, found by key (I8)."""
    positions = {key: place for place, key in enumerate(source.shards[shard].members().keys)}
    items = np.empty((len(rows), 3), dtype=np.int64)
    for place, row in enumerate(rows.tolist()):
        image, view = divmod(row, info.unit.num_views)
        key = stored.keys[image]
        if key not in positions:
            raise CacheCorrupt(f"key '{key}' of the cache is not in shard {info.unit.shard}")
        items[place] = shard, positions[key], info.unit.first_view + view
    return items


def _rows_of(batch: ViewBatch, items: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The records of a batch, which leaves out unreadable images."""
    found = {tuple(item): row for item, row in zip(items.tolist(), rows.tolist(), strict=True)}
    return np.array([found[tuple(item)] for item in batch.items.tolist()], dtype=np.int64)


def _compare_views(
    batch: ViewBatch, stored: UnitRecords, info: UnitInfo, rows: npt.NDArray[np.int64], seen: _Seen
) -> None:
    """Count the views that the law would draw otherwise, and those whose pixels are others."""
    digests = batch.digests().numpy().view(np.uint64)
    held = from_arrays({name: stored.arrays[name][rows] for name in VIEW_ARRAYS})
    for place, (row, stored_view) in enumerate(zip(rows.tolist(), held, strict=True)):
        view = info.unit.first_view + row % info.unit.num_views
        name = f"image '{batch.keys[place]}' of shard {info.unit.shard}, view {view}"
        if batch.views[place] != stored_view:
            seen.wrong_views += 1
            seen.differs(f"{name}: stored is {stored_view}, the view law draws {batch.views[place]}")
        if digests[place] != stored.arrays[DIGEST][row]:
            seen.wrong_pixels += 1
            seen.differs(f"{name}: digest {digests[place]:016x}, stored is {stored.arrays[DIGEST][row]:016x}")
        seen.records += 1


def _compare_array(
    name: str,
    made: npt.NDArray[Any],
    arrays: Mapping[str, npt.NDArray[Any]],
    rows: npt.NDArray[np.int64],
    seen: _Seen,
) -> None:
    """Count the elements of a codec's array that agree; none do where the stored one is absent or of another shape."""
    seen.elements[name] += made.size
    held = arrays.get(name)
    if held is None or held.shape[1:] != made.shape[1:]:
        return
    same = np.isclose(made, held[rows], CLOSE_RTOL, CLOSE_ATOL) if made.dtype.kind == "f" else made == held[rows]
    seen.equal[name] += int(np.count_nonzero(same))
