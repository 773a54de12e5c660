"""Frozen features of a labelled set, and the encoder that computes them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tinymim.configs.errors import SourceError
from tinymim.configs.schema.evaluate import EvaluateRecipe
from tinymim.configs.sections.loader import LoaderConfig
from tinymim.models.files import RANDOM
from tinymim.models.probes import pooled_features
from tinymim.models.student import build_student
from tinymim.models.timm_folder import Rgb
from tinymim.models.weights import build_with_weights, stated
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import view_batches
from tinymim.pipeline.shards import Shard
from tinymim.pipeline.views import ViewLaw
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.progress import Meter, logger


class EncodedSet(NamedTuple):
    """Frozen features of a labelled set, in shard order, on the CPU."""

    features: Tensor  # float32 [N, C]
    labels: Tensor  # int64 [N]
    unreadable: list[tuple[str, str]]  # (key, reason); these images have no row


def load_encoder(recipe: EvaluateRecipe) -> tuple[nn.Module, Rgb, Rgb]:
    """The model of a recipe with its weights, and the mean and deviation (0..1) that normalise its pixels.

    "random" weights are the initial weights of a student or a masked pre-training with `run.seed`; plain ViTs only.

    Raises:
        CheckpointError: the weights do not exist, do not fit, cannot be fetched, or do not state mean and std.
        RecipeError: timm cannot build the model.
    """
    model: nn.Module
    if recipe.weights == RANDOM:
        torch.manual_seed(recipe.run.seed)
        model = build_student(recipe.model)
    else:
        model = build_with_weights(recipe.model, recipe.weights)
    pixels = stated(model, recipe.model, recipe.weights, recipe.mean, recipe.std)
    return model, pixels.mean, pixels.std


@dataclass(frozen=True)
class Encoder:
    """A frozen model, and its input.

    Args:
        model: a ViT; moved to `device`, in eval mode.
        normalise: maps uint8 pixels to the model's input; moved to `device`.
        law: the view law, usually `CentreView`.
        block, pool: see `pooled_features`.
        batch_size: images per forward pass.
        loader: settings of the processes that read and decode the images.
        device: the device of the model and of the evaluators.
    """

    model: nn.Module
    normalise: nn.Module
    law: ViewLaw
    block: int | None
    pool: str
    batch_size: int
    loader: LoaderConfig
    device: torch.device

    def __post_init__(self) -> None:
        self.model.to(self.device).eval()
        self.normalise.to(self.device)

    @torch.no_grad()
    def encode(self, shards: Sequence[Shard], stop: StopFlag, label: str = "encode") -> EncodedSet:
        """One feature vector per image of `shards`; `label` names the set in progress lines.

        Raises:
            SourceError: no image can be read.
            RecipeError: the model has no such block or no class token.
            Interrupted: `stop` was requested.
        """
        found: list[Tensor] = []
        labels: list[Tensor] = []
        unreadable: list[tuple[str, str]] = []
        for batch, images in centre_crops(shards, self.law, self.normalise, self, self.device, stop, label):
            unreadable += batch.unreadable
            if images is not None:
                found.append(pooled_features(self.model, images, self.block, self.pool).float().cpu())
                labels.append(batch.labels)
        if not found:
            raise SourceError(f"{label}: no image can be read", got=f"{len(unreadable)} unreadable images")
        for key, reason in unreadable[:10]:
            logger.info(f"{label}: unreadable: {key}: {reason}")
        return EncodedSet(torch.cat(found), torch.cat(labels), unreadable)


class Reading(Protocol):
    """Settings of reading: a recipe of `evaluate`, or an encoder."""

    @property
    def batch_size(self) -> int: ...

    @property
    def loader(self) -> LoaderConfig: ...


def centre_crops(
    shards: Sequence[Shard],
    law: ViewLaw,
    normalise: nn.Module,
    reading: Reading,
    device: torch.device,
    stop: StopFlag,
    label: str,
) -> Iterator[tuple[ViewBatch, Tensor | None]]:
    """The images of `shards` in batches, each with its normalised pixels on the device; None: none can be read.

    Raises:
        Interrupted: `stop` was requested.
    """
    counts = [shard.num_samples for shard in shards]
    plan = (item for unit, count in enumerate(counts) for item in view_batches(unit, count, (0,), reading.batch_size))
    stream = batches(ImageViews(tuple(shards), law), plan, reading.loader, pin_memory=device.type == "cuda")
    with Meter(label, sum(counts), "images") as meter:
        for batch in stream:
            if stop.requested:
                raise Interrupted("no evaluation written; the same command starts it from scratch")
            yield batch, normalise(batch.pixels.to(device, non_blocking=True)) if batch.keys else None
            meter.advance(len(batch.keys) + len(batch.unreadable))
