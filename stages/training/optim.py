"""Optimisation of all training stages: the optimiser, the schedule, parts of a batch, randomness by step."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from tinymim.configs.codecs.targets import FIRST_TARGETS
from tinymim.configs.errors import UserError
from tinymim.configs.schema.recipes import TrainingRecipe
from tinymim.configs.schema.train import LayerConfig, TrainStudentRecipe
from tinymim.configs.sections.optim import LayerwiseOptimConfig, OptimConfig
from tinymim.models import backbone
from tinymim.pipeline.order import SampleOrder
from tinymim.stages.training.terms import weights_of
from tinymim.storage.atomic import canonical_json, digest_hex
from tinymim.storage.identity import Identity


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warm-up from 0, then a cosine to `min_lr` at `total_steps`."""

    peak_lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int

    def lr(self, step: int) -> float:
        """The rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def require_batch(order: SampleOrder, accumulate: int) -> None:
    """Raises UserError where the source holds less than one batch; names a size that fits."""
    if order.steps_per_epoch:
        return
    images, unit = sum(order.counts), math.lcm(order.order.lanes, accumulate)
    fits = unit
    while fits * 2 <= images // 4:  # at least four steps an epoch
        fits *= 2
    raise UserError(
        "the source holds less than one batch",
        got=f"{images:,} images, optim.batch_size {order.batch_size:,}",
        expected=f"at least {order.batch_size:,} images, or smaller batches",
        hint=f"--set optim.batch_size={fits} fits this source"
        if fits <= images
        else "add images, or lower order.lanes",
    )


def make_schedule(config: OptimConfig, steps_per_epoch: int) -> Schedule:
    """Resolve epochs to steps and scale the base rate: lr = base_lr x batch / 256."""
    total = config.steps if config.steps is not None else (config.epochs or 0) * steps_per_epoch
    peak_lr = config.base_lr * config.batch_size / 256
    return Schedule(peak_lr, config.min_lr, round(config.warmup * total), total)


def make_optimiser(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW, or SGD; no weight decay on biases, norms and other 1-D parameters, nor on tokens of shape [1, 1, C].

    Nor is there any on what timm spares in its `no_weight_decay`, such as tables of relative positions. With
    `layer_decay` the groups are timm's, by the model's layers (TinyViT and Swin: `backbone.layers_below_head`). Each
    has an "lr_scale", a factor on the schedule's rate.
    """
    spared: set[str] = getattr(model, "no_weight_decay", set)()
    groups: list[dict[str, Any]]
    if isinstance(config, LayerwiseOptimConfig):
        if (below := backbone.layers_below_head(model)) is not None:
            groups = _groups_by_layer(model, config, below, spared)
        else:
            groups = param_groups_layer_decay(model, config.weight_decay, spared, layer_decay=config.layer_decay)
        if config.name == "sgd":
            # A momentum of 0 has no Nesterov form; torch refuses the pair.
            return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=config.momentum > 0)
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in trained if p.squeeze().ndim <= 1 or name in spared]
    decayed = [p for name, p in trained if p.squeeze().ndim > 1 and name not in spared]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas)


def _groups_by_layer(
    model: nn.Module, config: LayerwiseOptimConfig, below: Mapping[str, int], spared: set[str]
) -> list[dict[str, Any]]:
    """Groups by layers below the head and weight decay, which 1-D parameters and the spared ones have none of."""
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name not in spared
            scale = {"lr_scale": config.layer_decay ** below[name], "weight_decay": config.weight_decay * decays}
            groups.setdefault((below[name], decays), {"params": [], **scale})["params"].append(parameter)
    return list(groups.values())


def optimiser_step(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    lr: float,
    clip_norm: float | None,
) -> None:
    """Update the weights at rate `lr`, times a group's "lr_scale", and free the gradients.

    `scaler` is inactive outside fp16.
    """
    for group in optimiser.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    if clip_norm is not None:
        scaler.unscale_(optimiser)  # so that the norm is that of the unscaled gradients
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    scaler.step(optimiser)
    scaler.update()
    optimiser.zero_grad(set_to_none=True)


class Part(NamedTuple):
    """A part of a rank's share of a batch, computed on its own to save memory.

    Attributes:
        rows: the part's samples in the share.
        share: the part's samples, divided by the samples that the share should have.
        first, last: whether it is the step's first or last part.
    """

    rows: slice
    share: float
    first: bool
    last: bool


def parts_of(samples: int, accumulate: int, present: int | None = None) -> list[Part]:
    """Cut a rank's share of a batch into parts.

    Args:
        samples: number of samples of the share.
        accumulate: number of parts, which divides `samples`.
        present: number of samples that could be read. Missing ones still count in the divisor of `Part.share`, so the
            weight of a sample does not depend on the number of ranks or parts.
    """
    size = samples // accumulate
    present = samples if present is None else present
    starts = range(0, max(present, 1), size)
    ends = [min(start + size, present) for start in starts]
    return [
        Part(slice(start, end), (end - start) / samples, start == 0, start == starts[-1])
        for start, end in zip(starts, ends, strict=True)
    ]


def make_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Loss scaling, active for fp16 only."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def seeded(device: torch.device, *identity: int) -> torch.Generator:
    """A generator seeded by a digest of integers (run seed, step), so that a resumed run draws the same numbers."""
    digest = hashlib.blake2b("/".join(map(str, identity)).encode(), digest_size=8, person=b"tinymim/step").digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def state_identity(recipe: TrainingRecipe, content: Sequence[str]) -> Identity:
    """Digest and fields of everything that a training state depends on, for a recipe of one model.

    These may change between stop and resume (I10): paths, workers, threads, device, accumulation, the frequency of
    logs, checks, audits and states. Data may move but not change, so `content` has its hashes.
    """
    free: dict[str, Any] = dict.fromkeys(
        ("loader", "checkpoint", "verify", "audit", "source", "cache", "students"), True
    )
    free |= {"workers": True, "cluster": True, "max_restarts": True, "optim": {"accumulate"}}
    free |= {"train": True, "val": True, "weights": True, "class_map": True}  # the model at the start is in `content`
    # The order of samples has an identity of its own, with the images and views in use, so a cache may grow. A layer's
    # content decides, not its name.
    free |= {"num_views": True, "on_missing": True, "layer": True, "layers": True, "targets": True}
    if isinstance(recipe, TrainStudentRecipe):  # new views are part of the order, and the view law of a layer's content
        free |= {"fresh": True, "write_back": True, "views": True}
    free["run"] = {"folder", "device", "threads", "log_every", "loggers"}
    free["recompute"] = True
    # Fields that are newer than states of before: where they are off, the identity is as without them.
    for part in ("student", "model"):
        if (model := getattr(recipe, part, None)) is not None and model.factory is None:
            free[part] = {"factory"} if model.args else {"factory", "args"}
    newer = (("ema", None), ("mask", None), ("mim", None), ("batch_norm", "train"))
    free |= {name: True for name, off in newer if getattr(recipe, name, off) == off}
    fields = recipe.model_dump(mode="json", exclude=free)
    if fields["optim"].get("name") == "adamw":
        del fields["optim"]["name"], fields["optim"]["momentum"]
    if (teacher := fields.pop("distil", None)) is not None:  # `content` has the digest of its weights
        fields["distil"] = {name: value for name, value in teacher.items() if name != "weights"}
    if isinstance(recipe, TrainStudentRecipe):
        fields |= _terms_identity([layer for _, layer in recipe.each_layer()])
    digest = digest_hex(canonical_json({"recipe": fields, "content": list(content)}))
    return Identity(digest, fields | {"data": {str(number): each for number, each in enumerate(content)}})


def _terms_identity(layers: Sequence[LayerConfig]) -> dict[str, Any]:
    """Choices of targets, and weights. A single layer of weight 1 has the identity of states without weights."""
    targets = [
        {
            name: value
            for name, value in layer.targets.model_dump(mode="json").items()
            if name != "keep_projector" and (value or name in FIRST_TARGETS)
        }
        for layer in layers
    ]
    weights = [list(weights_of(layer)) for layer in layers]
    blocks = [layer.student_block for layer in layers]
    own = {"student_blocks": blocks} if any(blocks) else {}
    return own | ({"targets": targets[0]} if weights == [[1.0, 1.0]] else {"targets": targets, "weights": weights})
