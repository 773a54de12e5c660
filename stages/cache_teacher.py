"""`tinymim cache-teacher`: run the teacher once over every view and store the sketches of its relations."""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tinymim.configs.errors import SourceError
from tinymim.configs.schema import CacheTeacherRecipe
from tinymim.models.teacher import Teacher
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.decode import environment
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import view_batches
from tinymim.pipeline.shards import ShardSet, open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages.audit import Audit
from tinymim.stages.calibrate import require_rebuildable, settle_constants
from tinymim.stages.gradients import GradientProbe, reference_student
from tinymim.stages.interrupt import Interrupted, StopFlag
from tinymim.stages.progress import Meter, say
from tinymim.stages.runfolder import RunFolder
from tinymim.stages.training import pick_device, require_view_size
from tinymim.storage.layout import UnitId
from tinymim.storage.manifest import Manifest, SourceShard
from tinymim.storage.writer import CacheWriter
from tinymim.targets.codecs import make_codec
from tinymim.targets.record import Codec
from tinymim.targets.relations import QKV


def run(recipe: CacheTeacherRecipe) -> None:
    """Write or complete the cache at `recipe.cache`; a stopped run continues where it was.

    Raises:
        RecipeError: sizes that do not fit one another.
        CacheMismatch: the cache there was made by something else.
        SourceError: bad shards, or more unreadable images than `max_unreadable` allows.
        Interrupted: stopped by a signal; committed units are safe.
    """
    # ---- source, teacher, codec
    device = pick_device(recipe.run.device)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    require_view_size(recipe.views.size, recipe.teacher, "teacher")
    source = open_shards(recipe.source)
    teacher = Teacher(recipe.teacher).to(device)
    codec = make_codec(recipe.codec)
    manifest = make_manifest(recipe, source, teacher, codec)
    heads, tokens = manifest.teacher["heads"], manifest.teacher["tokens"]
    codec.arrays(heads, tokens)  # refuses a codec that does not fit the teacher before anything is written
    require_rebuildable(recipe, teacher)

    # ---- what is missing
    with (
        CacheWriter.open(recipe.cache, manifest) as writer,
        RunFolder(recipe, len(writer.committed()) + 1) as log,  # a metric line per committed unit
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
        todo = missing_units(source, writer.committed(), recipe.num_views)
        if not todo:
            say("cache-teacher: nothing to do, the cache is complete")
            return
        shard_number = {shard.name: number for number, shard in enumerate(source.shards)}
        plan = [
            (unit, items)
            for unit in todo
            for items in view_batches(
                shard_number[unit.shard],
                source.shards[shard_number[unit.shard]].num_samples,
                unit.views,
                recipe.batch_size,
            )
        ]
        total = sum(len(items) for _, items in plan)

        # ---- teacher over every batch; a unit is written when its last batch is encoded
        reference = reference_student(recipe.teacher, teacher.grid, teacher.prefix_tokens, codec.relation_heads(heads))
        probe = GradientProbe(reference.to(device), codec.relation_heads(heads))
        views = ImageViews(source.shards, RandomViews(recipe.views), recipe.views.seed)
        stream = batches(views, [items for _, items in plan], recipe.loader, pin_memory=device.type == "cuda")
        with Meter("cache-teacher", total, "views") as meter:
            draft = _Draft(Audit(probe, recipe.audit_views))
            for step, ((unit, items), batch) in enumerate(zip(plan, stream, strict=True)):
                if stop.requested:
                    raise Interrupted("committed units are safe; the same command continues")
                draft.add(batch, _encode(teacher, codec, batch, draft.audit, device))
                meter.advance(len(items))
                if step + 1 == len(plan) or plan[step + 1][0] != unit:
                    _refuse_too_many_unreadable(recipe, unit, draft, source)
                    info = writer.write_unit(unit, draft.keys(unit), draft.arrays(), draft.statistics())
                    log.log(len(writer.committed()), records=info.num_records, views_per_s=meter.rate)
                    draft = _Draft(Audit(probe, recipe.audit_views))
    say(f"cache-teacher: {recipe.cache} is complete; `tinymim cache info {recipe.cache}` describes it")


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


def missing_units(source: ShardSet, committed: set[UnitId], num_views: int) -> list[UnitId]:
    """The units to compute: per shard, every maximal run of views that no committed unit holds."""
    todo = []
    for shard in source.shards:
        held = {view for unit in committed if unit.shard == shard.name for view in unit.views}
        edges = [-1, *sorted(view for view in held if view < num_views), num_views]
        todo += [UnitId(shard.name, a + 1, b - a - 1) for a, b in pairwise(edges) if b - a > 1]
    return todo


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
