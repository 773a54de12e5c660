"""Batches of views from shards: decode once per image, render every view of it that the batch asks for."""

from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tinymim.configs.errors import SourceError
from tinymim.pipeline.decode import decode, pixel_digest, render
from tinymim.pipeline.order import Items
from tinymim.pipeline.shards import Shard
from tinymim.pipeline.views import View, ViewLaw, view_key


@dataclass(frozen=True)
class ViewBatch:
    """B views, in the order of the items that asked for them.

    Attributes:
        items: int64 [B, 3]: shard, sample, view index.
        keys: the sample keys, B of them.
        pixels: uint8 [B, 3, S, S].
        labels: int64 [B], -1 where there is no label.
        views: the boxes and flips, B of them.
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

    def pin_memory(self) -> "ViewBatch":
        """Called by the DataLoader for batches that go to a GPU."""
        return replace(
            self,
            pixels=self.pixels.pin_memory(),
            records={name: array.pin_memory() for name, array in self.records.items()},
        )


class ViewSource(Protocol):
    """Makes whole batches; picklable, so that loader workers can hold it."""

    def batch(self, items: Items) -> ViewBatch: ...


class ImageViews:
    """Views of images by a view law: stage one, masked pre-training and evaluation."""

    def __init__(self, shards: tuple[Shard, ...], law: ViewLaw, seed: int | None = None) -> None:
        self.shards, self.law, self.seed = shards, law, seed

    def batch(self, items: Items) -> ViewBatch:
        """The views that `items` [B, 3] names."""
        return render_items(self.shards, items, self.law, self.seed)


def render_items(shards: tuple[Shard, ...], items: Items, law: ViewLaw, seed: int | None) -> ViewBatch:
    """Decode, crop and resize the views that `items` names; unreadable images are left out and listed."""
    pixels = torch.empty((len(items), 3, law.size, law.size), dtype=torch.uint8)
    kept: list[int] = []
    keys: list[str] = []
    views: list[View] = []
    unreadable: list[tuple[str, str]] = []
    last: tuple[int, int] | None = None
    image: Tensor | None = None
    for row, (unit, sample, view_index) in enumerate(items.tolist()):
        key = shards[unit].members().keys[sample]
        if last != (unit, sample):
            last, image = (unit, sample), None
            try:
                image = decode(shards[unit].read(sample))
            except SourceError as error:
                unreadable.append((key, f"{error.what}: {error.got}"))
        if image is None:
            continue
        view = law(key, view_index, image.shape[1], image.shape[2])
        pixels[len(kept)] = render(image, view, law.size, law.interpolation)
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
