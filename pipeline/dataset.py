"""Batches of views from shards. Adjacent views of one image share one decode."""

from collections.abc import Sequence
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
        further: the same views at further sizes, by size.
    """

    items: Items
    keys: list[str]
    pixels: Tensor
    labels: Tensor
    views: list[View]
    records: dict[str, Tensor] = field(default_factory=dict)
    view_keys: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    further: dict[int, Tensor] = field(default_factory=dict)

    def at(self, size: int) -> Tensor:
        """uint8 [B, 3, size, size]: the pixels at one of the batch's sizes."""
        return self.further.get(size, self.pixels)

    def digests(self, size: int | None = None) -> Tensor:
        """int64 [B]: the 64-bit digest of every view's pixels; `size` as in `at`."""
        pixels = self.pixels if size is None else self.at(size)
        return torch.tensor([pixel_digest(view) for view in pixels], dtype=torch.int64)

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
            further={size: pixels.pin_memory() for size, pixels in self.further.items()},
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
            further={size: pixels[index] for size, pixels in self.further.items()},
        )


class ViewSource(Protocol):
    """Makes whole batches from `shards`; picklable for loader workers."""

    shards: tuple[Shard, ...]

    def batch(self, items: Items) -> ViewBatch: ...


class ImageViews:
    """Views of images under a view law, for stage one, masked pre-training and evaluation.

    Args:
        shards: the shards of the items.
        law: the view law.
        seed: its seed; None: batches have no view keys.
        further: the same law at further sizes.
    """

    def __init__(
        self, shards: tuple[Shard, ...], law: ViewLaw, seed: int | None = None, further: Sequence[ViewLaw] = ()
    ) -> None:
        self.shards, self.law, self.seed, self.further = shards, law, seed, tuple(further)

    def batch(self, items: Items) -> ViewBatch:
        """The views of `items`, int64 [B, 3 or more]: shard, sample, view index."""
        return render_items(self.shards, items[:, :3], self.law, self.seed, self.further)


def _cut(data: bytes, key: str, indices: list[int], laws: Sequence[ViewLaw]) -> list[tuple[View, list[Tensor]]]:
    """The views `indices` of one image at the size of each law, which all draw the same boxes.

    The image is decoded once per reduction, down to the lowest row in use.

    Raises:
        SourceError: the image cannot be decoded, for any view.
    """
    size = jpeg_size(data)
    whole = decode(data) if size is None else None
    height, width = size or whole.shape[1:]  # type: ignore[union-attr]  # exactly one of them is None
    views = [laws[0](key, index, height, width) for index in indices]
    reductions = [[reduction_of(view, law.size) if size and law.scaled_decode else 1 for law in laws] for view in views]
    rows: dict[int, int] = {}
    for view, of_view in zip(views, reductions, strict=True):
        rows |= {k: max(view.top + view.height, rows.get(k, 0)) for k in of_view}
    images = {k: decode(data, k, lowest) if whole is None else whole for k, lowest in rows.items()}
    return [
        (
            view,
            [
                render(images[k], reduced(view, k), law.size, law.interpolation)
                for law, k in zip(laws, of_view, strict=True)
            ],
        )
        for view, of_view in zip(views, reductions, strict=True)
    ]


def render_items(
    shards: tuple[Shard, ...], items: Items, law: ViewLaw, seed: int | None, further: Sequence[ViewLaw] = ()
) -> ViewBatch:
    """The pixels of the views of `items`, int64 [B, 3], for every stage; unreadable images are left out and listed."""
    laws = (law, *further)
    pixels = [torch.empty((len(items), 3, each.size, each.size), dtype=torch.uint8) for each in laws]
    kept: list[int] = []
    keys: list[str] = []
    views: list[View] = []
    unreadable: list[tuple[str, str]] = []
    for (unit, sample), group in groupby(enumerate(items.tolist()), key=lambda row: (row[1][0], row[1][1])):
        rows = list(group)
        key = shards[unit].members().keys[sample]
        try:
            cut = _cut(shards[unit].read(sample), key, [item[2] for _, item in rows], laws)
        except SourceError as error:
            unreadable.append((key, f"{error.what}: {error.got}"))
            continue
        for (row, item), (view, crops) in zip(rows, cut, strict=True):
            for each, held, crop in zip(laws, pixels, crops, strict=True):
                held[len(kept)] = crop
                if steps := each.steps(key, item[2]):
                    own = held[len(kept)].numpy()
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
        pixels=pixels[0][: len(kept)],
        labels=torch.tensor(labels, dtype=torch.int64),
        views=views,
        view_keys=torch.tensor(identities, dtype=torch.int64),
        unreadable=unreadable,
        further={each.size: held[: len(kept)] for each, held in zip(further, pixels[1:], strict=True)},
    )
