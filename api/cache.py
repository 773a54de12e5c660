"""An opened cache: what it holds, its loader, heads and losses; and writing one with a teacher of one's own.

Shapes: B view, S pixel, T token, C width.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from timm.models import VisionTransformer
from torch import Tensor, nn

from tinymim.api.loader import Batch, Loader
from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.errors import RecipeError, UserError
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.sections.base import Section
from tinymim.configs.sections.loader import LoaderConfig, OrderConfig, VerifyConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.taps import Shapes
from tinymim.models.custom import WithTaps, own_shapes
from tinymim.models.student import shapes_of
from tinymim.pipeline.joined import CachedSource, join, partners_of_source
from tinymim.pipeline.masks import visible_patches
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.replay import ReplayedViews
from tinymim.pipeline.shards import open_shards
from tinymim.stages import cache_teacher
from tinymim.stages.cache.info import describe
from tinymim.stages.cache.opened import opened_kind
from tinymim.storage.catalog import resolve
from tinymim.storage.layout import VIEWS, size_of
from tinymim.storage.reader import CacheReader, Coverage, views_from_zero
from tinymim.targets.contract import Answers, Labels, Target, TargetHead, TargetKind

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


class TeacherCache:
    """A cache opened for reading; `open_cache` makes it. Units that are committed later are not seen."""

    def __init__(self, reader: CacheReader, targets: Mapping[str, TargetsConfig]) -> None:
        self._reader, self._targets = reader, targets
        self._kinds: dict[tuple[str, torch.device], TargetKind] = {}

    @classmethod
    def write(
        cls,
        place: str | Path,
        model: nn.Module,
        source: str | Path,
        *,
        codec: Mapping[str, Any] | None = None,
        block: int = 1,
        taps: Callable[[nn.Module, Tensor, Sequence[str]], Mapping[str, Any]] | None = None,
        shapes: Shapes | None = None,
        views: Mapping[str, Any] | None = None,
        num_views: int = 2,
        layer: str | None = None,
        name: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        batch_size: int = 64,
        workers: int = 2,
        device: str = "auto",
        run_folder: str | Path | None = None,
    ) -> "TeacherCache":
        """Write a layer of a cache with a teacher of your own, and open the cache.

        It works as `tinymim cache-teacher`: a stopped call resumes, several processes share the work, and a teacher
        with other weights is refused. The model itself is not changed.

        Args:
            place: the folder or URL of the cache, new or with the same views.
            model: a timm ViT, a module with `forward_taps` and `shapes`, or any module with `taps`.
            source: the folder or URL of the shards.
            codec: the fields of a recipe's `codec` section, such as `{"kind": "features"}`. Default: a sketch.
            block: the block that the codec reads; it is N in names of taps such as "tokens@N".
            taps: a function of the model, normalised images [B, 3, S, S] and names of taps, which returns tensors by
                name, as `forward_taps` does. Needs `shapes`. Its code is not part of the teacher's identity.
            shapes: the sizes of the tensors that `taps` returns.
            views: the fields of a recipe's `views` section, such as `{"size": 224}`.
            num_views: views per image.
            layer: the name of the layer. Default: made of name, block and codec.
            name: a label of the teacher. Default: the name of its class.
            mean, std: of the pixels (0..1) that the model expects. Default: those of its `pretrained_cfg`.
            precision: precision of the forward pass.
            batch_size: images per batch.
            workers: loader processes; 0: load in this process. They import the script that runs, which therefore needs
                `if __name__ == "__main__":` around what it does.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            run_folder: the folder of logs and metrics. Default: the cache's folder with `-run` at its end.

        Raises:
            RecipeError: fields are wrong, or the model does not give what the codec reads.
            CacheMismatch: the cache was made from other views, shards or weights.
            UserError: anything else that `tinymim cache-teacher` refuses.
        """
        if (taps is None) != (shapes is None):
            raise UserError("taps and shapes belong together", got=f"shapes {shapes}", hint="give both, or neither")
        kind = type(model)
        label = name or kind.__name__
        own = {
            "name": label,
            "factory": f"{kind.__module__}:{re.sub(r'[^A-Za-z0-9_.]', '_', kind.__qualname__)}",
            "img_size": (views or {}).get("size", 224),
            "block": block,
            "precision": precision,
            "mean": mean,
            "std": std,
        }
        if run_folder is None and isinstance(place, str) and "://" in place:
            raise UserError("a cache at a URL needs a local folder for its logs", got=place, hint="give run_folder")
        fields = {
            "stage": "cache-teacher",
            "source": {"shards": source},
            "views": dict(views or {}),
            "num_views": num_views,
            "teacher": own,
            "codec": dict(codec or {}),
            "cache": place,
            "layer": layer,
            "batch_size": batch_size,
            "loader": {"workers": workers},
            "run": {"folder": run_folder or f"{place}-run", "device": device},
        }
        teacher = copy.deepcopy(model)  # it is cut, frozen and cast
        if taps is not None and shapes is not None:
            teacher = WithTaps(teacher, taps, shapes)
        cache_teacher.run(_section(CacheTeacherRecipe, "the recipe", fields), teacher)
        return open_cache(place)

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
            workers: loader processes; 0: load in this process. They import the script that runs, which therefore needs
                `if __name__ == "__main__":` around what it does.
            prefetch: batches kept ready per worker.
            verify_first: samples at the start whose pixels are compared with the stored digests.
            verify_every: then one sample in N is compared; 0: none.
            on_missing: `refuse` shards and images without a record, or `skip` them. A teacher in the loop, fresh views
                and written units are `tinymim train-student`'s alone (`on_missing: teacher`).
            pin_memory: pin batches for copies to a GPU.

        Raises:
            CacheMismatch: the shards are not those that the teacher saw.
            RecipeError: the numbers do not fit one another or the cache.
            UserError: the source or a layer does not exist, or the cache lacks shards.
        """
        if on_missing not in ("refuse", "skip"):
            raise RecipeError(
                "on_missing is not one of the loader's, which has no teacher that computes what the cache lacks",
                got=on_missing,
                expected="refuse or skip",
                hint="fill the cache with `tinymim cache-teacher`, or train with `tinymim train-student` and "
                "on_missing: teacher; write_back: true keeps what it computes",
            )
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
        partners = partners_of_source(joined, self._reader, self._reader.manifest)
        order = SampleOrder(joined.counts, order_config, batch_size, joined.num_views, rank, world_size, partners)
        if not order.steps_per_epoch:
            raise RecipeError("batch_size is more than the images", got=f"{batch_size} of {sum(joined.counts)} images")
        arrays = {
            name: [spec.name for spec in self._kind(name).specs(self._reader.layers[name].shapes)]
            for name in joined.layers
        }
        reader, lanes = self._reader, len(order.lanes)
        views = ReplayedViews(reader, reader.manifest, joined, arrays, verify, lanes, order.slices_per_lane)
        return Loader(views, order, config, pin_memory, self._decode)

    def head(self, layer: str, student: nn.Module | Shapes) -> TargetHead:
        """A new head, which maps a student's final tokens [B, T, C] to answers. Train it, and drop it afterwards.

        Its weights come from torch's global generator; call `torch.manual_seed` before it.

        Args:
            layer: the name of a layer.
            student: timm's VisionTransformer, a module with `shapes`, or the sizes of another model.

        Raises:
            CacheMismatch: the student's tokens are not the teacher's.
            RecipeError: the kind of target cannot compare a student of this width.
            UserError: there is no such layer, or `student` is none of the three.
        """
        teacher = self._reader.layer(layer).shapes
        if isinstance(student, VisionTransformer):
            own = shapes_of(student)
            own = replace(own, tokens=own.prefix_tokens + teacher.visible) if teacher.masked else own
        elif isinstance(student, Shapes):
            own = student
        elif (stated := own_shapes(student)) is not None:
            own = stated
        else:
            raise UserError(
                "the sizes of this student are unknown",
                got=type(student).__name__,
                expected="timm's VisionTransformer, or tinymim.Shapes",
                hint="give tinymim.Shapes(heads, head_dim, tokens, prefix_tokens, grid) of its final tokens",
            )
        return self._kind(layer).head(own, teacher)

    def visible(self, layer: str, batch: Batch) -> Tensor | None:
        """The patches that a masked layer's teacher saw: int64 [B, M], raster-order numbers, ascending.

        A student runs on these patches alone, so that its tokens are [B, P + M, C], with P its prefix tokens.

        Args:
            layer: the name of a layer.
            batch: a batch of the loader.

        Returns:
            None where the teacher saw whole views.
        """
        held = self._reader.layer(layer)
        named = zip(batch.keys, batch.views.tolist(), strict=True)
        return visible_patches(held.mask, named, held.shapes.grid, batch.pixels.device)

    def losses(self, answers: Mapping[str, Answers], batch: Batch) -> dict[str, Tensor]:
        """The losses as scalars, means over views and parts. Their names are `layer/loss`.

        With `label_weight` in the layer's `targets`, the batch's labels give a loss, too.

        Args:
            answers: by layer, the output of its head for this batch.
            batch: the batch, on the device of the answers.

        Raises:
            UserError: the batch was loaded without one of these layers, or lacks labels that a loss needs.
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
            classes, labels = kind.label_classes, batch.labels
            both = torch.cat([labels, batch.partner_labels])
            if classes and not bool(((both >= 0) & (both < classes)).all()):
                raise UserError(
                    f"an image of the batch has no label of the {classes} classes of layer {layer}",
                    got=f"labels {int(both.min())} to {int(both.max())}, where -1 is none",
                    hint="leave label_weight out of the layer's targets, or use labelled shards",
                )
            losses = kind.losses(own, batch.targets[layer]) | kind.label_losses(
                own, Labels(labels, batch.partner_labels, batch.shares)
            )
            for name, loss in losses.items():
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
