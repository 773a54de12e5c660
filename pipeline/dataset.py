"""Batches of views from shards: decode once per image, render every view of it that the batch asks for."""

from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinymim.configs.errors import SourceError
from tinymim.pipeline.decode import decode, jpeg_size, pixel_digest, render
from tinymim.pipeline.order import Items
from tinymim.pipeline.shards import Shard
from tinymim.pipeline.views import DIGEST, View, ViewLaw, reduced, reduction_of, to_arrays, view_key


@dataclass(frozen=True)
class ViewBatch:
    """B views, in the order of the items that asked for them.

    Attributes:
        items: int64 [B, 3]: shard, sample, view index.
        keys: the sample keys, B of them.
        pixels: uint8 [B, 3, S, S].
        labels: int64 [B], -1 where there is no label.
        views: what the law says of them, B.
        records: the cache's arrays for these views, by name, first axis B; empty outside stage two.
        view_keys: int64 [B], the identities that seed every draw about a view; empty where the law has no seed.
        unreadable: (key, reason) of images that could not be decoded; their views are absent from the batch.
    """

    items: Items
    keys: list[str]
    pixels: Tensor
    labels: Tensor
    views: list[View]
    records: dict[str, Tensor] = field(default_factory=dict)
    view_keys: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def digests(self) -> Tensor:
        """int64 [B]: the 64-bit digest of every view's pixels."""
        return torch.tensor([pixel_digest(view) for view in self.pixels], dtype=torch.int64)

    def stored(self) -> dict[str, npt.NDArray[Any]]:
        """What a cache keeps beside a codec's records: the law's arrays and the digests, first axis B."""
        return to_arrays(self.views) | {DIGEST: self.digests().numpy().view(np.uint64)}

    def pin_memory(self) -> "ViewBatch":
        """Called by the DataLoader for batches that go to a GPU: pins all that a training step sends there."""
        return replace(
            self,
            pixels=self.pixels.pin_memory(),
            records={name: array.pin_memory() for name, array in self.records.items()},
            view_keys=self.view_keys.pin_memory(),
        )

    def pick(self, rows: npt.NDArray[np.int64]) -> "ViewBatch":
        """The views at `rows` [B'], in that order, copied; `unreadable` as it is."""
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
    """Makes whole batches of `shards`; picklable, so that loader workers can hold it."""

    shards: tuple[Shard, ...]

    def batch(self, items: Items) -> ViewBatch: ...


class ImageViews:
    """Views of images by a view law: stage one, masked pre-training and evaluation."""

    def __init__(self, shards: tuple[Shard, ...], law: ViewLaw, seed: int | None = None) -> None:
        self.shards, self.law, self.seed = shards, law, seed

    def batch(self, items: Items) -> ViewBatch:
        """The views that `items` [B, 3 or more] names in its first three columns."""
        return render_items(self.shards, items[:, :3], self.law, self.seed)


def _cut(data: bytes, key: str, indices: list[int], law: ViewLaw) -> list[tuple[View, Tensor]]:
    """The views `indices` of one image, decoded once for every reduction among them, as far down as they reach.

    Raises:
        SourceError: the image cannot be decoded; for all of the views or for none.
    """
    size = jpeg_size(data)
    whole = decode(data) if size is None else None
    height, width = size or whole.shape[1:]  # type: ignore[union-attr]  # one of them is there
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
    """Decode, crop and resize the views that `items` names; unreadable images are left out and listed."""
    pixels = torch.empty((len(items), 3, law.size, law.size), dtype=torch.uint8)
    kept: list[int] = []
    keys: list[str] = []
    views: list[View] = []
    unreadable: list[tuple[str, str]] = []
    # Adjacent views of one image are cut together.
    for (unit, sample), group in groupby(enumerate(items.tolist()), key=lambda row: (row[1][0], row[1][1])):
        rows = list(group)
        key = shards[unit].members().keys[sample]
        try:
            cut = _cut(shards[unit].read(sample), key, [item[2] for _, item in rows], law)
        except SourceError as error:
            unreadable.append((key, f"{error.what}: {error.got}"))
            continue
        for (row, _), (view, crop) in zip(rows, cut, strict=True):
            pixels[len(kept)] = crop
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
