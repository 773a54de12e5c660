"""Batches of cached views, and the loader that yields them.

Shapes: B view, S pixel.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from tinymim.configs.sections.loader import LoaderConfig
from tinymim.models.vit import Normalise
from tinymim.pipeline.dataset import ViewBatch
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.pairs import soft_labels
from tinymim.pipeline.records import of_layer
from tinymim.pipeline.replay import ReplayedViews
from tinymim.targets.contract import Target


@dataclass(frozen=True, eq=False)
class Batch:
    """B views with the cache's records of them.

    Attributes:
        pixels: uint8 [B, 3, S, S], exactly the pixels that the teacher saw.
        keys: the B sample keys.
        views: int64 [B], the view indices.
        view_keys: int64 [B], the identities that seed every draw about a view.
        labels: int64 [B], -1 for an image without a label.
        partner_labels: int64 [B], labels of the images that mixed views are mixed with; else the own ones.
        shares: float32 [B], the share of a view's own image; 1 where it is unmixed.
        records: by layer and name, the stored arrays, first axis B.
    """

    pixels: Tensor
    keys: list[str]
    views: Tensor
    view_keys: Tensor
    labels: Tensor
    partner_labels: Tensor
    shares: Tensor
    records: dict[str, dict[str, Tensor]]
    _decode: Callable[[str, "Batch"], Target] = field(repr=False)

    @cached_property
    def targets(self) -> dict[str, Target]:
        """The decoded targets by layer, computed at first use on the batch's device; `TeacherCache.losses` takes them.

        Raises:
            CacheMismatch: another codec wrote a layer.
        """
        return {layer: self._decode(layer, self) for layer in self.records}

    def images(self) -> Tensor:
        """The pixels as float32 [B, 3, S, S], normalised by ImageNet's mean and std as students expect them."""
        images: Tensor = Normalise().to(self.pixels.device)(self.pixels)
        return images

    def soft_labels(self, num_classes: int) -> Tensor:
        """Targets for cross entropy, float32 [B, K]: mixed like the pixels, zero for an image without a label."""
        return soft_labels(self.labels, self.partner_labels, self.shares, num_classes)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """A copy on a device. Records are small, so move a batch before its targets are decoded."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            pixels=moved(self.pixels),
            views=moved(self.views),
            view_keys=moved(self.view_keys),
            labels=moved(self.labels),
            partner_labels=moved(self.partner_labels),
            shares=moved(self.shares),
            records={layer: {name: moved(a) for name, a in arrays.items()} for layer, arrays in self.records.items()},
        )


class Loader(IterableDataset[Batch]):
    """Batches of cached views in a fixed order; `TeacherCache.loader` makes it.

    One iteration is the rest of the current epoch, and the next one continues after it, also after a `break`. The order
    depends on the seed alone, not on workers or ranks. Workers are inside; if a library wants a DataLoader, use
    `DataLoader(loader, batch_size=None)` without workers.

    Attributes:
        images: number of images in use.
        num_views: number of views per image in use.
        layers: names of the layers in use.
        skipped: names of the shards that were left out.
    """

    def __init__(
        self,
        views: ReplayedViews,
        order: SampleOrder,
        config: LoaderConfig,
        pin_memory: bool,
        decode: Callable[[str, Batch], Target],
    ) -> None:
        self._views, self._order, self._config = views, order, config
        self._pin_memory, self._decode = pin_memory, decode
        source = views.source
        self.images, self.num_views, self.layers = sum(source.counts), source.num_views, tuple(source.layers)
        self.skipped = source.skipped

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self._order.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """The batches up to the end of the epoch.

        Raises:
            ViewMismatch: pixels differ from those the teacher saw.
            SourceError: an image that the cache holds is gone or unreadable.
            CacheCorrupt: bytes of the cache changed.
        """
        order = self._order
        stream = batches(
            self._views.pixels,
            order.plan((order.step // len(self) + 1) * len(self)),
            self._config,
            pin_memory=self._pin_memory,
            batches_per_entry=order.order.views_per_decode,
            rank_part=self._views,
        )
        with contextlib.closing(stream):  # ends the workers, also after a break
            for batch in stream:
                order.step += 1
                yield self._batch(batch)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, equal on every rank. The batch that the loop holds counts as done."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches of `state`, which may come from another number of ranks or workers.

        Raises:
            CheckpointError: the state belongs to another order: other images, batch size, views or seed.
        """
        self._order.load_state_dict(state)

    def _batch(self, batch: ViewBatch) -> Batch:
        records = {layer: of_layer(batch.records, layer) for layer in self.layers}
        views = torch.from_numpy(batch.items[:, 2].copy())
        labels = batch.labels, *batch.partner_labels()
        return Batch(batch.pixels, batch.keys, views, batch.view_keys, *labels, records, self._decode)
