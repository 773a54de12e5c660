"""Short measurements for `tinymim plan`, stage one: real images of the source, the real teacher, a real unit written.

Every number is a median after a warm-up, taken within a share of the time that the plan may take. What is written is a
cache of one unit in a temporary place beside the recipe's cache, on the same disk or store, and is removed.
"""

import contextlib
import math
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from tinymim.configs.errors import RecipeError, SourceError
from tinymim.configs.schema import CacheTeacherRecipe
from tinymim.configs.taps import Shapes
from tinymim.models.taps import Tapped, finite_views, require_finite
from tinymim.models.teacher import Teacher
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.order import Items
from tinymim.pipeline.shards import Shard, ShardSet
from tinymim.pipeline.views import RandomViews
from tinymim.stages.planning import clocks
from tinymim.stages.planning.clocks import fitting, loader_start_s, loader_threads, timed
from tinymim.stages.planning.forecast import Cost, TeacherCosts
from tinymim.stages.units.audit import UnitAudit
from tinymim.stages.units.gradients import GradientProbe, reference_student
from tinymim.stages.units.prepare import Prepared
from tinymim.storage.commit import UnitInfo, encode_commit
from tinymim.storage.layout import CHUNK_RECORDS, METADATA, UnitId, stored_bytes
from tinymim.storage.manifest import Manifest
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter
from tinymim.targets.contract import TargetKind
from tinymim.targets.kinds import ALTERNATIVES, describe_codec, make_kind

MOST_VIEWS: Final = 8  # of an image in the sample
MOST_RECORDS = {"cpu": 256, "cuda": 2048}
MOST_IMAGES = {"cpu": 64, "cuda": 512}


@dataclass(frozen=True)
class Sampled:
    """A cache of one unit for the student's measurements: real views, real records.

    Attributes:
        reader: of the cache, `shard` the one source shard that it covers, with `num_views` views.
        read_s: one record, read and unpacked on one core.
        unit_views: views that a unit of the real cache holds, `record_bytes` a view of it on disk.
    """

    reader: CacheReader
    shard: Shard
    num_views: int
    read_s: float
    unit_views: int
    record_bytes: float


# ---------------------------------------------------------------- stage one


@contextlib.contextmanager
def measured_teacher(
    recipe: CacheTeacherRecipe, prepared: Prepared, num_images: int, seconds: float
) -> Iterator[tuple[TeacherCosts, Sampled]]:
    """What stage one costs, and within the context a cache of one unit to measure students on.

    Args:
        recipe: of the cache.
        prepared: what it names, opened.
        num_images: that the cache is to be for; the source may hold a sample of them, in shards of the same size.
        seconds: that it may take, about.

    Raises:
        SourceError: no image of the sample can be read.
        RecipeError: the codec does not fit the teacher.
        UserError, StoreError: the place of the cache cannot be written.
    """
    # ---- images, teacher, codec
    device, source, teacher, manifest = prepared.device, prepared.source, prepared.teacher, prepared.manifest
    views = ImageViews(source.shards, RandomViews(recipe.views), recipe.views.seed)
    shard, items = _sample_items(source, recipe.num_views, device)
    start_s = loader_start_s(views, items[:1], recipe.loader)
    with loader_threads(recipe.loader.workers):
        decode_s, batch = _decoded(views, items, shard, 0.15 * seconds)
    tapped, forward = _forward(teacher, batch, recipe.given_batch_size * recipe.num_views, 0.35 * seconds)
    constants = _constants(prepared.kind, teacher, tapped)
    kind = make_kind(recipe.codec, recipe.teacher.block, constants=constants)
    encode = _encoding(kind, tapped, batch, 0.1 * seconds)
    audit = Cost(0.0)
    if recipe.audit_views:
        audit = _auditing(kind, recipe.views.size, manifest.shapes, tapped, batch, 0.1 * seconds)
    arrays = records(kind, tapped, batch.view_keys, kind.draws(manifest.shapes))

    # ---- a unit on the disk or store of the cache
    filled = sum(shard.num_samples > 0 for shard in source.shards)
    real_records = source.num_samples * recipe.num_views / filled
    with _temporary_place(recipe) as place, CacheWriter.open(place, manifest, recipe.lease_s) as writer:
        if constants:
            writer.write_constants({name: array.cpu().numpy() for name, array in constants.items()})
        num_views = int(batch.items[:, 2].max()) + 1
        unit, keys = UnitId(shard.name, 0, num_views), batch.keys[::num_views]
        every = arrays | batch.stored()
        small = _unit_on_disk(writer, unit, keys[:1], every, 0.04 * seconds)
        whole = _unit_on_disk(writer, unit, keys, every, 0.08 * seconds)
        payload, fixed = _bytes_of(whole.info)
        record_bytes = payload / whole.info.num_records + fixed / real_records
        beside = record_bytes - sum(stored_bytes(arrays[name]) for name in arrays) / whole.info.num_records
        own = {describe_codec(recipe.codec): record_bytes}
        costs = TeacherCosts(
            num_images=num_images,
            num_views=recipe.num_views,
            num_units=math.ceil(filled * num_images / source.num_samples),
            audit_views=recipe.audit_views,
            workers=recipe.loader.workers,
            decode_s=decode_s,
            teacher=forward,
            encode=encode,
            audit=audit,
            write=Cost(_at_size(small, whole, "write_s", real_records), whole.write_cores),
            record_bytes=record_bytes,
            codec_bytes=own | _other_codecs(own, teacher, manifest, tapped, batch, beside),
            start_s=start_s,
        )
        read_s = _at_size(small, whole, "read_s", real_records)
        yield costs, Sampled(CacheReader(place), shard, num_views, read_s, recipe.num_views, record_bytes)


def _sample_items(source: ShardSet, num_views: int, device: torch.device) -> tuple[Shard, Items]:
    """Images spread over the middle shard with their first views, int64 [views, 3], those of an image adjacent."""
    filled = [number for number, shard in enumerate(source.shards) if shard.num_samples]
    if not filled:
        raise SourceError("the source holds no image", got=f"{len(source.shards)} shards")
    number = filled[len(filled) // 2]
    shard = source.shards[number]
    views = min(num_views, MOST_VIEWS)
    count = min(MOST_IMAGES[device.type], MOST_RECORDS[device.type] // views, shard.num_samples)
    samples = np.unique(np.linspace(0, shard.num_samples - 1, count).astype(np.int64))
    rows = np.repeat(samples, views)
    columns = [np.full(len(rows), number), rows, np.tile(np.arange(views), len(samples))]
    return shard, np.stack(columns, axis=1).astype(np.int64)


def _decoded(views: ImageViews, items: Items, shard: Shard, budget_s: float) -> tuple[float, ViewBatch]:
    """Seconds per view, some images at a time, and the views of all that were decoded in time."""
    per_image = int(items[:, 2].max()) + 1
    walls: list[float] = []
    began = clocks.now_s()
    parts: list[ViewBatch] = []
    step = 4 * per_image
    for start in range(0, len(items), step):
        part = items[start : start + step]
        wall = clocks.now_s()
        parts.append(views.batch(part))
        walls.append((clocks.now_s() - wall) / len(part))
        if clocks.now_s() - began > budget_s and len(parts) > 1:
            break
    found = ViewBatch(
        items=np.concatenate([part.items for part in parts]),
        keys=[key for part in parts for key in part.keys],
        pixels=torch.cat([part.pixels for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        views=[view for part in parts for view in part.views],
        view_keys=torch.cat([part.view_keys for part in parts]),
    )
    if not found.keys:
        raise SourceError(f"none of {len(items)} views of shard {shard.name} can be read", got=parts[0].unreadable[:1])
    return statistics.median(walls[1:] or walls), found


def as_loaded(batch: ViewBatch, device: torch.device) -> Callable[[int], ViewBatch]:
    """So many views, the sample's over and over, as a loader hands them over: pinned for a GPU."""

    @cache
    def loaded(count: int) -> ViewBatch:
        repeated = batch.pick(np.arange(count) % len(batch.keys))
        return repeated.pin_memory() if device.type == "cuda" else repeated

    return loaded


def _forward(teacher: Teacher, batch: ViewBatch, wanted: int, budget_s: float) -> tuple[Tapped, Cost]:
    """What the teacher gives for some views of the sample, and the cost per view of a batch like the recipe's."""
    device = teacher.normalise.mean.device
    held: list[Tapped] = []
    loaded = as_loaded(batch, device)

    def run(count: int) -> int:
        held[:] = [teacher(loaded(count).pixels.to(device, non_blocking=True), check=False)]
        return count

    probe = timed(lambda: run(1), 0.1 * budget_s, device)
    count = fitting(probe.seconds, wanted, budget_s)
    cost = timed(lambda: run(count), budget_s, device)
    require_finite(finite_views(held[0]))
    return _first(held[0], len(batch.pixels)), cost


def _first(tapped: Tapped, count: int) -> Tapped:
    """What the teacher gave for the first `count` views, copied: the rest can be freed."""
    return {tap: tuple(tensor[:count].clone() for tensor in tensors) for tap, tensors in tapped.items()}


def _count(tapped: Tapped) -> int:
    return len(next(iter(tapped.values()))[0])


def _device(tapped: Tapped) -> torch.device:
    return next(iter(tapped.values()))[0].device


def _constants(kind: TargetKind, teacher: Teacher, tapped: Tapped) -> dict[str, torch.Tensor]:
    """The constants of a codec, calibrated on the views at hand: fewer than a cache takes, of the same size."""
    if not kind.calibration_views:
        return {}
    made = kind.calibrate([tapped], teacher.projection)
    return {name: array.to(_device(tapped)) for name, array in made.items()}


def _encoding(kind: TargetKind, tapped: Tapped, batch: ViewBatch, budget_s: float) -> Cost:
    keys = batch.view_keys[: _count(tapped)].to(_device(tapped))

    def run() -> int:
        for array in kind.encode(tapped, keys).values():
            array.cpu()
        return len(keys)

    return timed(run, budget_s, keys.device)


def _auditing(
    kind: TargetKind, view_size: int, shapes: Shapes, tapped: Tapped, batch: ViewBatch, budget_s: float
) -> Cost:
    """Cost of one audited view: the reference student's gradient under its dense target and under its record."""
    device = _device(tapped)
    reference = reference_student(kind, view_size, shapes)
    audit = UnitAudit(GradientProbe(kind, reference.to(device), shapes), 10**6)
    one, key = _first(tapped, 1), batch.view_keys[:1].to(device)
    pixels, arrays = batch.pixels[:1].to(device), kind.encode(one, key)

    def run() -> int:
        audit.add(one, pixels, arrays, key)
        return 1

    return timed(run, budget_s, device)


def records(kind: TargetKind, tapped: Tapped, keys: torch.Tensor, draws: bool) -> dict[str, npt.NDArray[Any]]:
    """Arrays of `len(keys)` records from a block of possibly fewer views, which then serve again.

    A codec that draws draws anew for every key. Of others a record that comes again has its last axis turned: equal
    records in one chunk would compress to nothing.
    """
    held, parts = _count(tapped), []
    for number, start in enumerate(range(0, len(keys), held)):
        some = keys[start : start + held].to(_device(tapped))
        arrays = kind.encode(_first(tapped, len(some)), some)
        turn = 0 if draws else number
        parts.append(
            {
                name: np.roll(array.cpu().numpy(), turn, axis=-1) if array.ndim > 1 else array.cpu().numpy()
                for name, array in arrays.items()
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# ---------------------------------------------------------------- bytes


@dataclass(frozen=True)
class _OnDisk:
    """One unit written and read: median seconds of each, and what was committed."""

    info: UnitInfo
    write_s: float
    write_cores: float
    read_s: float


def _unit_on_disk(
    writer: CacheWriter, unit: UnitId, keys: list[str], arrays: Mapping[str, npt.NDArray[Any]], budget_s: float
) -> _OnDisk:
    """Write a unit of these images again and again, and read it back, not from the system's memory where it can be."""
    records_of_unit = {name: array[: len(keys) * unit.num_views] for name, array in arrays.items()}
    writes: list[Cost] = []
    reads: list[float] = []
    began = clocks.now_s()
    while True:
        if unit in writer.committed():
            writer.drop_unit(unit)
        wall, busy = clocks.now_s(), time.process_time()
        info = writer.write_unit(unit, keys, records_of_unit, {})
        wall, busy = clocks.now_s() - wall, time.process_time() - busy
        writes.append(Cost(wall, busy / max(wall, 1e-9)))
        reader = CacheReader(writer.place)
        _forget_pages(writer.place)
        wall = clocks.now_s()
        reader.read_unit(info)
        reads.append(clocks.now_s() - wall)
        if clocks.now_s() - began > budget_s and len(writes) > 1:
            break
    return _OnDisk(
        info,
        statistics.median(write.seconds for write in writes[1:]),
        statistics.median(write.cores for write in writes[1:]),
        statistics.median(reads[1:]),
    )


def _at_size(small: _OnDisk, whole: _OnDisk, what: str, records_per_unit: float) -> float:
    """Seconds per record of a unit of the real size, from two smaller ones: so much each, and so much per record."""
    few, many = small.info.num_records, whole.info.num_records
    low, high = getattr(small, what), getattr(whole, what)
    if many == few:
        return float(high / many)
    each = max(high - low, 0.0) / (many - few)
    return float(each + max(low - few * each, 0.0) / records_per_unit)


def _bytes_of(info: UnitInfo) -> tuple[int, int]:
    """Bytes of a unit that grow with its records, and those that do not: metadata and the commit record."""
    sizes = {path: stored.size_bytes for path, stored in info.files.items()}
    metadata = sum(size for path, size in sizes.items() if path.endswith(METADATA))
    return sum(sizes.values()) - metadata, metadata + len(encode_commit(info))


def _other_codecs(
    own: Mapping[str, float], teacher: Teacher, manifest: Manifest, tapped: Tapped, batch: ViewBatch, beside: float
) -> dict[str, float]:
    """Bytes of a view on disk in other codec settings; those that do not fit the teacher are left out."""
    found: dict[str, float] = {}
    for config in ALTERNATIVES:
        plain = make_kind(config, manifest.block)
        draws = plain.draws(manifest.shapes)
        keys = batch.view_keys[: CHUNK_RECORDS if draws else min(_count(tapped), 4)]
        with contextlib.suppress(RecipeError):
            kind = make_kind(config, manifest.block, constants=_constants(plain, teacher, tapped))
            arrays = records(kind, tapped, keys, draws)
            found[describe_codec(config)] = sum(map(stored_bytes, arrays.values())) / len(keys) + beside
    return {name: size for name, size in found.items() if name not in own}


# ---------------------------------------------------------------- places


@contextlib.contextmanager
def _temporary_place(recipe: CacheTeacherRecipe) -> Iterator[Path | str]:
    """An empty place beside the recipe's cache, gone afterwards."""
    wanted = recipe.cache if recipe.cache is not None else recipe.cache_root
    assert wanted is not None  # the schema wants one of both
    if isinstance(wanted, Path):
        near = next(folder for folder in wanted.absolute().parents if folder.is_dir())
        with tempfile.TemporaryDirectory(prefix=".tinymim-plan-", dir=near) as folder:
            yield Path(folder, "cache")
        return
    beside = "-" if "/" in wanted.partition("://")[2] else "/"  # a bucket has nothing beside it
    place = f"{wanted}{beside}plan-{uuid.uuid4().hex}"
    try:
        yield place
    finally:
        open_store(place).remove_tree("")


def _forget_pages(place: Path | str) -> None:
    """Have the system drop what it keeps in memory of the files below a folder; elsewhere a no-op."""
    if isinstance(place, str) or not hasattr(os, "posix_fadvise"):
        return
    for path in place.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
