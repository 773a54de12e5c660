"""`tinymim evaluate`: k-NN and linear probe of a frozen encoder on labelled shards."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tinymim.configs.errors import SourceError
from tinymim.configs.load import recipe_digest
from tinymim.configs.schema import EvaluateRecipe
from tinymim.configs.sections import KnnConfig, LinearProbeConfig, LoaderConfig
from tinymim.models.checkpoints import load_weights, tensors_sha256
from tinymim.models.probes import knn_predict, linear_probe, pooled_features, top_k_accuracy
from tinymim.models.teacher import build_pretrained
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, Normalise, build_model, build_vit
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import view_batches
from tinymim.pipeline.shards import Shard, ShardSet, labels_of, open_shards
from tinymim.pipeline.views import CentreView, ViewLaw
from tinymim.stages.run.device import pick_device
from tinymim.stages.run.folder import EVALUATION_NAME, RunFolder
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.progress import Meter, say
from tinymim.storage.atomic import write_json_atomic

Rgb = tuple[float, float, float]


class Encoded(NamedTuple):
    """Frozen features of a labelled set, in shard order, on the CPU."""

    features: Tensor  # float32 [N, C]
    labels: Tensor  # int64 [N]
    unreadable: list[tuple[str, str]]  # (key, reason); these images have no row


def run(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Encode both sets, probe, and write `<run.folder>/evaluation.json`.

    Returns:
        what the file holds: accuracies (shares, not percent), counts, and the identity of weights and recipe.

    Raises:
        UserError: unlabelled or inconsistent sources; weights that do not exist, fit or download.
        Interrupted: stopped by a signal; no evaluation is written.
    """
    # ---- sources
    device = pick_device(recipe.run.device)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    train, val = open_shards(recipe.train), open_shards(recipe.val)
    num_classes = count_classes(train, val)

    # ---- frozen encoder
    model, mean, std = load_encoder(recipe)
    normalise = Normalise(mean, std)
    law = CentreView(recipe.model.img_size, recipe.resize_ratio)

    # ---- features, probes
    with RunFolder(recipe) as log, StopFlag() as stop:
        train_set, val_set = (
            encode(
                model,
                source.shards,
                law,
                normalise,
                block=recipe.block,
                pool=recipe.pool,
                batch_size=recipe.batch_size,
                loader=recipe.loader,
                device=device,
                stop=stop,
                label=f"evaluate {name}",
            )
            for name, source in (("train", train), ("val", val))
        )
        accuracy = probe(train_set, val_set, recipe.knn, recipe.linear, device)
        log.log(0, **accuracy)

    # ---- report
    result: dict[str, Any] = {
        **accuracy,
        "num_train_images": len(train_set.labels),
        "num_val_images": len(val_set.labels),
        "num_classes": num_classes,
        "num_features": train_set.features.shape[1],
        "unreadable": [
            {"set": name, "key": key, "reason": reason}
            for name, encoded in (("train", train_set), ("val", val_set))
            for key, reason in encoded.unreadable
        ],
        "model": recipe.model.model_dump(mode="json", exclude_none=True),
        "weights": recipe.weights,
        "weights_sha256": tensors_sha256(model.state_dict()),
        "block": recipe.block,
        "pool": recipe.pool,
        "mean": list(mean),
        "std": list(std),
        "recipe_digest": recipe_digest(recipe),
    }
    write_json_atomic(recipe.run.folder / EVALUATION_NAME, result)
    say(f"evaluate: wrote {recipe.run.folder / EVALUATION_NAME}")
    return result


def load_encoder(recipe: EvaluateRecipe) -> tuple[nn.Module, Rgb, Rgb]:
    """The model of a recipe with its weights, and the mean and deviation of the pixels it wants (0..1).

    "random" weights are those a student or a masked pre-training of `run.seed` starts from: plain ViTs only.

    Raises:
        CheckpointError: the weights do not exist, do not fit, or cannot be fetched.
        RecipeError: timm cannot build the model.
    """
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    model: nn.Module
    if recipe.weights == "random":
        torch.manual_seed(recipe.run.seed)
        model = build_vit(recipe.model)
    elif recipe.weights == "hub":
        model = build_pretrained(recipe.model)
        stated: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        mean, std = stated.get("mean", mean), stated.get("std", std)
    else:
        model = build_model(recipe.model)
        load_weights(model, recipe.weights)
    return model, recipe.mean or mean, recipe.std or std


@torch.no_grad()
def encode(
    model: nn.Module,
    shards: Sequence[Shard],
    law: ViewLaw,
    normalise: nn.Module,
    *,
    block: int | None,
    pool: str,
    batch_size: int,
    loader: LoaderConfig,
    device: torch.device,
    stop: StopFlag,
    label: str = "encode",
) -> Encoded:
    """One feature vector per image of `shards`; leaves the model on `device` in eval mode.

    Args:
        law: which view of an image is seen, `CentreView` as a rule.
        normalise: uint8 pixels -> the model's input.
        block: see `pooled_features`, as for `pool`.
        label: what the progress line says.

    Raises:
        SourceError: no image can be read.
        RecipeError: the model has no such block or no class token.
        Interrupted: `stop` was requested.
    """
    model.to(device).eval()
    normalise.to(device)
    counts = [shard.num_samples for shard in shards]
    plan = (items for unit, count in enumerate(counts) for items in view_batches(unit, count, (0,), batch_size))
    found: list[Tensor] = []
    labels: list[Tensor] = []
    unreadable: list[tuple[str, str]] = []
    with Meter(label, sum(counts), "images") as meter:
        for batch in batches(ImageViews(tuple(shards), law), plan, loader, pin_memory=device.type == "cuda"):
            if stop.requested:
                raise Interrupted("no evaluation written; the same command starts again")
            unreadable += batch.unreadable
            if batch.keys:
                images = normalise(batch.pixels.to(device, non_blocking=True))
                found.append(pooled_features(model, images, block, pool).float().cpu())
                labels.append(batch.labels)
            meter.advance(len(batch.keys) + len(batch.unreadable))
    if not found:
        raise SourceError(f"{label}: no image can be read", got=f"{len(unreadable)} unreadable images")
    for key, reason in unreadable[:10]:
        say(f"{label}: unreadable: {key}: {reason}")
    return Encoded(torch.cat(found), torch.cat(labels), unreadable)


def probe(
    train: Encoded, val: Encoded, knn: KnnConfig, linear: LinearProbeConfig, device: torch.device
) -> dict[str, float]:
    """Top-1 and top-5 accuracy, as shares, of k-NN and of a linear probe from `train` to `val`.

    Raises:
        SourceError: `val` holds classes that `train` lacks; their numbers are named.
    """
    problem = _problem(train, val, device)
    logits = linear_probe(*problem[:-1], linear.l2, linear.max_iter)
    return _nearest(problem, knn) | _accuracy("linear", logits, problem.val_y)


def knn_accuracy(train: Encoded, val: Encoded, knn: KnnConfig, device: torch.device) -> dict[str, float]:
    """Of `probe` the k-NN alone."""
    return _nearest(_problem(train, val, device), knn)


class _Problem(NamedTuple):
    """What a probe is fitted to and judged by, on one device; classes count from 0 without gaps."""

    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    num_classes: int
    val_y: Tensor


def _problem(train: Encoded, val: Encoded, device: torch.device) -> _Problem:
    _refuse_unseen(train.labels.numpy(), val.labels.numpy(), ())
    classes, train_y = train.labels.unique(return_inverse=True)  # class numbers need not be 0, 1, 2, ...
    train_x, val_x, train_y = train.features.to(device), val.features.to(device), train_y.to(device)
    return _Problem(train_x, train_y, val_x, len(classes), torch.searchsorted(classes, val.labels).to(device))


def _nearest(problem: _Problem, knn: KnnConfig) -> dict[str, float]:
    scores = knn_predict(*problem[:-1], knn.k, knn.temperature)
    return _accuracy("knn", scores, problem.val_y)


def _accuracy(name: str, scores: Tensor, labels: Tensor) -> dict[str, float]:
    return {f"{name}_top{k}": top_k_accuracy(scores, labels, k) for k in (1, 5)}


def count_classes(train: ShardSet, val: ShardSet) -> int:
    """How many classes `train` has; reads no image.

    Raises:
        SourceError: an unlabelled sample, a class of `val` that `train` lacks, or class lists that differ.
    """
    if train.classes and val.classes and train.classes != val.classes:
        longest = max(len(train.classes), len(val.classes))
        padded = [[*names, *["(none)"] * (longest - len(names))] for names in (train.classes, val.classes)]
        number, (ours, theirs) = next((i, pair) for i, pair in enumerate(zip(*padded, strict=True)) if len({*pair}) > 1)
        raise SourceError(
            f"train and val number their classes differently: class {number} is not the same",
            got=f"val: {theirs}",
            expected=f"train: {ours}",
            hint="make both sets with the same class folders",
        )
    labels = labels_of(train.shards)
    _refuse_unseen(labels, labels_of(val.shards), train.classes)
    return len(np.unique(labels))


def _refuse_unseen(train: npt.NDArray[np.int64], val: npt.NDArray[np.int64], names: Sequence[str]) -> None:
    unseen = np.setdiff1d(val, train).tolist()
    if unseen:
        named = [f"{label} ({names[label]})" if label < len(names) else str(label) for label in unseen[:10]]
        raise SourceError(
            "val holds classes that train lacks",
            got=", ".join(named) + (f" and {len(unseen) - 10} more" if len(unseen) > 10 else ""),
            expected=f"some of train's {len(np.unique(train))} classes",
        )
