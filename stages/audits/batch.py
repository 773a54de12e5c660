"""The batch of audits of students: held-out images with the teacher's whole targets.

Shapes: N image, P part of a loss.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tinymim.configs.errors import CacheMismatch, UserError
from tinymim.configs.sections import AuditConfig, VerifyConfig
from tinymim.models.student import StudentModel
from tinymim.models.vit import Normalise
from tinymim.pipeline.dataset import ViewBatch
from tinymim.pipeline.replay import ReplayedViews, join
from tinymim.pipeline.shards import open_shards
from tinymim.stages.audits.alarm import Audited
from tinymim.stages.run.progress import logger
from tinymim.stages.training.device_stream import CPU
from tinymim.stages.units.constants import on_device
from tinymim.storage.catalog import resolve
from tinymim.storage.manifest import PROVENANCE_KEYS, Layer, Manifest
from tinymim.storage.reader import CacheReader
from tinymim.targets.contract import Answers, TargetKind
from tinymim.targets.kinds import audit_kind

_IGNORED = PROVENANCE_KEYS | {"precision"}  # of the teacher
_CHUNK = 8  # views whose losses are computed at once: relation maps of a ViT-L take 20 MB a view


class AuditBatch:
    """The images of every audit, and the teacher's whole targets for them.

    Whole targets stay in memory in float32: relations of 64 views of a ViT-L take 320 MB.

    Args:
        config: the audit's section of the recipe.
        training: manifest of the cache that students are trained on.
        layer: the layer of it.
        kind: the kind that students are trained on.

    Raises:
        CacheMismatch: the audit's cache is of another teacher or view size, or its records are not whole targets.
        ViewMismatch, SourceError, CacheCorrupt: its images or records have changed.
        UserError: the audit's cache holds too few images of its source.
    """

    def __init__(self, config: AuditConfig, training: Manifest, layer: Layer, kind: TargetKind) -> None:
        reader = CacheReader(resolve(config.cache))
        manifest, audited = reader.manifest, reader.layer(config.layer)
        shapes = audited.shapes
        _require_same_teacher(training, layer, manifest, audited, reader.place)
        self._kind = audit_kind(audited.target, kind, shapes, on_device(reader.constants(audited.name), CPU))
        batch = _first_views(config, reader, audited, self._kind)
        self._images = Normalise()(batch.pixels)
        self._parts = [
            self._kind.decode(
                {name: array[some] for name, array in batch.records.items()}, batch.view_keys[some], shapes
            )
            for some in chunks(len(batch.keys))
        ]
        self._yardsticks = self._kind.yardsticks(self._parts)
        shards = {shard.content_hash for shard in manifest.source}
        if shared := [shard.name for shard in training.source if shard.content_hash in shards]:
            logger.info(
                f"audit: warning: the training's cache also holds {shared[0]}: images learnt by heart improve the audit"
            )

    @torch.no_grad()
    def compare(self, student: StudentModel) -> dict[str, Audited]:
        """Audit a student, in eval mode, on its device: by loss. Always computed in fp32."""
        device = next(student.parameters()).device
        parts = [student(images.to(device)) for images in self._images.split(_CHUNK)]
        answers = tuple(torch.cat(sides) for sides in zip(*parts, strict=True))
        # Every answer is compared with its own image's rows and with those of the image before, so both means are over
        # the same answers.
        own, other = (self._losses(each, device) for each in (answers, tuple(side.roll(-1, 0) for side in answers)))
        return {name: Audited.of(own[name], other[name], mark) for name, mark in self._yardsticks.items()}

    def _losses(self, answers: Answers, device: torch.device) -> dict[str, Float[Tensor, "N P"]]:
        """The losses of all views by name, on the CPU."""
        found: dict[str, list[Tensor]] = {}
        for some, part in zip(chunks(len(answers[0])), self._parts, strict=True):
            target = self._kind.pick(part, slice(None), device)
            for name, loss in self._kind.losses(tuple(side[some] for side in answers), target).items():
                found.setdefault(name, []).append(loss.per_part())
        return {name: torch.cat(each).cpu() for name, each in found.items()}


def chunks(count: int) -> list[slice]:
    """Views in runs of `_CHUNK`."""
    return [slice(start, start + _CHUNK) for start in range(0, count, _CHUNK)]


def _require_same_teacher(training: Manifest, layer: Layer, audit: Manifest, audited: Layer, place: object) -> None:
    """Raises CacheMismatch where the teachers of two layers differ in anything that changes the meaning of a row."""
    wanted, found = (
        {f"teacher.{name}": value for name, value in each.teacher.items() if name not in _IGNORED}
        | {"target.taps": each.target["taps"], "views.size": manifest.views["size"]}
        for manifest, each in ((training, layer), (audit, audited))
    )
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CacheMismatch(
                f"the audit's cache {place} is not of the training's teacher: {name} differs",
                got=found.get(name),
                expected=wanted.get(name),
                hint="make audit.cache with the recipe of `cache`, but with codec: {name: dense} and held-out shards",
            )


def _first_views(config: AuditConfig, reader: CacheReader, layer: Layer, kind: TargetKind) -> ViewBatch:
    """One view of each of the cache's first images, with every pixel digest checked."""
    source = join(open_shards(config.source), reader, layer.name, 1, "skip")
    if sum(source.counts) < config.num_images:
        raise UserError(
            "the audit's cache holds too few images of audit.source",
            got=sum(source.counts),
            expected=f"audit.num_images: {config.num_images}",
            hint="cache more shards, or lower audit.num_images",
        )
    places = [(shard, image) for shard, count in enumerate(source.counts) for image in range(count)]
    items = [(*place, 0, number) for number, place in enumerate(places[: config.num_images])]
    arrays = [spec.name for spec in kind.specs(layer.shapes)]
    views = ReplayedViews(reader, reader.manifest, source, arrays, VerifyConfig(first=config.num_images))
    return views.batch(np.array(items, dtype=np.int64))
