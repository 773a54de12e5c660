"""Batches of views from shards. Adjacent views of one image share one decode, and so do partners in one batch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinymim.configs.errors import SourceError
from tinymim.pipeline.decode import decode, jpeg_size, pixel_digest, render
from tinymim.pipeline.operations.registry import apply
from tinymim.pipeline.order import Items, PartnersOf
from tinymim.pipeline.pairs import Mix, mixed, mixed_key, partners_of
from tinymim.pipeline.shards import Shard
from tinymim.pipeline.views import View, ViewLaw, reduced, reduction_of, view_key
from tinymim.storage.blocks import DIGEST
from tinymim.storage.layout import UnitId


@dataclass(frozen=True)
class Partners:
    """The views that the B views of a batch are mixed with.

    Attributes:
        keys: keys of the partners; None where a view is unmixed.
        mixes: share and box at the batch's own size; None where a view is unmixed. The box of CutMix is drawn in
            pixels of a view, so its share at another size differs by rounding.
        labels: int64 [B], labels of the partners; the own ones where a view is unmixed.
        lost: by key, why a partner could not be decoded. The views that lack it are unmixed.
    """

    keys: list[str | None]
    mixes: list[Mix | None]
    labels: npt.NDArray[np.int64]
    lost: dict[str, str]

    @property
    def shares(self) -> npt.NDArray[np.float32]:
        """float32 [B]: the share of a view's own image; 1 where it is unmixed."""
        return np.array([1.0 if mix is None else mix.share for mix in self.mixes], np.float32)

    def of(self, rows: Sequence[int], shard: Shard) -> "Partners":
        """The partners of the views at `rows`, which are of one shard."""
        own = set(shard.members().keys)
        return replace(self.pick(rows), lost={key: reason for key, reason in self.lost.items() if key in own})

    def pick(self, rows: Sequence[int]) -> "Partners":
        """The partners of the views at `rows`."""
        keys, mixes = [self.keys[row] for row in rows], [self.mixes[row] for row in rows]
        return replace(self, keys=keys, mixes=mixes, labels=self.labels[list(rows)])


@dataclass(frozen=True)
class Lacking:
    """The records of B views that a cache lacks.

    Attributes:
        items: int64 [B, 3]: shard, sample in the tar, view index.
        named: (sample key, view index) of every view.
        layers: by layer, bool [B], whether the record is missing; layers that hold all are left out.
        digests: uint32 [B], the low 32 bits of the digests of the pixels; empty if no unit is to be written.
        units: by shard and view, the unit that may be written, and the layers that lack it.
        lost: by shard and sample in the tar, why an image of these shards is left out.
        partners: the views that they are mixed with; None under a law without pairs.
    """

    items: Items
    named: list[tuple[str, int]]
    layers: dict[str, npt.NDArray[np.bool_]]
    digests: npt.NDArray[np.uint32]
    units: dict[tuple[int, int], tuple[UnitId, tuple[str, ...]]] = field(default_factory=dict)
    lost: dict[tuple[int, int], str] = field(default_factory=dict)
    partners: Partners | None = None

    def cut(self, rows: slice) -> "Lacking":
        """A part of the batch."""
        layers = {layer: missing[rows] for layer, missing in self.layers.items()}
        partners = None if self.partners is None else self.partners.pick(range(len(self.named))[rows])
        return replace(
            self,
            items=self.items[rows],
            named=self.named[rows],
            layers=layers,
            digests=self.digests[rows],
            partners=partners,
        )

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
        partners: the views that they are mixed with; None under a law without pairs.
        further: the same views at further sizes, by size.
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
    partners: Partners | None = None
    lacking: Lacking | None = None

    @property
    def named(self) -> list[tuple[str, int]]:
        """(sample key, view index) of every view."""
        return list(zip(self.keys, self.items[:, 2].tolist(), strict=True))

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

    def partner_labels(self) -> tuple[Tensor, Tensor]:
        """int64 [B]: labels of the partners; float32 [B]: shares of the own images. Unmixed: the own label, and 1."""
        if self.partners is None:
            return self.labels, torch.ones(len(self.labels))
        return torch.from_numpy(self.partners.labels), torch.from_numpy(self.partners.shares)

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
            partners=None if self.partners is None else self.partners.pick(rows.tolist()),
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
        seed: the seed of the views' identities; None: batches have no view keys.
        lost: by shard, keys of images that a cache lists as unreadable: no view is mixed with them.
        further: the same law at further sizes.
    """

    def __init__(
        self,
        shards: tuple[Shard, ...],
        law: ViewLaw,
        seed: int | None = None,
        lost: Mapping[str, Collection[str]] | None = None,
        further: Sequence[ViewLaw] = (),
    ) -> None:
        self.shards, self.law, self.seed, self.lost, self.further = shards, law, seed, lost or {}, tuple(further)

    def batch(self, items: Items) -> ViewBatch:
        """The views of `items`, int64 [B, 3 or more]: shard, sample, view index."""
        batch = render_items(self.shards, items[:, :3], self.law, self.seed, self.further)
        laws = (self.law, *self.further)
        return batch if self.law.pairs is None else _mix_pairs(self.shards, batch, laws, self.lost)


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


# ---------------------------------------------------------------- pairs


@lru_cache(maxsize=1024)
def pairs_of(shard: Shard, seed: int, view: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of every image of a shard: the partner in a view, and the view's identity. int64 [n] each."""
    identities = np.array([view_key(seed, key, view) for key in shard.members().keys], np.int64)
    return partners_of(identities), identities


def partners_of_shards(shards: Sequence[Shard], seed: int) -> PartnersOf:
    """The pairs of views among all images of shards, readable or not, for an order that depends on the source alone."""
    return lambda shard, view: pairs_of(shards[shard], seed, view)[0]


def _mix_pairs(
    shards: tuple[Shard, ...], batch: ViewBatch, laws: Sequence[ViewLaw], lost: Mapping[str, Collection[str]]
) -> ViewBatch:
    """The batch with its views mixed. Partners that are not in it are rendered for it, each image decoded once.

    Args:
        shards: the shards of its items.
        batch: the views at the size of each law, which it overwrites.
        laws: that of `pixels`, then those of `further`. A pair has one draw and the same kind of mix at all sizes.
        lost: by shard, keys of images that no view is mixed with.
    """
    pairs = laws[0].pairs
    assert pairs is not None
    items, sizes = list(map(tuple, batch.items.tolist())), [batch.pixels.numpy()]
    sizes += [batch.further[law.size].numpy() for law in laws[1:]]
    rows = {item: row for row, item in enumerate(items)}
    keys: list[str | None] = [None] * len(items)
    mixes: list[Mix | None] = [None] * len(items)
    labels, view_keys = batch.labels.numpy().copy(), batch.view_keys.clone()
    unread: dict[str, str] = {}

    def note(row: int, partner: int, mix: Mix) -> None:
        unit, sample, view = items[row]
        members, (_, identities) = shards[unit].members(), pairs_of(shards[unit], pairs.seed, view)
        keys[row], mixes[row], labels[row] = members.keys[partner], mix, members.labels[partner]
        if len(view_keys):
            view_keys[row] = mixed_key(int(identities[sample]), int(identities[partner]))

    apart: dict[tuple[int, int], list[tuple[int, int, list[Mix]]]] = {}
    for row, (unit, sample, view) in enumerate(items):
        places, identities = pairs_of(shards[unit], pairs.seed, view)
        partner = int(places[sample])
        if partner == sample or shards[unit].members().keys[partner] in lost.get(shards[unit].name, ()):
            continue
        both = int(identities[sample]), int(identities[partner])
        of_sizes = [mix for law in laws if law.pairs is not None and (mix := law.pairs.mix(*both)) is not None]
        if not of_sizes:
            continue
        other = rows.get((unit, partner, view))
        if other is None or rows[items[row]] != row:
            apart.setdefault((unit, partner), []).append((row, view, of_sizes))
        elif row < other:
            for pixels, mix in zip(sizes, of_sizes, strict=True):
                one, two = mixed(pixels[row], pixels[other], mix), mixed(pixels[other], pixels[row], mix)
                pixels[row], pixels[other] = one, two
            note(row, partner, of_sizes[0])
            note(other, sample, of_sizes[0])
    for (unit, partner), several in apart.items():
        key = shards[unit].members().keys[partner]
        try:
            cut = _cut(shards[unit].read(partner), key, [view for _, view, _ in several], laws)
        except SourceError as error:
            unread[key] = f"{error.what}: {error.got}"
            continue
        for (row, view, of_sizes), (_, crops) in zip(several, cut, strict=True):
            for law, pixels, mix, crop in zip(laws, sizes, of_sizes, crops, strict=True):
                other_pixels = apply(np.ascontiguousarray(crop.numpy()), law.steps(key, view))
                pixels[row] = mixed(pixels[row], other_pixels, mix)
            note(row, partner, of_sizes[0])
    return replace(batch, view_keys=view_keys, partners=Partners(keys, mixes, labels, unread))
