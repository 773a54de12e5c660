"""What turns units into commits on one device: `cache-teacher` itself without a cluster, each worker with one.

    loader processes     read, decode, crop                     ahead by loader.prefetch batches each
    this thread          claim units; teacher and codec on the device
    thread "collect"     copies to the CPU, digests, audit      two batches behind
    thread "write"       compress, write, sync, commit          one unit behind

Every line between two of them is short, so that whoever is slowest stops the ones before.
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
from tinymim.stages.run.progress import say
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
    """Where a job's units come from and where it says what became of them; called by one thread."""

    def take(self, may_wait: bool) -> UnitId | None:
        """The next unit, not yet claimed. None: there is none now. It waits a moment at most, if it may."""

    @property
    def more_may_come(self) -> bool:
        """Whether it is worth asking again after None."""

    def settle(self, report: UnitReport) -> None:
        """Once for every unit that was taken, and again for one that was taken again."""

    def advance(self, unit: UnitId, views: int) -> None:
        """So many views of a unit have gone through the teacher."""


class Stop(Protocol):
    """Asks a job to end."""

    requested: bool
    requeue: bool


class TeacherJob:
    """A teacher, its codec and a writer of their cache.

    Args:
        recipe: of the cache.
        device: for teacher and codec.
        source: the shards.
        teacher: on `device`.
        writer: of the cache.

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
        self._counts = {shard.name: shard.num_samples for shard in source.shards}
        self.images_per_batch = (
            find_images_per_batch(teacher, self.kind, recipe, max(source.counts), device)
            if recipe.batch_size == "auto"
            else recipe.batch_size
        )
        # The audit's small operations must not wait behind the teacher's large ones: -1 is the higher priority.
        self._audit_stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @property
    def units_ahead(self) -> int:
        """Units that keep everything busy: one each at teacher and writer, and what the loader has begun."""
        loader = self.recipe.loader
        images = max(1, loader.workers * loader.prefetch) * self.images_per_batch
        return 2 + -(-images // max(self._counts.values()))

    def run(self, units: Units, stop: Stop) -> None:
        """Work on units until none are given any more; those that fail are reported, and the others go on.

        Raises:
            Interrupted: `stop` asks for it; whole units are committed first.
            UserError: the cache cannot be written, or an object store fails.
        """
        watch = Stopwatch()
        self._reported: dict[str, float] = {}
        # Unbounded, but no longer than the lines before it.
        self._finished: queue.SimpleQueue[UnitReport] = queue.SimpleQueue()
        try:
            with Background[Draft]("write", lambda draft: self._write(draft, watch), WRITE_DEPTH) as write:
                collector = _Collector(self, watch, write)
                with Background("collect", collector.add, COLLECT_DEPTH) as collect:
                    while not self._round(units, stop, watch, collect):
                        pass
                    with watch.during("waited_behind"):
                        collect.drain()
                        write.drain()
        except Interrupted:
            self._settle_finished(units, watch)
            raise
        self._settle_finished(units, watch)

    def _round(self, units: Units, stop: Stop, watch: Stopwatch, collect: Background[EncodedBatch]) -> bool:
        """Work on what one loader yields. False: a shard as a whole failed, and the loader ended with it."""
        pieces = UnitBatches(self.source, self.images_per_batch, lambda wait: self._claimed(units, wait, watch))
        plan = pieces.plan()
        first = next(plan, None)
        if first is None:  # no loader is begun for nothing
            return True
        audit_views = 0
        with contextlib.closing(self._loaded(itertools.chain([first], plan))) as loaded:
            while True:
                try:
                    with watch.waiting_for_images():
                        batch = next(loaded, None)
                except SourceError as error:
                    self._give_back(pieces.in_hand(), error, units, watch)
                    return False
                if stop.requested:
                    raise Interrupted("committed units are safe; the same command continues", stop.requeue)
                if batch is None:
                    return True
                piece = pieces.next_piece()
                if piece is not None:
                    audit_views = self.recipe.audit_views if piece.first else audit_views
                    encoded = encode(self.teacher, self.kind, batch, piece, audit_views, self.device)
                    audit_views -= 0 if encoded.audited is None else len(encoded.audited.view_keys)
                    with watch.during("waited_behind"):
                        collect.give(encoded)
                    units.advance(piece.unit, len(batch.keys))
                self._settle_finished(units, watch)

    def _loaded(self, plan: Iterable[Items]) -> Generator[ViewBatch, None, None]:
        # To read the plan is to claim units.
        cuda = self.device.type == "cuda"
        yield from batches(self._views, plan, self.recipe.loader, pin_memory=cuda, look_ahead=False)

    def _claimed(self, units: Units, may_wait: bool, watch: Stopwatch) -> UnitId | None:
        """The next unit, claimed; None where there is none now, or where there will be none if it may wait."""
        while True:
            self._settle_finished(units, watch)
            unit = units.take(may_wait)
            if unit is None:
                if may_wait and units.more_may_come:
                    continue
                return None
            if self.writer.claim(unit):
                return unit
            units.settle(UnitReport(unit, "elsewhere"))

    def _give_back(self, in_hand: list[UnitId], error: SourceError, units: Units, watch: Stopwatch) -> None:
        failed, *others = in_hand
        self._settle(units, UnitReport(failed, "failed", in_one_line(error)), watch)
        for unit in reversed(others):
            self._settle(units, UnitReport(unit, "unfinished"), watch)

    def _settle_finished(self, units: Units, watch: Stopwatch) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._settle(units, self._finished.get_nowait(), watch)

    def _settle(self, units: Units, report: UnitReport, watch: Stopwatch) -> None:
        if report.outcome != "committed":
            self.writer.give_back(report.unit)
        seconds = watch.seconds()
        report.seconds.update({name: value - self._reported.get(name, 0.0) for name, value in seconds.items()})
        self._reported = seconds
        units.settle(report)

    # ---- in the thread "collect"

    def new_draft(self, unit: UnitId) -> Draft:
        """For a unit whose first batch comes."""
        return Draft(unit, UnitAudit(self._probe, self.recipe.audit_views))

    def compare(self, draft: Draft, views: AuditedViews) -> None:
        """The audit of some views, beside the teacher where the device can."""
        if self._audit_stream is None:
            draft.compare(views)
            return
        with torch.cuda.stream(self._audit_stream):
            draft.compare(views)
        self._audit_stream.synchronize()  # before the views' memory goes back to the teacher's stream

    # ---- in the thread "write"

    def _write(self, draft: Draft, watch: Stopwatch) -> None:
        """Commit a unit, unless it fails or another job did because it believed this one dead."""
        with watch.during("write"):
            self._finished.put(self._written(draft))

    def _written(self, draft: Draft) -> UnitReport:
        unit = draft.unit
        try:
            draft.refuse_too_many_unreadable(self._counts[unit.shard], self.recipe.max_unreadable)
            info = self.writer.write_unit(unit, draft.keys(), draft.arrays(), draft.statistics())
        except UnitTaken as taken:
            say(f"cache-teacher: {taken.what} now ({taken.got}); what was computed of it is dropped")
            return UnitReport(unit, "elsewhere")
        except SourceError as error:
            return UnitReport(unit, "failed", in_one_line(error))
        stored_bytes = sum(file.size_bytes for file in info.files.values())
        return UnitReport(unit, "committed", "", info.num_images, info.num_records, stored_bytes)


class _Collector:
    """Fills drafts with what comes from the device, and sends whole ones to be written."""

    def __init__(self, job: TeacherJob, watch: Stopwatch, write: Background[Draft]) -> None:
        self._job, self._watch, self._write = job, watch, write
        self._draft: Draft | None = None

    def add(self, encoded: EncodedBatch) -> None:
        """A batch; in tar order, unit after unit."""
        piece: Piece = encoded.piece
        if piece.first or self._draft is None:
            self._draft = self._job.new_draft(piece.unit)
        if encoded.marks is not None:
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
