"""Batches of views from shards. Adjacent views of one image share one decode."""

from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinymim.configs.errors import SourceError
from tinymim.pipeline.decode import decode, jpeg_size, pixel_digest, render
from tinymim.pipeline.operations import apply
from tinymim.pipeline.order import Items
from tinymim.pipeline.shards import Shard
from tinymim.pipeline.views import View, ViewLaw, reduced, reduction_of, view_key
from tinymim.storage.blocks import DIGEST
from tinymim.storage.layout import UnitId


@dataclass(frozen=True)
class Lacking:
    """The records of B views that a cache lacks.

    Attributes:
        items: int64 [B, 3]: shard, sample in the tar, view index.
        layers: by layer, bool [B], whether the record is missing; layers that hold all are left out.
        digests: uint32 [B], the low 32 bits of the digests of the pixels; empty if no unit is to be written.
        units: by shard and view, the unit that may be written, and the layers that lack it.
        lost: by shard and sample in the tar, why an image of these shards is left out.
    """

    items: Items
    layers: dict[str, npt.NDArray[np.bool_]]
    digests: npt.NDArray[np.uint32]
    units: dict[tuple[int, int], tuple[UnitId, tuple[str, ...]]] = field(default_factory=dict)
    lost: dict[tuple[int, int], str] = field(default_factory=dict)

    def cut(self, rows: slice) -> "Lacking":
        """A part of the batch."""
        layers = {layer: missing[rows] for layer, missing in self.layers.items()}
        return replace(self, items=self.items[rows], layers=layers, digests=self.digests[rows])

    @property
    def num_views(self) -> int:
        """Number of views that lack a record in any layer."""
        return int(np.any(list(self.layers.values()), axis=0).sum()) if self.layers else 0


@dataclass(frozen=True)
class ViewBatch:
    """B views, in the order of their items.

    Attributes:
        items: int64 [B, 3]: shard, sample, view index.
        keys: the B sample keys.
        pixels: uint8 [B, 3, S, S].
        labels: int64 [B], -1 for an image without a label.
        views: the box and flip of each of the B views.
        records: the cache's arrays for these views, by `records.named`, first axis B; empty outside stage two.
        view_keys: int64 [B], the identities that seed every draw about a view; empty if the law has no seed.
        unreadable: (key, reason) of images that could not be decoded; their views are absent from the batch.
        lacking: the records that the cache lacks, where a teacher is to compute them.
    """

    items: Items
    keys: list[str]
    pixels: Tensor
    labels: Tensor
    views: list[View]
    records: dict[str, Tensor] = field(default_factory=dict)
    view_keys: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    lacking: Lacking | None = None

    def digests(self) -> Tensor:
        """int64 [B]: the 64-bit digest of every view's pixels."""
        return torch.tensor([pixel_digest(view) for view in self.pixels], dtype=torch.int64)

    def stored(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays of the view layer, first axis B: the low 32 bits of every digest."""
        return {DIGEST: self.digests().numpy().astype(np.uint32)}

    def pin_memory(self) -> "ViewBatch":
        """Pin all tensors that a training step copies to the GPU; called by the DataLoader."""
        return replace(
            self,
            pixels=self.pixels.pin_memory(),
            records={name: array.pin_memory() for name, array in self.records.items()},
            view_keys=self.view_keys.pin_memory(),
        )

    def pick(self, rows: npt.NDArray[np.int64]) -> "ViewBatch":
        """A copy of the views at `rows` [B'], in that order; `unreadable` is unchanged."""
        index = torch.from_numpy(rows)
        return replace(
            self,
            items=self.items[rows],
            keys=[self.keys[row] for row in rows.tolist()],
            pixels=self.pixels[index],
            labels=self.labels[index],
            views=[self.views[row] for row in rows.tolist()],
            records={name: array[index] for name, array in self.records.items()},
            view_keys=self.view_keys[index] if len(self.view_keys) else self.view_keys,
        )


class ViewSource(Protocol):
    """Makes whole batches from `shards`; picklable for loader workers."""

    shards: tuple[Shard, ...]

    def batch(self, items: Items) -> ViewBatch: ...


class ImageViews:
    """Views of images under a view law, for stage one, masked pre-training and evaluation."""

    def __init__(self, shards: tuple[Shard, ...], law: ViewLaw, seed: int | None = None) -> None:
        self.shards, self.law, self.seed = shards, law, seed

    def batch(self, items: Items) -> ViewBatch:
        """The views of `items`, int64 [B, 3 or more]: shard, sample, view index."""
        return render_items(self.shards, items[:, :3], self.law, self.seed)


def _cut(data: bytes, key: str, indices: list[int], law: ViewLaw) -> list[tuple[View, Tensor]]:
    """The views `indices` of one image, which is decoded once per reduction, down to the lowest row in use.

    Raises:
        SourceError: the image cannot be decoded, for any view.
    """
    size = jpeg_size(data)
    whole = decode(data) if size is None else None
    height, width = size or whole.shape[1:]  # type: ignore[union-attr]  # exactly one of them is None
    views = [law(key, index, height, width) for index in indices]
    reductions = [reduction_of(view, law.size) if size and law.scaled_decode else 1 for view in views]
    images = {}
    for reduction in set(reductions):
        rows = max(view.top + view.height for view, k in zip(views, reductions, strict=True) if k == reduction)
        images[reduction] = decode(data, reduction, rows) if whole is None else whole
    boxes = [reduced(view, reduction) for view, reduction in zip(views, reductions, strict=True)]
    return [
        (view, render(images[reduction], box, law.size, law.interpolation))
        for view, reduction, box in zip(views, reductions, boxes, strict=True)
    ]


def render_items(shards: tuple[Shard, ...], items: Items, law: ViewLaw, seed: int | None) -> ViewBatch:
    """The pixels of the views of `items`, int64 [B, 3], for every stage; unreadable images are left out and listed."""
    pixels = torch.empty((len(items), 3, law.size, law.size), dtype=torch.uint8)
    kept: list[int] = []
    keys: list[str] = []
    views: list[View] = []
    unreadable: list[tuple[str, str]] = []
    for (unit, sample), group in groupby(enumerate(items.tolist()), key=lambda row: (row[1][0], row[1][1])):
        rows = list(group)
        key = shards[unit].members().keys[sample]
        try:
            cut = _cut(shards[unit].read(sample), key, [item[2] for _, item in rows], law)
        except SourceError as error:
            unreadable.append((key, f"{error.what}: {error.got}"))
            continue
        for (row, item), (view, crop) in zip(rows, cut, strict=True):
            pixels[len(kept)] = crop
            if steps := law.steps(key, item[2]):
                own = pixels[len(kept)].numpy()
                own[:] = apply(own, steps)
            kept.append(row)
            keys.append(key)
            views.append(view)
    items = items[kept]
    labels = [int(shards[unit].members().labels[sample]) for unit, sample, _ in items.tolist()]
    identities = (
        [] if seed is None else [view_key(seed, key, int(row[2])) for key, row in zip(keys, items, strict=True)]
    )
    return ViewBatch(
        items=np.ascontiguousarray(items),
        keys=keys,
        pixels=pixels[: len(kept)],
        labels=torch.tensor(labels, dtype=torch.int64),
        views=views,
        view_keys=torch.tensor(identities, dtype=torch.int64),
        unreadable=unreadable,
    )
