"""`tinymim cache verify --deep`: recompute a sample of a layer's records from images, view law and teacher."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinymim.configs.errors import CacheCorrupt, UserError
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.joined import lost_partners, places_in_tar
from tinymim.pipeline.masks import visible_patches
from tinymim.pipeline.views import RandomViews
from tinymim.stages.run.progress import Meter
from tinymim.stages.units.constants import on_device
from tinymim.stages.units.draft import low_digests
from tinymim.stages.units.drops import drawn_drops
from tinymim.stages.units.prepare import prepare
from tinymim.storage.blocks import DIGEST, Array
from tinymim.storage.catalog import resolve
from tinymim.storage.commit import UnitInfo
from tinymim.storage.layout import view_layer
from tinymim.storage.manifest import check_same, check_same_layer
from tinymim.storage.reader import CacheReader
from tinymim.targets.contract import TargetKind
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
    """Recompute records of the recipe's layers; compare the digests of pixels (I1, I2) and every array of the codecs.

    Args:
        recipe: the cache recipe, which names the images, the teacher and the layers.
        place: the cache, or a root that holds exactly one.
        sample: number of records of each layer to recompute, spread over the units.
        min_agreement: the smallest share of equal elements that passes, 0 to 1.
        seed: selects the records.

    Returns:
        Counts, shares and the verdict `passed`, as JSON values.

    Raises:
        CacheMismatch: the recipe did not make this cache or layer.
        CacheCorrupt: a record cannot be read, or its key is not in its shard.
        UserError: the cache holds no such layer, or no record of the recipe's shards in it.
        RecipeError, SourceError, CheckpointError: as `cache-teacher`.
    """
    # ---- source, teachers and codecs, compared with the manifest and the layers
    parts = prepare(recipe)
    device, source = parts.device, parts.source
    reader = CacheReader(resolve(place))
    warnings = check_same(reader.manifest, parts.manifest)
    shards = {shard.name: number for number, shard in enumerate(source.shards)}
    chosen: list[tuple[str, UnitInfo, npt.NDArray[np.int64]]] = []
    kinds: dict[str, TargetKind] = {}
    for name, wanted in parts.layers.items():
        layer = reader.layer(name)
        warnings += check_same_layer(layer, wanted)
        kinds[name] = make_kind(*recipe.layers[name], constants=on_device(reader.constants(name), device))
        units = [info for info in reader.units(name) if info.unit.shard in shards and info.num_records]
        if not units:
            raise UserError(
                f"layer {name} of {reader.place} holds no record of this source",
                got=str(reader.coverage(name)),
                hint="name the recipe that made the layer",
            )
        rows_of_units = spread_records([info.num_records for info in units], sample, f"{layer.spec_id}/{seed}")
        chosen += [(name, info, rows) for info, rows in zip(units, rows_of_units, strict=True) if len(rows)]

    # ---- unit by unit: draw the views, run the teacher, encode, compare
    law = RandomViews(recipe.views)
    lost = None if law.pairs is None else lost_partners(reader.by_shard())
    tally = _Tally()
    with Meter("cache verify --deep", sum(len(rows) for _, _, rows in chosen), "views") as meter:
        for layer_name, info, rows in chosen:
            kind, prefix = kinds[layer_name], f"{layer_name}." if len(kinds) > 1 else ""
            teacher = parts.teachers[layer_name]
            views = ImageViews(source.shards, law.at(teacher.config.img_size), recipe.views.seed, lost)
            stored = _Stored(reader, info, rows)
            number = shards[info.unit.shard]
            held = reader.keys(info.unit.shard), None if lost is None else lost[info.unit.shard]
            places = places_in_tar(source.shards[number], *held)
            rows_in = [[number, places[k], v] for k, v in zip(stored.keys, stored.views.tolist(), strict=True)]
            items = np.array(rows_in, dtype=np.int64)
            for start in range(0, len(rows), recipe.given_batch_size):
                part = np.arange(start, min(start + recipe.given_batch_size, len(rows)))
                batch = views.batch(items[part])
                kept = _rows_of(batch, items[part], part)
                tally.unreadable += len(part) - len(kept)
                for key, reason in batch.unreadable:
                    tally.add_example(f"image '{key}' is unreadable: {reason}")
                if len(kept):
                    _compare_pixels(batch, stored.digests[kept], info, tally)
                    patches = visible_patches(recipe.masks[layer_name], batch.named, teacher.grid, device)
                    keys = batch.view_keys.to(device)
                    drops = drawn_drops(teacher, keys)
                    tapped = teacher(batch.pixels.to(device), taps=kind.taps, kept=patches, drops=drops)
                    for name, values in kind.encode(tapped, keys).items():
                        _compare_array(prefix + name, values.cpu().numpy(), stored.arrays.get(name), kept, tally)
                meter.advance(len(part))

    # ---- verdict
    by_array = {name: tally.equal[name] / count for name, count in sorted(tally.elements.items())}
    agreement = sum(tally.equal.values()) / max(1, sum(tally.elements.values()))
    clean = not (tally.wrong_pixels or tally.unreadable)
    return {
        "layer": ", ".join(kinds),
        "records": tally.records,
        "units": len(chosen),
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


class _Stored:
    """The chosen records of a unit: row r of it is view r // I of image r % I.

    Attributes:
        images, views: int64 [n], of each record.
        keys: the n sample keys.
        digests: uint32 [n], from the view layer of the layer's size.
        arrays: the codec's arrays, [n, ...].
    """

    def __init__(self, reader: CacheReader, info: UnitInfo, rows: npt.NDArray[np.int64]) -> None:
        numbers, self.images = np.divmod(rows, info.num_images)
        self.views = numbers + info.unit.first_view
        all_keys = reader.keys(info.unit.shard)
        self.keys = [all_keys[image] for image in self.images.tolist()]
        self.digests = np.empty(len(rows), np.uint32)
        self.arrays = {
            name: np.empty((len(rows), *shape), dtype) for name, (dtype, shape) in reader.arrays(info.layer).items()
        }
        for view, records in reader.each_view(info, np.unique(self.views).tolist()):
            chosen = self.views == view
            self.digests[chosen] = _digests(reader, info, view)[self.images[chosen]]
            for name, values in records.items():
                self.arrays[name][chosen] = values[self.images[chosen]]


def _digests(reader: CacheReader, info: UnitInfo, view: int) -> Array:
    """uint32 [I]: what the view layer of the layer's size holds; raises CacheCorrupt if it lacks the view."""
    layer = view_layer(reader.manifest, reader.layer(info.layer).view_size)
    for unit in reader.by_shard(layer).get(info.unit.shard, ()):
        if view in unit.unit.views:
            digests: Array = reader.read_views(unit, [view])[DIGEST][0]
            return digests
    raise CacheCorrupt(f"layer {layer} of {reader.place} lacks view {view} of shard {info.unit.shard}")


def _rows_of(batch: ViewBatch, items: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rows whose images are in the batch, in its order; a batch leaves out unreadable images."""
    found = {tuple(item): row for item, row in zip(items.tolist(), rows.tolist(), strict=True)}
    return np.array([found[tuple(item)] for item in batch.items.tolist()], dtype=np.int64)


def _compare_pixels(batch: ViewBatch, stored: npt.NDArray[np.uint32], info: UnitInfo, tally: _Tally) -> None:
    """Count the views whose pixels have another digest, because box, flip or decoder differ."""
    for place, (digest, held) in enumerate(zip(low_digests(batch).tolist(), stored.tolist(), strict=True)):
        if digest != held:
            tally.wrong_pixels += 1
            name = f"image '{batch.keys[place]}' of shard {info.unit.shard}, view {batch.items[place, 2]}"
            tally.add_example(f"{name}: digest {digest:08x}, stored is {held:08x}")
        tally.records += 1


def _compare_array(
    name: str,
    made: npt.NDArray[Any],
    held: npt.NDArray[Any] | None,
    rows: npt.NDArray[np.int64],
    tally: _Tally,
) -> None:
    """Count the equal elements of a codec's array; none are if the stored array is missing or has another shape."""
    tally.elements[name] += made.size
    if held is None or held.shape[1:] != made.shape[1:]:
        return
    same = np.isclose(made, held[rows], CLOSE_RTOL, CLOSE_ATOL) if made.dtype.kind == "f" else made == held[rows]
    tally.equal[name] += int(np.count_nonzero(same))
