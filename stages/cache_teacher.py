"""`tinymim cache-teacher`: run the teacher once over every view and store the sketches of its relations."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tinymim.configs.errors import SourceError
from tinymim.configs.place import joined
from tinymim.configs.schema import CacheTeacherRecipe
from tinymim.models.teacher import Teacher
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.decode import environment
from tinymim.pipeline.loader import batches
from tinymim.pipeline.shards import ShardSet, open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages.audit import Audit
from tinymim.stages.calibrate import require_rebuildable, settle_constants
from tinymim.stages.gradients import GradientProbe, reference_student
from tinymim.stages.interrupt import Interrupted, StopFlag
from tinymim.stages.progress import Meter, say
from tinymim.stages.runfolder import RunFolder
from tinymim.stages.shared_work import SharedWork
from tinymim.stages.training import pick_device, require_view_size
from tinymim.storage.layout import UnitId
from tinymim.storage.manifest import Manifest, SourceShard
from tinymim.storage.writer import CacheWriter, UnitTaken
from tinymim.targets.codecs import make_codec
from tinymim.targets.record import Codec
from tinymim.targets.relations import QKV


class Prepared(NamedTuple):
    """What a recipe names, opened and loaded."""

    device: torch.device
    source: ShardSet
    teacher: Teacher
    manifest: Manifest


def run(recipe: CacheTeacherRecipe, cut_like: Collection[UnitId] = ()) -> None:
    """Write or complete the recipe's cache, beside any other jobs that do; a stopped run continues where it was.

    Args:
        recipe: of the cache.
        cut_like: units that were there once: missing views are written in these again, not in longer runs.

    Raises:
        RecipeError: sizes that do not fit one another.
        CacheMismatch: the cache there was made by something else.
        SourceError: bad shards, or more unreadable images than `max_unreadable` allows.
        Interrupted: stopped by a signal; committed units are safe.
    """
    # ---- source, teacher, codec
    device, source, teacher, manifest = prepare(recipe)
    heads, tokens = manifest.teacher["heads"], manifest.teacher["tokens"]
    require_rebuildable(recipe, teacher)

    # ---- join the jobs that write this cache
    place = cache_place(recipe, manifest)
    with (
        CacheWriter.open(place, manifest, recipe.lease_s) as writer,
        RunFolder(recipe, None) as log,  # a metric line per committed unit, of every job
        StopFlag() as stop,
    ):
        for difference in writer.environment_differences:
            say(f"cache-teacher: warning: {difference}")
        codec = make_codec(recipe.codec, constants=settle_constants(writer, recipe, source, teacher))
        specs = codec.arrays(heads, tokens)
        record_bytes = sum(np.dtype(spec.dtype).itemsize * int(np.prod(spec.shape)) for spec in specs)
        say(
            f"cache-teacher: {source.num_samples:,} images x {recipe.num_views} views x {record_bytes / 1024:.1f} KiB "
            f"= {source.num_samples * recipe.num_views * record_bytes / 2**30:.2f} GiB before compression, "
            f"spec {manifest.spec_id}"
        )
        work = SharedWork(writer, source, recipe.num_views, recipe.batch_size, stop, cut_like)
        if not work.missing():
            say(f"cache-teacher: nothing to do, {place} is complete")
            return

        # ---- teacher over every batch; a unit is written when its last batch is encoded
        reference = reference_student(recipe.teacher, teacher.grid, teacher.prefix_tokens, codec.relation_heads(heads))
        probe = GradientProbe(reference.to(device), codec.relation_heads(heads))
        views = ImageViews(source.shards, RandomViews(recipe.views), recipe.views.seed)
        with Meter("cache-teacher", work.missing_views(), "views") as meter:
            for plan in work.rounds():
                draft = _Draft(Audit(probe, recipe.audit_views))
                for batch in batches(views, plan, recipe.loader, pin_memory=device.type == "cuda"):
                    if stop.requested:
                        raise Interrupted("committed units are safe; the same command continues")
                    piece = work.next_piece()
                    draft.add(batch, _encode(teacher, codec, batch, draft.audit, device))
                    meter.advance(len(piece.items))
                    if piece.last:
                        _refuse_too_many_unreadable(recipe, piece.unit, draft, source)
                        _write(writer, piece.unit, draft, log, meter)
                        meter.total = meter.done + work.missing_views()  # others may have committed theirs
                        draft = _Draft(Audit(probe, recipe.audit_views))
    say(f"cache-teacher: {place} is complete; `tinymim cache info {place}` describes it")


def prepare(recipe: CacheTeacherRecipe) -> Prepared:
    """Open the source, load the teacher, and say what cache they make with the recipe's codec; writes nothing.

    Raises:
        RecipeError: sizes that do not fit one another.
        SourceError: bad shards.
        CheckpointError: the teacher's weights do not exist or do not fit.
    """
    device = pick_device(recipe.run.device)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    require_view_size(recipe.views.size, recipe.teacher, "teacher")
    source = open_shards(recipe.source)
    teacher = Teacher(recipe.teacher).to(device)
    codec = make_codec(recipe.codec)
    manifest = make_manifest(recipe, source, teacher, codec)
    codec.arrays(manifest.teacher["heads"], manifest.teacher["tokens"])  # refuses a codec that does not fit the teacher
    return Prepared(device, source, teacher, manifest)


def cache_place(recipe: CacheTeacherRecipe, manifest: Manifest) -> Path | str:
    """Where the recipe's cache is: named, or in a root that holds one cache per spec."""
    if recipe.cache is not None:
        return recipe.cache
    assert recipe.cache_root is not None  # the schema wants one of both
    return joined(recipe.cache_root, manifest.spec_id)


def make_manifest(recipe: CacheTeacherRecipe, source: ShardSet, teacher: Teacher, codec: Codec) -> Manifest:
    """The identity of the cache that this recipe makes (I6)."""
    views = recipe.views
    shards = tuple(SourceShard(s.name, s.size_bytes, s.num_samples, s.content_hash) for s in source.shards)
    return Manifest(
        source=shards,
        teacher=teacher.describe(),
        views=views.identity(),
        num_views=recipe.num_views,
        codec={"name": codec.name, "version": codec.version, "parameters": recipe.codec.model_dump(mode="json")},
        environment=environment(),
    )


def _write(writer: CacheWriter, unit: UnitId, draft: "_Draft", log: RunFolder, meter: Meter) -> None:
    """Commit a unit, unless another job did because it believed this one dead."""
    try:
        info = writer.write_unit(unit, draft.keys(unit), draft.arrays(), draft.statistics())
    except UnitTaken as taken:
        say(f"cache-teacher: {taken.what} now ({taken.got}); what was computed of it is dropped")
    else:
        log.log(len(writer.committed()), records=info.num_records, views_per_s=meter.rate)


def _encode(
    teacher: Teacher, codec: Codec, batch: ViewBatch, audit: Audit, device: torch.device
) -> dict[str, npt.NDArray[Any]]:
    """The codec's arrays for the views of a batch, on the CPU."""
    if not batch.keys:
        return {}
    pixels = batch.pixels.to(device, non_blocking=True)
    block = QKV(*teacher(pixels))
    view_keys = batch.view_keys.to(device)
    encoded = codec.encode(block, view_keys)
    if audit.wants_more:
        # One view an image: views of the same image are too alike to say how gradients vary.
        first = np.flatnonzero(batch.items[:, 2] == batch.items[0, 2])[: audit.most]
        some = torch.from_numpy(first).to(device)
        records = {name: array[some] for name, array in encoded.items()}
        audit.add(block.pick(some), pixels[some], codec.decode(records, view_keys[some], block.q.shape[2]))
    return {name: array.cpu().numpy() for name, array in encoded.items()}


class _Draft:
    """One unit being filled: keys, boxes, digests, encoded arrays and counts, batch by batch in tar order."""

    def __init__(self, audit: Audit) -> None:
        self.audit = audit
        self.unreadable: list[tuple[str, str]] = []
        self._keys: list[str] = []
        self._parts: list[dict[str, npt.NDArray[Any]]] = []

    def add(self, batch: ViewBatch, encoded: dict[str, npt.NDArray[Any]]) -> None:
        self.unreadable += batch.unreadable
        if not batch.keys:
            return
        self._keys += batch.keys
        boxes = np.array([view[:4] for view in batch.views], dtype=np.int32)
        flips = np.array([view.flip for view in batch.views], dtype=np.uint8)
        digests = batch.digests().numpy().view(np.uint64)
        self._parts.append({"box": boxes, "flip": flips, "digest": digests, **encoded})

    def keys(self, unit: UnitId) -> list[str]:
        """One key per readable image."""
        return self._keys[:: unit.num_views]

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All arrays of the unit, first axis records."""
        if not self._parts:
            return {}
        return {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}

    def statistics(self) -> dict[str, Any]:
        """What the commit record keeps: fidelity (I5) and the unreadable images."""
        return {"fidelity": self.audit.summary(), "unreadable": [list(row) for row in self.unreadable]}


def _refuse_too_many_unreadable(recipe: CacheTeacherRecipe, unit: UnitId, draft: _Draft, source: ShardSet) -> None:
    count = source.by_name()[unit.shard].num_samples
    if draft.unreadable:
        say(f"cache-teacher: {len(draft.unreadable)} of {count} images of {unit.shard} are unreadable and left out")
    if len(draft.unreadable) > recipe.max_unreadable * count or len(draft.unreadable) == count:
        key, reason = draft.unreadable[0]
        raise SourceError(
            f"too many unreadable images in shard {unit.shard}, the first is '{key}' ({reason})",
            got=f"{len(draft.unreadable)} of {count}",
            expected=f"at most {recipe.max_unreadable:.1%}",
            hint="repair the shard, or raise max_unreadable",
        )
