"""Turn units into commits on one device: in `cache-teacher` itself, or in each worker of a cluster.

    loader processes     read, decode, crop                     ahead by loader.prefetch batches each
    this thread          claim units; teachers and codecs on the device
    thread "collect"     copies to the CPU, digests, audit      two batches behind
    thread "write"       compress, write, sync, commit          one part of a unit behind

All queues are short, so the slowest stage throttles those before it.

A unit is made in parts of at most `views_per_decode` views of all its images. Memory does not depend on the number of
views: two parts, each of `views_per_decode` x images of a shard x (bytes of a record + 4); up to six batches of
`batch_size` images with `views_per_decode` views each; the loader's own batches. An object store adds a unit's file.
"""

import contextlib
import itertools
import queue
from collections.abc import Generator, Iterable, Mapping
from typing import Protocol

import torch

from tinymim.configs.errors import SourceError, in_one_line
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.models.taps import require_finite
from tinymim.models.teacher import Teacher
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import Items
from tinymim.pipeline.shards import Shard, ShardSet
from tinymim.pipeline.views import RandomViews
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.run.progress import logger
from tinymim.stages.units.audit import UnitAudit
from tinymim.stages.units.background import Background
from tinymim.stages.units.batch_size import find_images_per_batch
from tinymim.stages.units.constants import settle_constants
from tinymim.stages.units.draft import AuditedViews, EncodedBatch, UnitPart, encode
from tinymim.stages.units.filling import UnitFilling
from tinymim.stages.units.gradients import GradientProbe, reference_student
from tinymim.stages.units.ledger import Piece, UnitBatches, UnitReport
from tinymim.stages.units.timing import Stopwatch
from tinymim.storage import layout
from tinymim.storage.layout import UnitId
from tinymim.storage.writer import CacheWriter, UnitTaken
from tinymim.targets.contract import TargetKind
from tinymim.targets.kinds import make_kind

COLLECT_DEPTH = 2  # batches
WRITE_DEPTH = 1  # parts of a unit; `_Collector` gives the next one when the one before is written


class Units(Protocol):
    """Gives a job its units and receives their reports. The job calls it from one thread only, so it needs no lock."""

    def take(self, may_wait: bool) -> UnitId | None:
        """The next unit, not yet claimed; None: there is none now. With `may_wait` it may block for a moment."""

    @property
    def more_may_come(self) -> bool:
        """Whether `take` may still return a unit after None."""

    def settle(self, report: UnitReport) -> None:
        """Receive a unit's report: one for each time that the unit was taken."""

    def advance(self, unit: UnitId, views: int) -> None:
        """Count `views` views of a unit that went through the teacher."""


class Stop(Protocol):
    """A request to end a job; see `StopFlag`."""

    requested: bool
    requeue: bool


class TeacherJob:
    """Teachers, their codecs and the writer of their layers.

    Args:
        recipe: the cache recipe.
        device: the device of teachers and codecs.
        source: the shards.
        teachers: the teachers by layer, on `device`.
        writer: the writer of the cache.

    Raises:
        RecipeError, SourceError, CacheMismatch, CacheCorrupt: a codec's constants cannot be read or made.
    """

    def __init__(
        self,
        recipe: CacheTeacherRecipe,
        device: torch.device,
        source: ShardSet,
        teachers: Mapping[str, Teacher],
        writer: CacheWriter,
    ) -> None:
        self.recipe, self.device, self.source, self.teachers, self.writer = recipe, device, source, teachers, writer
        self.kinds: dict[str, TargetKind] = {}
        self._probes: dict[str, GradientProbe | None] = {}
        for name, target in recipe.layers.items():
            constants = settle_constants(writer, name, recipe, source, teachers[name])
            kind, shapes = make_kind(*target, constants=constants), writer.layers[name].shapes
            self.kinds[name], self._probes[name] = kind, None
            if recipe.audit_views:
                reference = reference_student(kind, teachers[name].config.img_size, shapes)
                self._probes[name] = GradientProbe(kind, reference.to(device), shapes)
        law = RandomViews(recipe.views)
        further = [law.at(size) for size in recipe.further_sizes]
        self._views = ImageViews(source.shards, law, recipe.views.seed, further=further)
        self._shards = source.by_name()
        self._counts = {shard.name: shard.num_samples for shard in source.shards}
        self.images_per_batch = (
            find_images_per_batch(teachers, self.kinds, recipe, max(source.counts), device)
            if recipe.batch_size == "auto"
            else recipe.batch_size
        )
        # The audit's small kernels must not queue behind the teacher's large ones; -1 is the higher priority.
        self._audit_stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @property
    def units_ahead(self) -> int:
        """Units that keep all stages busy: one at the teacher, one at the writer, and those in the loader."""
        loader = self.recipe.loader
        images = max(1, loader.workers * loader.prefetch) * self.images_per_batch
        return 2 + -(-images // max(self._counts.values()))

    def run(self, units: Units, stop: Stop) -> None:
        """Work on units until no more come. A unit that fails is reported, and the others go on.

        Raises:
            Interrupted: `stop` was requested; whole units are committed first.
            UserError: the cache cannot be written, or an object store fails.
        """
        watch = Stopwatch()
        self._reported: dict[str, float] = {}
        # Reports go from "write" back to this thread, the only one that may call `units`. The queue needs no bound:
        # those before it limit how many drafts exist.
        self._finished: queue.SimpleQueue[UnitReport] = queue.SimpleQueue()
        filling = UnitFilling(self.writer, self.recipe.max_unreadable)
        writing = _Writing(filling, self._shards, watch, self._finished)
        try:
            # Leaving the blocks ends "collect" before "write": what is collected can still be written.
            with (
                contextlib.closing(filling),
                Background("write", writing.add, WRITE_DEPTH) as write,
                Background("collect", _Collector(self, watch, write).add, COLLECT_DEPTH) as collect,
            ):
                while not self._round(units, stop, watch, collect):
                    pass
                with watch.during("waited_behind"):
                    collect.drain()
                    write.drain()
        except Interrupted:
            self._settle_finished(units, watch)  # the units that were written while the blocks were left
            raise
        self._settle_finished(units, watch)

    def _round(self, units: Units, stop: Stop, watch: Stopwatch, collect: Background[EncodedBatch]) -> bool:
        """Run one loader to its end. False: an unreadable shard ended it, and other units may be left."""
        pieces = UnitBatches(
            self.source,
            self.images_per_batch,
            self.recipe.views_per_decode,
            lambda wait: self._claimed(units, wait, watch),
        )
        plan = pieces.plan()
        # Starting a loader's processes takes seconds, so the first unit is claimed before.
        first = next(plan, None)
        if first is None:
            return True
        audit_views = 0
        with contextlib.closing(self._loaded(itertools.chain([first], plan))) as loaded:
            while True:
                try:
                    with watch.waiting_for_images():
                        batch = next(loaded, None)
                except SourceError as error:
                    # Batches come in order, so the one that failed is of the first unit in the loader. A loader ends
                    # with its first error: the other units return to the ledger, and the next round starts a new one.
                    failed, *others = pieces.in_progress()
                    self._settle(units, UnitReport(failed, "failed", in_one_line(error)), watch)
                    for unit in reversed(others):  # each goes to the head of the queue
                        self._settle(units, UnitReport(unit, "unfinished"), watch)
                    return False
                if stop.requested:
                    raise Interrupted("committed units are safe; the same command continues", stop.requeue)
                if batch is None:
                    return True
                piece = pieces.next_piece()
                if piece is not None:
                    # The audit's views are counted here, because "collect" is two batches behind. They are of a unit's
                    # first part: further views of the same images are too alike.
                    if piece.first:
                        audit_views = self.recipe.audit_views if piece.begins_unit else 0
                    encoded = encode(
                        self.teachers, self.kinds, batch, piece, audit_views, self.device, self.recipe.masks
                    )
                    audit_views -= 0 if encoded.audited is None else len(encoded.audited.view_keys)
                    with watch.during("waited_behind"):
                        collect.give(encoded)  # back-pressure: blocks while two batches wait
                    units.advance(piece.unit, len(batch.keys))
                self._settle_finished(units, watch)

    def _loaded(self, plan: Iterable[Items]) -> Generator[ViewBatch, None, None]:
        # No look-ahead: reading the plan claims units, which other jobs could then not take.
        cuda = self.device.type == "cuda"
        yield from batches(self._views, plan, self.recipe.loader, pin_memory=cuda, look_ahead=False)

    def _claimed(self, units: Units, may_wait: bool, watch: Stopwatch) -> tuple[UnitId, tuple[str, ...]] | None:
        """The next unit, claimed, and the layers that lack it.

        None: there is none now; with `may_wait`, there will be none.
        """
        while True:
            # Here too, because this loop can wait long for a driver, which waits for these reports.
            self._settle_finished(units, watch)
            unit = units.take(may_wait)
            if unit is None:
                if may_wait and units.more_may_come:
                    continue
                return None
            lacking = self.writer.claim_for(list(self.kinds), unit)
            if lacking:
                if self._fits_views(unit):
                    return unit, tuple(lacking)
                self.writer.give_back(unit)
            units.settle(UnitReport(unit, "elsewhere"))

    def _fits_views(self, unit: UnitId) -> bool:
        """Whether a unit lies within a unit of each view layer or outside all; another job may have added views."""
        return all(
            set(unit.views) <= set(other.views)
            for layer in self.writer.view_layers
            for other in self.writer.of_shard(layer, unit.shard)
            if other.overlaps(unit)
        )

    def _settle_finished(self, units: Units, watch: Stopwatch) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._settle(units, self._finished.get_nowait(), watch)

    def _settle(self, units: Units, report: UnitReport, watch: Stopwatch) -> None:
        if report.outcome != "committed":
            self.writer.give_back(report.unit)  # at once, not when the lease expires
        # Stages overlap, so time is not a unit's own: each report has the job's time since the previous one.
        seconds = watch.seconds()
        report.seconds.update({name: value - self._reported.get(name, 0.0) for name, value in seconds.items()})
        self._reported = seconds
        units.settle(report)

    # ---- in the thread "collect"

    def new_audits(self, layers: Iterable[str]) -> dict[str, UnitAudit]:
        """An empty audit of a unit for each layer."""
        return {layer: UnitAudit(self._probes[layer], self.recipe.audit_views) for layer in layers}

    def sizes(self, layers: Iterable[str]) -> dict[str, int]:
        """The view layers of target layers, and the sizes of their views; the cache's own comes first."""
        manifest = self.writer.manifest
        names = layout.view_layers(manifest, [self.writer.layers[layer] for layer in layers])
        return {name: layout.size_of(name, manifest) for name in names}

    def num_images(self, unit: UnitId) -> int:
        """Images of the unit's shard."""
        return self._counts[unit.shard]

    def compare(self, part: UnitPart, views: AuditedViews) -> None:
        """Add views to the audits of a part's unit; on a GPU this overlaps with the teacher."""
        if self._audit_stream is None:
            part.compare(views)
            return
        with torch.cuda.stream(self._audit_stream):
            part.compare(views)
        # The views' memory belongs to the teacher's stream, which may reuse it as soon as they are freed.
        self._audit_stream.synchronize()


class _Collector:
    """Fills parts of units with batches from the device, and gives whole ones to the thread "write"."""

    def __init__(self, job: TeacherJob, watch: Stopwatch, write: Background[UnitPart]) -> None:
        self._job, self._watch, self._write = job, watch, write
        self._part: UnitPart | None = None

    def add(self, encoded: EncodedBatch) -> None:
        """Add the next batch; batches come in tar order, part after part, unit after unit."""
        piece: Piece = encoded.piece
        if piece.begins_unit:
            self._audits, self._sizes = self._job.new_audits(piece.layers), self._job.sizes(piece.layers)
        if piece.first or self._part is None:  # drops the part of a unit that ended half-way, with its loader
            num_images = self._job.num_images(piece.unit)
            self._part = UnitPart(piece.unit, piece.views, num_images, self._audits, self._sizes)
        if encoded.marks is not None:
            # The wait for the GPU is here, up to two batches behind, so that the launching thread never waits for it.
            encoded.marks.wait()
            teacher_s, codec_s, copy_s = encoded.marks.between_s()
            self._watch.add("teacher", teacher_s)
            self._watch.add("encode", codec_s + copy_s)
        if encoded.finite is not None:
            require_finite(encoded.finite)
        if encoded.audited is not None:
            with self._watch.during("audit"):
                self._job.compare(self._part, encoded.audited)
        self._part.add(encoded)
        if piece.last:
            self._write.drain()  # so that one part is written while one is collected, and no third one exists
            self._write.give(self._part)
            self._part = None


class _Writing:
    """Writes parts in the thread "write", and reports their units."""

    def __init__(
        self,
        filling: UnitFilling,
        shards: Mapping[str, Shard],
        watch: Stopwatch,
        finished: "queue.SimpleQueue[UnitReport]",
    ) -> None:
        self._filling, self._shards, self._watch, self._finished = filling, shards, watch, finished
        self._ended: UnitReport | None = None  # of a unit that ended before its last part

    def add(self, part: UnitPart) -> None:
        """Write a part. A unit is reported after its last one, when no more of it can come."""
        with self._watch.during("write"):
            if part.begins_unit:
                self._ended = None
            report = self._ended or self._written(part)
        if part.ends_unit and report is not None:
            self._finished.put(report)
        else:
            self._ended = report

    def _written(self, part: UnitPart) -> UnitReport | None:
        unit = part.unit
        try:
            if part.ends_unit:  # stage two refuses a shard of another content, so none is committed
                self._shards[unit.shard].verify()
            done = self._filling.add(part)
        except UnitTaken as taken:  # by another job, if it believed this one dead
            logger.info(f"cache-teacher: {taken.what} now ({taken.got}); what was computed of it is dropped")
            report = UnitReport(unit, "elsewhere")
        except SourceError as error:
            report = UnitReport(unit, "failed", in_one_line(error))
        else:
            if not done:
                return None
            stored_bytes = sum(info.size_bytes for info in done)
            return UnitReport(unit, "committed", "", done[-1].num_images, done[-1].num_records, stored_bytes)
        self._filling.close()
        return report
