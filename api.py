"""tinymim as a library: the targets of a cache in your own training loop, with the teacher not loaded.

    import tinymim

    cache = tinymim.open_cache("caches/mine")
    loader = cache.loader("shards/mine", batch_size=64)
    head = cache.head("mae", student)
    for batch in loader:
        answers = {"mae": head(student.forward_features(batch.images()))}
        loss = sum(cache.losses(answers, batch).values())

`tinymim cache info` lists the names of the layers, here `mae`. `tinymim train-student` is made of the same parts. Code
is never loaded from a cache.

Shapes: B view, S pixel, T token, C width.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from timm.models import VisionTransformer
from torch import Tensor
from torch.utils.data import IterableDataset

from tinymim.configs.codecs import TargetsConfig
from tinymim.configs.errors import RecipeError, TinymimError, UserError
from tinymim.configs.sections import LoaderConfig, OrderConfig, Section, SourceConfig, VerifyConfig
from tinymim.configs.taps import Shapes
from tinymim.models.student import shapes_of
from tinymim.models.vit import Normalise
from tinymim.pipeline.dataset import ViewBatch
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.records import of_layer
from tinymim.pipeline.replay import CachedSource, ReplayedViews, join
from tinymim.pipeline.shards import open_shards
from tinymim.stages.cache.info import describe
from tinymim.stages.cache.opened import opened_kind
from tinymim.storage.catalog import resolve
from tinymim.storage.layout import VIEWS, size_of
from tinymim.storage.reader import CacheReader, Coverage, views_from_zero
from tinymim.targets.contract import Answers, Target, TargetHead, TargetKind

__all__ = ["Batch", "Loader", "Shapes", "TeacherCache", "TinymimError", "UserError", "open_cache"]

_S = TypeVar("_S", bound=Section)


def open_cache(place: str | Path, targets: Mapping[str, Mapping[str, Any]] | None = None) -> "TeacherCache":
    """Open a cache for reading.

    Args:
        place: the cache's folder or URL, or a root that holds exactly one cache.
        targets: by layer, the fields of a recipe's `targets` section, such as `{"mae": {"rows": 8}}`.
            Default: everything that a layer holds.

    Raises:
        UserError: there is no cache or layer, a field of `targets` is wrong, or the cache is damaged.
    """
    reader = CacheReader(resolve(place))
    chosen = {
        reader.layer(layer).name: _section(TargetsConfig, f"targets of layer {layer}", fields)
        for layer, fields in (targets or {}).items()
    }
    return TeacherCache(reader, chosen)


@dataclass(frozen=True, eq=False)
class Batch:
    """B views with the cache's records of them.

    Attributes:
        pixels: uint8 [B, 3, S, S], exactly the pixels that the teacher saw.
        keys: the B sample keys.
        views: int64 [B], the view indices.
        view_keys: int64 [B], the identities that seed every draw about a view.
        labels: int64 [B], -1 for an image without a label.
        records: by layer and name, the stored arrays, first axis B.
    """

    pixels: Tensor
    keys: list[str]
    views: Tensor
    view_keys: Tensor
    labels: Tensor
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
        return Batch(batch.pixels, batch.keys, views, batch.view_keys, batch.labels, records, self._decode)


class TeacherCache:
    """A cache opened for reading; `open_cache` makes it. Units that are committed later are not seen."""

    def __init__(self, reader: CacheReader, targets: Mapping[str, TargetsConfig]) -> None:
        self._reader, self._targets = reader, targets
        self._kinds: dict[tuple[str, torch.device], TargetKind] = {}

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the target layers."""
        return tuple(self._reader.layers)

    @property
    def teachers(self) -> dict[str, dict[str, Any]]:
        """By layer, the teacher: its name, architecture, shapes, weights' digest and origin, licence, precision."""
        return {name: dict(layer.teacher) for name, layer in self._reader.layers.items()}

    @property
    def coverage(self) -> dict[str, Coverage]:
        """By layer, the share of the source that the cache holds: shards, views, images and records."""
        return {name: self._reader.coverage(name) for name in self.layers}

    @property
    def fidelity(self) -> dict[str, dict[str, float]]:
        """By layer, how close the records are to dense targets, as `tinymim cache info` prints it; {}: not audited."""
        described = describe(self._reader.place)["layers"]
        return {layer["name"]: layer["fidelity"] for layer in described if layer["name"] in self.layers}

    @property
    def view_size(self) -> int:
        """Width and height S of the views in pixels."""
        return int(self._reader.manifest.views["size"])

    @property
    def view_sizes(self) -> tuple[int, ...]:
        """All sizes at which teachers saw the views, `view_size` first."""
        return tuple(size_of(name, self._reader.manifest) for name in self._reader.view_layers)

    def loader(
        self,
        source: str | Path,
        *,
        batch_size: int,
        layers: Sequence[str] | None = None,
        num_views: int | None = None,
        view_size: int | None = None,
        views_per_decode: int = 1,
        views_per_epoch: int | Literal["all"] = 1,
        shuffle_units: int = 4,
        lanes: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
        prefetch: int = 4,
        verify_first: int = 4096,
        verify_every: int = 16,
        on_missing: Literal["refuse", "skip"] = "refuse",
        pin_memory: bool = False,
    ) -> Loader:
        """A loader of this cache's views and targets.

        Args:
            source: the folder or URL of the shards that the cache was made from.
            batch_size: samples of a step over all ranks.
            layers: names of the layers to read; None: all.
            num_views: views per image; None: as many as all shards and layers have.
            view_size: one of `view_sizes`; None: `self.view_size`.
            views_per_decode: views made from one decode; consecutive batches then hold the same images.
            views_per_epoch: views of every image per epoch, a multiple of `views_per_decode`, or `all`.
            shuffle_units: shards whose samples are mixed, per lane.
            lanes: parts of an epoch, a multiple of `world_size`; None: `world_size`. With the same number of lanes,
                batches over all ranks are the same for every number of ranks.
            seed: seed of the order.
            rank, world_size: the part of every batch that this process gets.
            workers: loader processes; 0: load in this process.
            prefetch: batches kept ready per worker.
            verify_first: samples at the start whose pixels are compared with the stored digests.
            verify_every: then one sample in N is compared; 0: none.
            on_missing: `refuse` shards and images without a record, or `skip` them.
            pin_memory: pin batches for copies to a GPU.

        Raises:
            CacheMismatch: the shards are not those that the teacher saw.
            RecipeError: the numbers do not fit one another or the cache.
            UserError: the source or a layer does not exist, or the cache lacks shards.
        """
        if not 0 <= rank < world_size:
            raise RecipeError("rank is not below world_size", got=f"rank {rank}, world_size {world_size}")
        if view_size not in (None, *self.view_sizes):
            raise RecipeError("view_size is not a size of the cache", got=view_size, expected=self.view_sizes)
        wanted: Iterable[str | None] = dict.fromkeys(layers or self.layers) or [None]  # None: the reader's error
        names = [self._reader.layer(name).name for name in wanted]
        order_config = _section(
            OrderConfig,
            "the loader's order",
            {
                "seed": seed,
                "shuffle_units": shuffle_units,
                "views_per_decode": views_per_decode,
                "views_per_epoch": views_per_epoch,
                "lanes": world_size if lanes is None else lanes,
            },
        )
        config = _section(LoaderConfig, "the loader", {"workers": workers, "prefetch": prefetch})
        verify = _section(VerifyConfig, "the comparison", {"first": verify_first, "every": verify_every})
        joined = join(open_shards(SourceConfig(shards=source)), self._reader, names, num_views, on_missing, view_size)
        order = SampleOrder(joined.counts, order_config, batch_size, joined.num_views, rank, world_size)
        if not order.steps_per_epoch:
            raise RecipeError("batch_size is more than the images", got=f"{batch_size} of {sum(joined.counts)} images")
        arrays = {
            name: [spec.name for spec in self._kind(name).specs(self._reader.layers[name].shapes)]
            for name in joined.layers
        }
        reader, lanes = self._reader, len(order.lanes)
        views = ReplayedViews(reader, reader.manifest, joined, arrays, verify, lanes, order.slices_per_lane)
        return Loader(views, order, config, pin_memory, self._decode)

    def head(self, layer: str, student: VisionTransformer | Shapes) -> TargetHead:
        """A new head, which maps a student's final tokens [B, T, C] to answers. Train it, and drop it afterwards.

        Its weights come from torch's global generator; call `torch.manual_seed` before it.

        Args:
            layer: the name of a layer.
            student: timm's VisionTransformer, or the sizes of another model.

        Raises:
            CacheMismatch: the student's tokens are not the teacher's.
            RecipeError: the kind of target cannot compare a student of this width.
            UserError: there is no such layer, or `student` is neither of the two.
        """
        teacher = self._reader.layer(layer).shapes
        if isinstance(student, VisionTransformer):
            own = shapes_of(student)
        elif isinstance(student, Shapes):
            own = student
        else:
            raise UserError(
                "the sizes of this student are unknown",
                got=type(student).__name__,
                expected="timm's VisionTransformer, or tinymim.Shapes",
                hint="give tinymim.Shapes(heads, head_dim, tokens, prefix_tokens, grid) of its final tokens",
            )
        return self._kind(layer).head(own, teacher)

    def losses(self, answers: Mapping[str, Answers], batch: Batch) -> dict[str, Tensor]:
        """The losses as scalars, means over views and parts. Their names are `layer/loss`.

        Args:
            answers: by layer, the output of its head for this batch.
            batch: the batch, on the device of the answers.

        Raises:
            UserError: the batch was loaded without one of these layers.
        """
        if absent := sorted(answers.keys() - batch.records.keys()):
            raise UserError(
                f"the batch has no targets of layer {absent[0]}",
                got=", ".join(batch.records),
                hint=f"name it in `layers` of the loader: {', '.join(self.layers)}",
            )
        found = {}
        for layer, own in answers.items():
            kind = self._kind(layer, batch.view_keys.device)
            for name, loss in kind.losses(own, batch.targets[layer]).items():
                found[f"{layer}/{kind.measure}_{name}"] = loss.mean()
        return found

    def replay(self, source: str | Path, key: str, view: int = 0) -> Tensor:
        """The picture of one view of one image, uint8 [3, S, S], compared with the stored digest.

        Args:
            source: the folder or URL of the shards that the cache was made from.
            key: the sample key of the image.
            view: the view index.

        Raises:
            UserError: the cache holds no such view.
            ViewMismatch: the pixels differ from those the teacher saw.
            SourceError: the image cannot be read.
        """
        units = self._reader.by_shard()
        for shard in open_shards(SourceConfig(shards=source)).shards:
            if key not in shard.members().keys or shard.name not in units:
                continue
            held, keys = views_from_zero(units[shard.name]), self._reader.keys(shard.name)
            if key not in keys or not 0 <= view < held:
                break
            one = CachedSource((shard,), held, {VIEWS: {shard.name: units[shard.name]}})
            views = ReplayedViews(self._reader, self._reader.manifest, one, {}, VerifyConfig(first=1, every=0))
            return views.batch(np.array([[0, keys.index(key), view, 0]])).pixels[0]
        raise UserError(
            f"the cache {self._reader.place} holds no view {view} of an image '{key}' of this source",
            got=f"shards {source}",
            hint="a batch of the loader has `keys` and `views` that exist",
        )

    def _kind(self, layer: str, device: torch.device | None = None) -> TargetKind:
        at = (layer, device or torch.device("cpu"))
        if at not in self._kinds:
            chosen = self._targets.get(layer, TargetsConfig())
            self._kinds[at] = opened_kind(self._reader, self._reader.layer(layer), chosen, at[1])
        return self._kinds[at]

    def _decode(self, layer: str, batch: Batch) -> Target:
        kind = self._kind(layer, batch.view_keys.device)
        return kind.decode(batch.records[layer], batch.view_keys, self._reader.layers[layer].shapes)


def _section(kind: type[_S], what: str, values: Mapping[str, Any]) -> _S:
    """A checked section. Raises RecipeError."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise RecipeError(f"{what}: {'; '.join(problems)}", got=dict(values)) from error
