"""Turn units into commits on one device: in `cache-teacher` itself, or in each worker of a cluster.

    loader processes     read, decode, crop                     ahead by loader.prefetch batches each
    this thread          claim units; teacher and codec on the device
    thread "collect"     copies to the CPU, digests, audit      two batches behind
    thread "write"       compress, write, sync, commit          one unit behind

All queues are short, so the slowest stage throttles those before it.
"""

import contextlib
import itertools
import queue
from collections.abc import Generator, Iterable
from typing import Protocol

import torch

from tinymim.configs.errors import SourceError, in_one_line
from tinymim.configs.schema import CacheTeacherRecipe
from tinymim.models.taps import require_finite
from tinymim.models.teacher import Teacher
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import Items
from tinymim.pipeline.shards import ShardSet
from tinymim.pipeline.views import RandomViews
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.run.progress import logger
from tinymim.stages.units.audit import UnitAudit
from tinymim.stages.units.background import Background
from tinymim.stages.units.batch_size import find_images_per_batch
from tinymim.stages.units.constants import settle_constants
from tinymim.stages.units.draft import AuditedViews, Draft, EncodedBatch, encode
from tinymim.stages.units.gradients import GradientProbe, reference_student
from tinymim.stages.units.ledger import Piece, UnitBatches, UnitReport
from tinymim.stages.units.timing import Stopwatch
from tinymim.storage.layout import UnitId
from tinymim.storage.writer import CacheWriter, UnitTaken
from tinymim.targets.kinds import make_kind

COLLECT_DEPTH = 2  # batches
WRITE_DEPTH = 1  # units


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
    """A teacher, its codec and the writer of their cache.

    Args:
        recipe: the cache recipe.
        device: the device of teacher and codec.
        source: the shards.
        teacher: the teacher, on `device`.
        writer: the writer of the cache.

    Raises:
        RecipeError, SourceError, CacheMismatch, CacheCorrupt: the codec's constants cannot be read or made.
    """

    def __init__(
        self,
        recipe: CacheTeacherRecipe,
        device: torch.device,
        source: ShardSet,
        teacher: Teacher,
        writer: CacheWriter,
    ) -> None:
        self.recipe, self.device, self.source, self.teacher, self.writer = recipe, device, source, teacher, writer
        constants = settle_constants(writer, recipe, source, teacher)
        self.kind = make_kind(recipe.codec, recipe.teacher.block, constants=constants)
        shapes = writer.manifest.shapes
        reference = reference_student(self.kind, recipe.views.size, shapes)
        self._probe = GradientProbe(self.kind, reference.to(device), shapes)
        self._views = ImageViews(source.shards, RandomViews(recipe.views), recipe.views.seed)
        self._shards = source.by_name()
        self._counts = {shard.name: shard.num_samples for shard in source.shards}
        self.images_per_batch = (
            find_images_per_batch(teacher, self.kind, recipe, max(source.counts), device)
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
        try:
            # Leaving the blocks ends "collect" before "write": what is collected can still be written.
            with Background[Draft]("write", lambda draft: self._write(draft, watch), WRITE_DEPTH) as write:
                collector = _Collector(self, watch, write)
                with Background("collect", collector.add, COLLECT_DEPTH) as collect:
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
        pieces = UnitBatches(self.source, self.images_per_batch, lambda wait: self._claimed(units, wait, watch))
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
                    # The audit's views are counted here, because "collect" is two batches behind.
                    audit_views = self.recipe.audit_views if piece.first else audit_views
                    encoded = encode(self.teacher, self.kind, batch, piece, audit_views, self.device)
                    audit_views -= 0 if encoded.audited is None else len(encoded.audited.view_keys)
                    with watch.during("waited_behind"):
                        collect.give(encoded)  # back-pressure: blocks while two batches wait
                    units.advance(piece.unit, len(batch.keys))
                self._settle_finished(units, watch)

    def _loaded(self, plan: Iterable[Items]) -> Generator[ViewBatch, None, None]:
        # No look-ahead: reading the plan claims units, which other jobs could then not take.
        cuda = self.device.type == "cuda"
        yield from batches(self._views, plan, self.recipe.loader, pin_memory=cuda, look_ahead=False)

    def _claimed(self, units: Units, may_wait: bool, watch: Stopwatch) -> UnitId | None:
        """The next unit, claimed. None: there is none now; with `may_wait`, there will be none."""
        while True:
            # Here too, because this loop can wait long for a driver, which waits for these reports.
            self._settle_finished(units, watch)
            unit = units.take(may_wait)
            if unit is None:
                if may_wait and units.more_may_come:
                    continue
                return None
            if self.writer.claim(unit):
                return unit
            units.settle(UnitReport(unit, "elsewhere"))

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

    def new_draft(self, unit: UnitId) -> Draft:
        """An empty draft of a unit."""
        return Draft(unit, UnitAudit(self._probe, self.recipe.audit_views))

    def compare(self, draft: Draft, views: AuditedViews) -> None:
        """Add views to a draft's audit; on a GPU this overlaps with the teacher."""
        if self._audit_stream is None:
            draft.compare(views)
            return
        with torch.cuda.stream(self._audit_stream):
            draft.compare(views)
        # The views' memory belongs to the teacher's stream, which may reuse it as soon as they are freed.
        self._audit_stream.synchronize()

    # ---- in the thread "write"

    def _write(self, draft: Draft, watch: Stopwatch) -> None:
        with watch.during("write"):
            self._finished.put(self._written(draft))

    def _written(self, draft: Draft) -> UnitReport:
        """Commit a unit. Another job may have done it, if it believed this one dead."""
        unit = draft.unit
        try:
            draft.refuse_too_many_unreadable(self._counts[unit.shard], self.recipe.max_unreadable)
            self._shards[unit.shard].verify()  # stage two refuses a shard of another content, so none is committed
            info = self.writer.write_unit(unit, draft.keys(), draft.arrays(), draft.statistics())
        except UnitTaken as taken:
            logger.info(f"cache-teacher: {taken.what} now ({taken.got}); what was computed of it is dropped")
            return UnitReport(unit, "elsewhere")
        except SourceError as error:
            return UnitReport(unit, "failed", in_one_line(error))
        stored_bytes = sum(file.size_bytes for file in info.files.values())
        return UnitReport(unit, "committed", "", info.num_images, info.num_records, stored_bytes)


class _Collector:
    """Fills drafts with batches from the device, and gives whole ones to the thread "write"."""

    def __init__(self, job: TeacherJob, watch: Stopwatch, write: Background[Draft]) -> None:
        self._job, self._watch, self._write = job, watch, write
        self._draft: Draft | None = None

    def add(self, encoded: EncodedBatch) -> None:
        """Add the next batch; batches come in tar order, unit after unit."""
        piece: Piece = encoded.piece
        if piece.first or self._draft is None:  # drops the draft of a unit that ended half-way, with its loader
            self._draft = self._job.new_draft(piece.unit)
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
                self._job.compare(self._draft, encoded.audited)
        self._draft.add(encoded)
        if piece.last:
            self._write.give(self._draft)
            self._draft = None
