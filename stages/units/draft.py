"""Batches behind the teacher, and the part of a unit that they fill: keys, digests, records, audit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinymim.configs.errors import SourceError
from tinymim.configs.sections.masks import MaskConfig
from tinymim.models.taps import Tapped, finite_views
from tinymim.models.teacher import Teacher
from tinymim.pipeline.dataset import ViewBatch
from tinymim.pipeline.masks import visible_patches
from tinymim.pipeline.mismatch import PartnersSeen
from tinymim.stages.run.progress import logger
from tinymim.stages.units.audit import UnitAudit
from tinymim.stages.units.drops import drawn_drops
from tinymim.stages.units.ledger import Piece
from tinymim.stages.units.timing import Marks
from tinymim.storage.blocks import DIGEST
from tinymim.storage.layout import UnitId
from tinymim.targets.contract import TargetKind


@dataclass
class AuditedViews:
    """Views for the unit audit, on the teacher's device.

    Attributes:
        tapped: by layer the tapped tensors of its teacher, first axis B.
        kept: by layer the visible patches, int64 [B, M]; None for a layer without a mask.
        pixels: by layer uint8 [B, 3, S, S], at its teacher's size.
        records: by layer the codec's arrays, first axis B.
        view_keys: int64 [B].
    """

    tapped: dict[str, Tapped]
    kept: dict[str, Tensor | None]
    pixels: dict[str, Tensor]
    records: dict[str, dict[str, Tensor]]
    view_keys: Tensor


@dataclass
class EncodedBatch:
    """A batch after the teacher. On a GPU `arrays` and `finite` are filled only after `marks.wait()`.

    Attributes:
        piece: the batch's place in its unit.
        batch: the decoded views.
        arrays: by layer the codec's arrays on the CPU, first axis records.
        marks: before the teachers, after them, after the codecs, after the copy to the CPU.
        audited: views for the unit audit; None after a unit's first batches.
        finite: bool [B] on the CPU, whether the tapped tensors of a view are finite.
        hits: by layer of class logits, `TargetKind.hits` of the B views, on the CPU.
    """

    piece: Piece
    batch: ViewBatch
    arrays: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    marks: Marks | None = None
    audited: AuditedViews | None = None
    finite: Tensor | None = None
    hits: dict[str, Tensor] = field(default_factory=dict)


class Seen(NamedTuple):
    """What a teacher gives for B views, and the patches that it saw, int64 [B, M]; None: all."""

    tapped: Tapped
    kept: Tensor | None


def seen_by_layer(
    teachers: Mapping[str, Teacher],
    kinds: Mapping[str, TargetKind],
    masks: Mapping[str, MaskConfig | None],
    named: Sequence[tuple[str, int]],
    view_keys: Tensor,
    pixels: Callable[[int], Tensor],
    check: bool = True,
) -> dict[str, Seen]:
    """What each layer's teacher gives. A teacher runs once for its layers of one mask, to the last of their taps.

    Args:
        teachers: the teachers by layer.
        kinds: the codecs of the wanted layers.
        masks: the masks by layer; a layer may be absent.
        named: (sample key, view index) of the views.
        view_keys: int64 [B], on the teachers' device.
        pixels: returns the views at a size, uint8 [B, 3, size, size], on the teachers' device.
        check: as for `Teacher`.
    """
    found: dict[str, Seen] = {}
    for teacher, mask in dict.fromkeys((teachers[layer], masks.get(layer)) for layer in kinds):
        own = [layer for layer in kinds if teachers[layer] is teacher and masks.get(layer) == mask]
        taps = {tap for layer in own for tap in kinds[layer].taps}
        shown = pixels(teacher.config.img_size)
        kept = visible_patches(mask, named, teacher.grid, shown.device)
        tapped = teacher(shown, check=check, taps=taps, kept=kept, drops=drawn_drops(teacher, view_keys))
        found |= dict.fromkeys(own, Seen(tapped, kept))
    return found


def encode(
    teachers: Mapping[str, Teacher],
    kinds: Mapping[str, TargetKind],
    batch: ViewBatch,
    piece: Piece,
    audit_views: int,
    device: torch.device,
    masks: Mapping[str, MaskConfig | None] | None = None,
) -> EncodedBatch:
    """Launch teachers and codecs of the unit's layers on a batch; on a GPU the work goes on after this returns.

    Args:
        teachers: the teachers by layer, on `device`.
        kinds: the codecs by layer, on `device`.
        batch: the decoded views; may be empty.
        piece: the batch's place in its unit.
        audit_views: views that the audit still needs. It gets one view per image, because views of one image are too
            alike to show how gradients vary.
        device: the device that runs teachers and codecs.
        masks: by layer its mask; a teacher runs once for all its layers of one mask.
    """
    if not batch.keys:
        return EncodedBatch(piece, batch)
    # Nothing here may wait for the GPU: the next batch is launched while this one computes.
    used = {layer: kinds[layer] for layer in piece.layers}
    sizes = dict.fromkeys(teachers[layer].config.img_size for layer in used)
    pixels = {size: batch.at(size).to(device, non_blocking=True) for size in sizes}
    view_keys = batch.view_keys.to(device, non_blocking=True)
    marks = Marks(device)
    marks.mark()
    # Reading the check would wait; the collector reads `finite` later.
    seen = seen_by_layer(teachers, used, masks or {}, batch.named, view_keys, pixels.__getitem__, check=False)
    once = {id(each): each for each in seen.values()}
    finite = torch.stack([finite_views(each.tapped) for each in once.values()]).all(0)
    marks.mark()
    records = {layer: kind.encode(seen[layer].tapped, view_keys) for layer, kind in used.items()}
    labels = batch.labels.to(device, non_blocking=True)
    hits = {
        layer: found for layer, kind in used.items() if (found := kind.hits(seen[layer].tapped, labels)) is not None
    }
    marks.mark()
    audited = None
    if audit_views > 0:
        first = np.flatnonzero(batch.items[:, 2] == batch.items[0, 2])[:audit_views]
        rows = torch.from_numpy(first).to(device)
        some = {
            name: {tap: tuple(tensor[rows] for tensor in tensors) for tap, tensors in each.tapped.items()}
            for name, each in once.items()
        }
        shown = {size: each[rows] for size, each in pixels.items()}
        audited = AuditedViews(
            {layer: some[id(seen[layer])] for layer in used},
            {layer: None if (kept := seen[layer].kept) is None else kept[rows] for layer in used},
            {layer: shown[teachers[layer].config.img_size] for layer in used},
            {layer: {name: _picked(each, rows) for name, each in own.items()} for layer, own in records.items()},
            view_keys[rows],
        )
    arrays = {
        layer: {name: each.to("cpu", non_blocking=True) for name, each in own.items()} for layer, own in records.items()
    }
    finite = finite.to("cpu", non_blocking=True)
    hits = {layer: each.to("cpu", non_blocking=True) for layer, each in hits.items()}
    marks.mark()
    return EncodedBatch(piece, batch, arrays, marks, audited, finite, hits)


def _picked(array: Tensor, rows: Tensor) -> Tensor:
    if array.dtype == torch.uint16:  # CUDA cannot index uint16, the dtype of indices above 256 tokens
        return array.view(torch.int16)[rows].view(torch.uint16)
    return array[rows]


class UnitPart:
    """The records of all images of a unit for some of its views. "collect" fills it, then hands it to "write".

    Args:
        unit: the unit.
        views: k adjacent views of it.
        num_images: images of the shard.
        audits: by layer the unit's audit, which its parts share; these are the layers that lack the unit.
        sizes: by view layer the size of its views.

    Attributes:
        keys: one key per readable image, I of them.
        unreadable: (key, reason) of the others.
        partners: what happened to images as partners.
    """

    def __init__(
        self,
        unit: UnitId,
        views: range,
        num_images: int,
        audits: Mapping[str, UnitAudit],
        sizes: Mapping[str, int],
    ) -> None:
        self.unit, self.views, self.audits, self.sizes = unit, views, audits, sizes
        self.keys: list[str] = []
        self.unreadable: list[tuple[str, str]] = []
        self.partners = PartnersSeen()
        self._num_images = num_images
        # By layer and array, [k, images of the shard, ...].
        self._arrays: dict[str, dict[str, npt.NDArray[Any]]] = {layer: {} for layer in (*sizes, *audits)}

    @property
    def begins_unit(self) -> bool:
        """Whether it is the unit's first part."""
        return self.views.start == self.unit.first_view

    @property
    def ends_unit(self) -> bool:
        """Whether it is the unit's last part."""
        return self.views.stop == self.unit.views.stop

    def add(self, encoded: EncodedBatch) -> None:
        """Add a batch, after `marks.wait()`."""
        batch, num_views = encoded.batch, len(self.views)
        self.unreadable += batch.unreadable
        self.partners.add(batch.partners)
        if not batch.keys:
            return
        for layer, hits in encoded.hits.items():
            self.audits[layer].count_hits(hits)
        begin, keys = len(self.keys), batch.keys[::num_views]
        self.keys += keys
        found = {layer: {DIGEST: low_digests(batch, size)} for layer, size in self.sizes.items()}
        found |= {layer: {name: each.numpy() for name, each in own.items()} for layer, own in encoded.arrays.items()}
        for layer, arrays in found.items():
            held = self._arrays[layer]
            for name, values in arrays.items():
                shape = values.shape[1:]
                if name not in held:
                    held[name] = np.empty((num_views, self._num_images, *shape), values.dtype)
                # Batches hold the views of an image next to each other, units the images of a view. The copy also
                # frees pinned memory: a whole part of it is too much, and torch never returns it to the system.
                by_view = values.reshape(len(keys), num_views, *shape).swapaxes(0, 1)
                held[name][:, begin : len(self.keys)] = by_view

    def fill(
        self, keys: list[str], unreadable: list[tuple[str, str]], arrays: dict[str, dict[str, npt.NDArray[Any]]]
    ) -> None:
        """Take the records of all readable images at once, instead of `add`: by layer and name, arrays [k, I, ...]."""
        self.keys, self.unreadable, self._arrays = keys, unreadable, arrays

    def compare(self, views: AuditedViews) -> None:
        """Add views to the unit audit of every layer (I5)."""
        for layer, audit in self.audits.items():
            audit.add(
                views.tapped[layer], views.pixels[layer], views.records[layer], views.view_keys, views.kept[layer]
            )

    def records(self, layer: str) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a layer, also of a view layer, [k, I, ...]; empty without readable images."""
        return {name: values[:, : len(self.keys)] for name, values in self._arrays[layer].items()}

    def refuse_too_many_unreadable(self, max_share: float) -> None:
        """Print how many of the shard's images are unreadable.

        Raises:
            SourceError: all are, or more than the share `max_share`.
        """
        lost, count = len(self.unreadable), self._num_images
        if lost:
            logger.info(f"cache-teacher: {lost} of {count} images of {self.unit.shard} are unreadable and skipped")
        if lost > max_share * count or lost == count:
            key, reason = self.unreadable[0]
            if lost == count:
                what, expected, hint = "no readable image", "at least one readable image", "repair or remove the shard"
            else:
                what, expected = "too many unreadable images", f"at most {max_share:.1%} unreadable"
                hint = "repair the shard, or raise max_unreadable"
            raise SourceError(
                f"{what} in shard {self.unit.shard}, the first is '{key}' ({reason})",
                got=f"{lost} of {count} unreadable",
                expected=expected,
                hint=hint,
            )


def low_digests(batch: ViewBatch, size: int | None = None) -> npt.NDArray[np.uint32]:
    """uint32 [B]: the low 32 bits of the digest of every view's pixels (I2); `size` as `ViewBatch.digests`."""
    return batch.digests(size).numpy().astype(np.uint32)
