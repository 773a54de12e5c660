"""Short measurements for `tinymim plan`, stage one: the stage's own parts make a unit of real images, several times.

The unit is written to a temporary cache beside the recipe's, on the same disk or store; it is removed afterwards.
"""

import contextlib
import math
import tempfile
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import Tensor

from tinymim.configs.errors import CheckpointError, RecipeError, SourceError
from tinymim.configs.schema.cache import CacheTeacherRecipe, LayerTarget
from tinymim.models.taps import Tapped
from tinymim.models.teacher import Teacher, taps_of
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.order import Items
from tinymim.pipeline.shards import ShardSet
from tinymim.pipeline.views import RandomViews
from tinymim.stages.planning import clocks
from tinymim.stages.planning.clocks import Laps, loader_threads
from tinymim.stages.planning.forecast import TeacherCosts
from tinymim.stages.units.audit import UnitAudit
from tinymim.stages.units.draft import UnitPart, encode, seen_by_layer
from tinymim.stages.units.drops import drawn_drops
from tinymim.stages.units.gradients import GradientProbe, reference_student
from tinymim.stages.units.ledger import Piece
from tinymim.stages.units.prepare import Prepared
from tinymim.storage import layout
from tinymim.storage.blocks import stored_bytes
from tinymim.storage.commit import UnitInfo, encode_commit
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter
from tinymim.targets.contract import TargetKind
from tinymim.targets.kinds import ALTERNATIVES, describe_codec, make_kind

MOST_VIEWS: Final = {"cpu": 4, "cuda": 8}  # of an image in the measured unit
MOST_RECORDS: Final = {"cpu": 256, "cuda": 2048}  # in the measured unit
FIRST_IMAGES: Final = 4  # their first views calibrate codecs, and give the size of other codecs' records
UNITS: Final = 4  # that the budget is for; two at least are made, of which the first is a warm-up


@contextlib.contextmanager
def measured_teacher(
    recipe: CacheTeacherRecipe, prepared: Prepared, num_images: int, seconds: float
) -> Iterator[tuple[TeacherCosts, CacheReader, ShardSet]]:
    """The costs of stage one, and within the context a cache of one unit of each layer, and its images.

    Args:
        recipe: the cache recipe.
        prepared: what the recipe names, opened.
        num_images: size of the whole source; `prepared` may hold a sample of it, in shards of the same size.
        seconds: approximate time to spend.

    Raises:
        SourceError: no image of the sample can be read.
        RecipeError: the codec does not fit the teacher, or what the teacher gives is not finite.
        UserError, StoreError: the place of the cache cannot be written.
    """
    filled = [number for number, shard in enumerate(prepared.source.shards) if shard.num_samples]
    if not filled:
        raise SourceError("the source holds no image", got=f"{len(prepared.source.shards)} shards")
    began, laps = clocks.now_s(), Laps([prepared.device])
    stage = _StageOne(recipe, prepared, filled[len(filled) // 2], laps)
    view_s = (clocks.now_s() - began) / len(stage.first.keys)
    images_per_shard = prepared.source.num_samples / len(filled)
    with (
        _temporary_place(recipe) as place,
        CacheWriter.open(place, prepared.manifest, list(prepared.layers.values()), recipe.lease_s) as writer,
    ):
        for layer, constants in stage.constants.items():
            if constants:
                writer.write_constants(layer, {name: array.cpu().numpy() for name, array in constants.items()})
        units = 0
        while units < 2 or clocks.now_s() - began < seconds * (1 - 1 / UNITS):
            part = stage.part(int(seconds / UNITS / view_s))
            record_bytes = _write_and_read(writer, part, images_per_shard, laps)
            # The first views may have been slow, because kernels were loaded: each unit is sized by the one before.
            view_s = sum(map(laps.latest_s, ("decode", "models", "digest")))
            units += 1
        payload = stage.payload_bytes()
        own = next(iter(payload.values()))
        costs = TeacherCosts(
            num_images=num_images,
            num_views=recipe.num_views,
            num_units=math.ceil(len(filled) * num_images / prepared.source.num_samples)
            * math.ceil(recipe.num_views / recipe.views_per_unit),
            audit_views=recipe.audit_views,
            workers=recipe.loader.workers,
            phase_s={name: seconds for name, seconds in laps.medians_s().items() if name != "models"},
            cores=laps.cores("models"),
            codec_bytes={name: as_record(size, own, record_bytes) for name, size in payload.items()},
        )
        yield costs, CacheReader(place), ShardSet((stage.shard,))


def as_record(size: float, own: float, record_bytes: float) -> float:
    """Bytes of a record of another codec, as it lies in a unit.

    Args:
        size: bytes of its arrays, measured apart.
        own: the same of the codec that the recipe writes.
        record_bytes: bytes of a record of that codec in a unit.
    """
    # What a unit adds is the same for all. Where units compress better than a few records, all do so in proportion.
    return size + record_bytes - own if record_bytes >= own else size * record_bytes / own


class _StageOne:
    """Stage one on a shard's first images, one phase after the other, each a lap.

    Args:
        recipe: the cache recipe.
        prepared: what the recipe names, opened.
        number: the shard's place in the source.
        laps: laps "decode", "teacher", "encode", "digest" and "audit" are added here.
    """

    def __init__(self, recipe: CacheTeacherRecipe, prepared: Prepared, number: int, laps: Laps) -> None:
        self.recipe, self.prepared, self.number, self.laps = recipe, prepared, number, laps
        self.shard = prepared.source.shards[number]
        self.unit = UnitId(self.shard.name, 0, min(recipe.views_per_batch, MOST_VIEWS[prepared.device.type]))
        law = RandomViews(recipe.views)
        further = [law.at(size) for size in recipe.further_sizes]
        self.views = ImageViews(prepared.source.shards, law, recipe.views.seed, further=further)
        self._begin = 0
        self.first = self.views.batch(self.items(FIRST_IMAGES, 1))
        if not self.first.keys:
            raise SourceError(f"the first images of shard {self.shard.name} are unreadable", got=self.first.unreadable)
        self._begin = int(self.first.items[0, 1])  # a readable image: no unit is empty
        self._seen = seen_by_layer(
            prepared.teachers, prepared.kinds, recipe.masks, self.first.named, self._view_keys, self._pixels
        )
        self.kinds: dict[str, TargetKind] = {}
        self.constants: dict[str, dict[str, Tensor]] = {}
        self._probes: dict[str, GradientProbe] = {}
        for name, target in recipe.layers.items():
            teacher = prepared.teachers[name]
            kind, self.constants[name] = self._kind(target, self._seen[name].tapped, teacher)
            shapes = prepared.layers[name].shapes
            reference = reference_student(kind, teacher.config.img_size, shapes)
            self.kinds[name], self._probes[name] = kind, GradientProbe(kind, reference.to(prepared.device), shapes)

    @property
    def _view_keys(self) -> Tensor:
        return self.first.view_keys.to(self.prepared.device)

    def _pixels(self, size: int) -> Tensor:
        return self.first.at(size).to(self.prepared.device)

    def items(self, images: int, views: int) -> Items:
        """The first views of some images, int64 [images x views, 3], those of an image adjacent."""
        samples = np.repeat(np.arange(self._begin, min(self._begin + images, self.shard.num_samples)), views)
        return np.stack([np.full_like(samples, self.number), samples, np.arange(len(samples)) % views], axis=1)

    def _kind(self, target: LayerTarget, tapped: Tapped, teacher: Teacher) -> tuple[TargetKind, dict[str, Tensor]]:
        """A codec and its constants, from fewer views than those of a cache, of the same size."""
        kind = make_kind(*target)
        made = kind.calibrate([tapped], teacher.projection) if kind.calibration_views else {}
        constants = {name: array.to(self.prepared.device) for name, array in made.items()}
        return make_kind(*target, constants=constants), constants

    def part(self, most_records: int) -> UnitPart:
        """A unit of as many images as `most_records` allows, in batches like the recipe's."""
        recipe, device, num_views = self.recipe, self.prepared.device, self.unit.num_views
        images = min(most_records, MOST_RECORDS[device.type]) // num_views
        items = self.items(max(images, 2), num_views)
        rows = max(recipe.given_batch_size * recipe.views_per_batch // num_views, 1) * num_views
        audits = {name: UnitAudit(probe, recipe.audit_views) for name, probe in self._probes.items()}
        audit = next(iter(audits.values()))  # all get the same views
        manifest = self.prepared.manifest
        view_layers = layout.view_layers(manifest, self.prepared.layers.values())
        sizes = {name: layout.size_of(name, manifest) for name in view_layers}
        unit_part = UnitPart(self.unit, self.unit.views, len(items) // num_views, audits, sizes)
        for start in range(0, len(items), rows):
            some = items[start : start + rows]
            with loader_threads(recipe.loader.workers), self.laps.lap("decode", len(some)):
                batch = self.views.batch(some)
            if not batch.keys:
                continue
            batch = batch.pin_memory() if device.type == "cuda" else batch
            audited = min(1, recipe.audit_views - audit.views)
            with self.laps.lap("models", len(some)):
                piece = Piece(self.unit, tuple(self.kinds), self.unit.views, True, True)
                encoded = encode(self.prepared.teachers, self.kinds, batch, piece, audited, device, recipe.masks)
            assert encoded.marks is not None  # of a batch that is not empty
            teacher_s, codec_s, copy_s = encoded.marks.between_s()
            self.laps.add("teacher", teacher_s / len(batch.keys))
            self.laps.add("encode", (codec_s + copy_s) / len(batch.keys))
            if encoded.audited is not None:
                with self.laps.lap("audit", len(encoded.audited.view_keys)):
                    unit_part.compare(encoded.audited)
            with self.laps.lap("digest", len(some)):
                unit_part.add(encoded)
        return unit_part

    def payload_bytes(self) -> dict[str, float]:
        """Bytes that the arrays of a view take on disk, by codec; what the recipe writes comes first.

        The other entries are other codecs for its only layer, or each of its layers.
        """
        layers = self.recipe.layers
        if len(layers) > 1:
            each = {name: self._size_bytes(kind, self._seen[name].tapped) for name, kind in self.kinds.items()}
            return {f"{len(layers)} layers": sum(each.values()), **each}
        found: dict[str, float] = {}
        [(layer, (own, block))] = layers.items()
        teacher = self.prepared.teachers[layer]
        tapped = self._tapped_for_all(layer)
        for config in (own, *ALTERNATIVES):
            with contextlib.suppress(RecipeError):  # a codec that does not fit the teacher
                if set(make_kind(config, block).taps) <= tapped.keys():
                    kind, _ = self._kind(LayerTarget(config, block), tapped, teacher)
                    found[describe_codec(config)] = self._size_bytes(kind, tapped)
        return found

    def _size_bytes(self, kind: TargetKind, tapped: Tapped) -> float:
        arrays = kind.encode(tapped, self._view_keys).values()
        return sum(stored_bytes(array.cpu().numpy()) for array in arrays) / len(self.first.keys)

    def _tapped_for_all(self, layer: str) -> Tapped:
        """The tensors of the first views at the taps of all alternatives that the layer's teacher has."""
        tapped, config = self._seen[layer].tapped, self.prepared.teachers[layer].config
        wanted = {tap for each in ALTERNATIVES for tap in make_kind(each, config.block).taps} - tapped.keys()
        with contextlib.suppress(CheckpointError):  # weights that end at the tapped block have no final norm
            # A teacher of its own: the recipe's is cut after its last tap.
            more = Teacher(config, [*tapped, *taps_of(config, sorted(wanted))]).to(self.prepared.device)
            drops = drawn_drops(more, self._view_keys)
            found: Tapped = more(self._pixels(config.img_size), kept=self._seen[layer].kept, drops=drops)
            return found
        return tapped


# ---------------------------------------------------------------- the disk or store


def _write_and_read(writer: CacheWriter, part: UnitPart, images_per_shard: float, laps: Laps) -> float:
    """Write a unit and read it back, and return its bytes per record; laps "write" and "read".

    A unit of one image and the whole one tell what each view of a unit costs from what each record costs. The result is
    for shards of the real size.
    """
    num_views, timed, found = part.unit.num_views, Laps(), []
    for count in (1, len(part.keys)):
        for each in (*part.sizes, *part.audits):
            if part.unit in writer.committed(each):
                writer.drop_unit(each, part.unit)
        with timed.lap("write", 1):
            infos = _written(writer, part, count)
        reader = CacheReader(writer.place)
        with timed.lap("read", 1):
            for info in infos:
                deque(reader.each_view(info), maxlen=0)
        size_bytes = sum(info.size_bytes + len(encode_commit(info)) for info in infos)
        found.append(np.array([timed.latest_s("write"), timed.latest_s("read"), size_bytes]) / num_views)
    (small, whole), more = found, len(part.keys) - 1
    each_record = np.maximum(whole - small, 0) / more if more else whole
    total = each_record + np.maximum(small - each_record, 0) / images_per_shard
    write_s, read_s, record_bytes = total.tolist()
    laps.add("write", write_s)
    laps.add("read", read_s)
    return float(record_bytes)


def _written(writer: CacheWriter, part: UnitPart, count: int) -> list[UnitInfo]:
    """Commit the first `count` images of a unit to the view layers and the target layers."""
    unit, infos = part.unit, []
    statistics: dict[str, dict[str, Any]] = {name: {} for name in part.sizes} | {VIEWS: {"unreadable": []}}
    statistics |= {layer: {"fidelity": audit.summary()} for layer, audit in part.audits.items()}
    for layer, about in statistics.items():
        with writer.begin(layer, unit, part.keys[:count]) as draft:
            draft.add({name: values[:, :count] for name, values in part.records(layer).items()})
            infos.append(draft.commit(about))
    writer.give_back(unit)
    return infos


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
