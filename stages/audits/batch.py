"""The batch of audits of students: held-out images with the teacher's whole targets.

Shapes: N image, P part of a loss.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tinymim.configs.errors import CacheMismatch, RecipeError, UserError
from tinymim.configs.sections.audits import AuditConfig
from tinymim.configs.sections.loader import VerifyConfig
from tinymim.models.student import StudentModel
from tinymim.models.vit import Normalise
from tinymim.pipeline.dataset import ViewBatch
from tinymim.pipeline.joined import join
from tinymim.pipeline.masks import visible_patches
from tinymim.pipeline.records import of_layer
from tinymim.pipeline.replay import ReplayedViews
from tinymim.pipeline.shards import open_shards
from tinymim.stages.audits.alarm import Audited
from tinymim.stages.cache.opened import Opened
from tinymim.stages.run.progress import logger
from tinymim.stages.training.device_stream import CPU
from tinymim.stages.training.terms import Term
from tinymim.stages.units.constants import on_device
from tinymim.storage import layout
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
        reader: the audit's cache.
        audited: the layer of it.
        kind: the kind of that layer, as whole targets for the losses of `term`.
        term: the term of the loss that is audited.
        place: its place among the students' heads.
        size: the students' input size.

    Raises:
        ViewMismatch, SourceError, CacheCorrupt: its images or records have changed.
        UserError: the audit's cache holds too few images of its source.
    """

    def __init__(
        self,
        config: AuditConfig,
        reader: CacheReader,
        audited: Layer,
        kind: TargetKind,
        term: Term,
        place: int,
        size: int,
    ) -> None:
        self._kind, self.term, self._place = kind, term, place
        batch = _first_views(config, reader, audited, kind, size)
        self._images = Normalise()(batch.pixels)
        self._kept = visible_patches(audited.mask, batch.named, audited.shapes.grid, CPU)
        records = of_layer(batch.records, audited.name)
        self._parts = [
            kind.decode({name: array[some] for name, array in records.items()}, batch.view_keys[some], audited.shapes)
            for some in chunks(len(batch.keys))
        ]
        self._yardsticks = kind.yardsticks(self._parts)

    @property
    def losses(self) -> dict[str, str]:
        """The names of the losses, by those among all terms ("clip-cls/cls": "cls")."""
        return {self.term.loss_name(name): name for name in self._yardsticks}

    @torch.no_grad()
    def compare(self, student: StudentModel) -> dict[str, Audited]:
        """Audit a student, in eval mode, on its device: by loss. Always computed in fp32."""
        device = next(student.parameters()).device
        chunked = [tuple(each[some].to(device) for each in self._given()) for some in chunks(len(self._images))]
        parts = [student.answers(*each)[self._place] for each in chunked]
        answers = tuple(torch.cat(sides) for sides in zip(*parts, strict=True))
        # Every answer is compared with its own image's rows and with those of the image before, so both means are over
        # the same answers.
        own, other = (self._losses(each, device) for each in (answers, tuple(side.roll(-1, 0) for side in answers)))
        return {full: Audited.of(own[name], other[name], self._yardsticks[name]) for full, name in self.losses.items()}

    def _given(self) -> tuple[Tensor, ...]:
        """The images, and the visible patches of a masked layer."""
        return (self._images,) if self._kept is None else (self._images, self._kept)

    def _losses(self, answers: Answers, device: torch.device) -> dict[str, Float[Tensor, "N P"]]:
        """The losses of all views by name, on the CPU."""
        found: dict[str, list[Tensor]] = {}
        for some, part in zip(chunks(len(answers[0])), self._parts, strict=True):
            target = self._kind.pick(part, slice(None), device)
            for name, loss in self._kind.losses(tuple(side[some] for side in answers), target).items():
                found.setdefault(name, []).append(loss.per_part())
        return {name: torch.cat(each).cpu() for name, each in found.items()}


def audit_batches(config: AuditConfig, training: Manifest, opened: Sequence[Opened], size: int) -> list[AuditBatch]:
    """The audits of every layer that students learn from.

    One of several layers is audited by the first layer of the audit's cache that fits it, or by none, which is printed.

    Args:
        config: the audit's section of the recipe.
        training: manifest of the cache that students are trained on.
        opened: the layers of it.
        size: the students' input size.

    Raises:
        CacheMismatch: the audit's cache is of another teacher or view size, or its records are not whole targets; of
            several layers, none can be audited.
        As `AuditBatch`.
    """
    reader, found = CacheReader(resolve(config.cache)), []
    sizes = [layout.size_of(name, reader.manifest) for name in reader.view_layers]
    if size not in sizes:
        raise CacheMismatch(
            f"the audit's cache {reader.place} holds no views at the students' size",
            got=", ".join(map(str, sizes)),
            expected=size,
            hint="make audit.cache with the recipe of `cache`, but with codec: {name: dense} and held-out shards",
        )
    many = len(opened) > 1 and config.layer is None and len(reader.layers) > 0
    names = list(reader.layers) if many else [config.layer]
    for place, each in enumerate(opened):
        refusals: list[CacheMismatch | RecipeError] = []
        for audited in map(reader.layer, names):
            try:
                kind = _whole_kind(each, reader, audited)
            except (CacheMismatch, RecipeError) as error:
                refusals.append(error)
                continue
            found.append(AuditBatch(config, reader, audited, kind, each.term, place, size))
            break
        else:
            if len(opened) == 1 or (not found and place == len(opened) - 1):
                raise refusals[-1]
            logger.info(f"audit: layer {each.layer.name} is not audited: {refusals[-1].what}")
    shards = {shard.content_hash for shard in reader.manifest.source}
    if shared := [shard.name for shard in training.source if shard.content_hash in shards]:
        logger.info(
            f"audit: warning: the training's cache also holds {shared[0]}: images learnt by heart improve the audit"
        )
    return found


def _whole_kind(opened: Opened, reader: CacheReader, audited: Layer) -> TargetKind:
    """The kind of an audit's layer. Raises CacheMismatch or RecipeError where it cannot audit the layer `opened`."""
    _require_same_teacher(opened.layer, audited, reader.place)
    constants = on_device(reader.constants(audited.name), CPU)
    return audit_kind(audited.target, opened.kind, audited.shapes, constants)


def chunks(count: int) -> list[slice]:
    """Views in runs of `_CHUNK`."""
    return [slice(start, start + _CHUNK) for start in range(0, count, _CHUNK)]


def _require_same_teacher(layer: Layer, audited: Layer, place: object) -> None:
    """Raises CacheMismatch where the teachers of two layers differ in anything that changes the meaning of a row."""
    wanted, found = (
        {f"teacher.{name}": value for name, value in each.teacher.items() if name not in _IGNORED}
        | {f"target.{name}": each.target.get(name) for name in ("taps", "mask")}
        for each in (layer, audited)
    )
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CacheMismatch(
                f"the audit's cache {place} is not of the training's teacher: {name} differs",
                got=found.get(name),
                expected=wanted.get(name),
                hint="make audit.cache with the recipe of `cache`, but with codec: {name: dense} and held-out shards",
            )


def _first_views(config: AuditConfig, reader: CacheReader, layer: Layer, kind: TargetKind, size: int) -> ViewBatch:
    """One view of each of the cache's first images, with every pixel digest checked."""
    source = join(open_shards(config.source), reader, [layer.name], 1, "skip", size)
    if sum(source.counts) < config.num_images:
        raise UserError(
            "the audit's cache holds too few images of audit.source",
            got=sum(source.counts),
            expected=f"audit.num_images: {config.num_images}",
            hint="cache more shards, or lower audit.num_images",
        )
    places = [(shard, image) for shard, count in enumerate(source.counts) for image in range(count)]
    items = [(*place, 0, number) for number, place in enumerate(places[: config.num_images])]
    arrays = {layer.name: [spec.name for spec in kind.specs(layer.shapes)]}
    views = ReplayedViews(reader, reader.manifest, source, arrays, VerifyConfig(first=config.num_images))
    return views.batch(np.array(items, dtype=np.int64))
