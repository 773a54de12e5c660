"""`tinymim cache verify --deep`: recompute a sample of the records from images, view law and teacher."""

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
# Other hardware changes the last digits of floats, so they need a tolerance. Codes and indices are compared exactly.
CLOSE_RTOL, CLOSE_ATOL = 1e-2, 1e-4


@dataclass
class _Tally:
    """Counts over the records compared so far; `elements` and `equal` are per array of the codec."""

    elements: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    equal: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    records: int = 0
    unreadable: int = 0
    wrong_views: int = 0
    wrong_pixels: int = 0
    examples: list[str] = field(default_factory=list)

    def add_example(self, what: str) -> None:
        if len(self.examples) < LISTED_EXAMPLES:
            self.examples.append(what)


def run(
    recipe: CacheTeacherRecipe,
    place: Path | str,
    sample: int = 64,
    min_agreement: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Recompute records and compare the view (I1), the digest of its pixels (I2) and every array of the codec.

    Args:
        recipe: the cache recipe, which names the images and the teacher.
        place: the cache, or a root that holds exactly one.
        sample: number of records to recompute, spread over the units.
        min_agreement: the smallest share of equal elements that passes, 0 to 1.
        seed: selects the records.

    Returns:
        Counts, shares and the verdict `passed`, as JSON values.

    Raises:
        CacheMismatch: the recipe did not make this cache.
        CacheCorrupt: a record cannot be read, or its key is not in its shard.
        UserError: the cache holds no record of the recipe's shards.
        RecipeError, SourceError, CheckpointError: as `cache-teacher`.
    """
    # ---- source, teacher and codec, compared with the manifest
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
            hint="name the recipe that made the cache",
        )

    # ---- unit by unit: draw the views, run the teacher, encode, compare
    chosen = spread_records([info.num_records for info in units], sample, f"{reader.manifest.spec_id}/{seed}")
    views = ImageViews(source.shards, RandomViews(recipe.views), recipe.views.seed)
    tally = _Tally()
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
                tally.unreadable += len(rows[part]) - len(kept)
                for key, reason in batch.unreadable:
                    tally.add_example(f"image '{key}' is unreadable: {reason}")
                if len(kept):
                    _compare_views(batch, stored, info, kept, tally)
                    made = kind.encode(teacher(batch.pixels.to(device)), batch.view_keys.to(device))
                    for name, values in made.items():
                        _compare_array(name, values.cpu().numpy(), stored.arrays, kept, tally)
                meter.advance(len(rows[part]))

    # ---- verdict
    by_array = {name: tally.equal[name] / count for name, count in sorted(tally.elements.items())}
    agreement = sum(tally.equal.values()) / max(1, sum(tally.elements.values()))
    clean = not (tally.wrong_views or tally.wrong_pixels or tally.unreadable)
    return {
        "records": tally.records,
        "units": sum(1 for rows in chosen if len(rows)),
        "wrong_views": tally.wrong_views,
        "wrong_pixels": tally.wrong_pixels,
        "unreadable": tally.unreadable,
        "agreement": agreement,
        "agreement_by_array": by_array,
        "min_agreement": min_agreement,
        "passed": clean and agreement >= min_agreement,
        "examples": tally.examples,
        "warnings": warnings,
    }


def spread_records(counts: list[int], sample: int, identity: str) -> list[npt.NDArray[np.int64]]:
    """Choose records: divide all of them into `sample` equal parts, and take one at a hashed place from each part.

    Args:
        counts: number of records of each unit.
        sample: number of records to choose; all records if there are fewer.
        identity: text that is hashed; the choice depends on it and on `counts` only.

    Returns:
        Record numbers of each unit: int64 [chosen], ascending, without duplicates.
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
    """The (shard, image, view) of each record, int64 [n, 3]. Images are found by key (I8)."""
    positions = {key: position for position, key in enumerate(source.shards[shard].members().keys)}
    items = np.empty((len(rows), 3), dtype=np.int64)
    for place, row in enumerate(rows.tolist()):
        image, view = divmod(row, info.unit.num_views)
        key = stored.keys[image]
        if key not in positions:
            raise CacheCorrupt(f"key '{key}' of the cache is not in shard {info.unit.shard}")
        items[place] = shard, positions[key], info.unit.first_view + view
    return items


def _rows_of(batch: ViewBatch, items: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rows whose images are in the batch, in its order; a batch leaves out unreadable images."""
    found = {tuple(item): row for item, row in zip(items.tolist(), rows.tolist(), strict=True)}
    return np.array([found[tuple(item)] for item in batch.items.tolist()], dtype=np.int64)


def _compare_views(
    batch: ViewBatch, stored: UnitRecords, info: UnitInfo, rows: npt.NDArray[np.int64], tally: _Tally
) -> None:
    """Count the views that differ from the view law, and those whose pixels have another digest."""
    digests = batch.digests().numpy().view(np.uint64)
    held = from_arrays({name: stored.arrays[name][rows] for name in VIEW_ARRAYS})
    for place, (row, stored_view) in enumerate(zip(rows.tolist(), held, strict=True)):
        view = info.unit.first_view + row % info.unit.num_views
        name = f"image '{batch.keys[place]}' of shard {info.unit.shard}, view {view}"
        if batch.views[place] != stored_view:
            tally.wrong_views += 1
            tally.add_example(f"{name}: stored is {stored_view}, the view law draws {batch.views[place]}")
        if digests[place] != stored.arrays[DIGEST][row]:
            tally.wrong_pixels += 1
            tally.add_example(f"{name}: digest {digests[place]:016x}, stored is {stored.arrays[DIGEST][row]:016x}")
        tally.records += 1


def _compare_array(
    name: str,
    made: npt.NDArray[Any],
    arrays: Mapping[str, npt.NDArray[Any]],
    rows: npt.NDArray[np.int64],
    tally: _Tally,
) -> None:
    """Count the equal elements of a codec's array; none are if the stored array is missing or has another shape."""
    tally.elements[name] += made.size
    held = arrays.get(name)
    if held is None or held.shape[1:] != made.shape[1:]:
        return
    same = np.isclose(made, held[rows], CLOSE_RTOL, CLOSE_ATOL) if made.dtype.kind == "f" else made == held[rows]
    tally.equal[name] += int(np.count_nonzero(same))
