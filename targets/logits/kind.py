"""Class probabilities as a target kind, with a term for labels.

Sources: the sparse loss of Wu et al., "TinyViT", ECCV 2022; temperature and label term of Hinton et al., "Distilling
the Knowledge in a Neural Network", 2015.

Shapes: B view, L class, K kept class.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from tinymim.configs.class_map import ABSENT, class_map_sha256, read_class_map
from tinymim.configs.codecs.probabilities import LogitsCodec
from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.errors import RecipeError
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets.contract import (
    Answers,
    ArraySpec,
    ChosenKind,
    Labels,
    Loss,
    PictureLine,
    Projection,
    Tapped,
    TargetHead,
    Views,
    WholeHead,
    Yardstick,
)
from tinymim.targets.counter import uniforms
from tinymim.targets.packing import Packing
from tinymim.targets.picture import class_line
from tinymim.targets.relations.sparsify import dequantise, quantise, systematic_draws, top_entries
from tinymim.targets.vectors import embedding

_ROUNDING, _TAIL = 288, 289  # streams
_LEAST_PROBABILITY = 2.0**-24  # the smallest positive fp16 number


@dataclass(frozen=True)
class LogitTarget(Views):
    """The class probabilities of B views: some with their weights, and one share for each other class."""

    index: Int64[Tensor, "B K"] | None  # classes, which may repeat where `share` is zero; None: all in order
    weight: Float[Tensor, "B K"]
    share: Float[Tensor, " B"]
    entropy: Float[Tensor, " B"]  # nats

    def dense(self, classes: int) -> Float[Tensor, "B L"]:
        """The probabilities written out, for audits."""
        if self.index is None:
            return self.weight
        rest = self.share[:, None].expand(-1, classes)
        return rest.scatter(1, self.index, 0.0).scatter_add(1, self.index, self.weight)


class LogitHead(WholeHead):
    """A classifier on the student's class token, or on the mean over its patches where it has no prefix tokens."""

    def __init__(self, student: Shapes, classes: int) -> None:
        super().__init__()
        self.prefix = student.prefix_tokens
        self.classifier = nn.Linear(student.width, classes)
        nn.init.xavier_uniform_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens: Float[Tensor, "B T C"]) -> Answers:
        """See `TargetHead`: float [B, L]."""
        return (self.classifier(embedding(tokens, self.prefix)[:, 0]),)


@dataclass(frozen=True)
class Logits(ChosenKind):
    """softmax(logits / temperature) over all classes, compared by KL x temperature^2 (Hinton et al., 2015).

    - `draws`: the `head_k` largest probabilities, and `tail_k` systematic draws from the rest. **Unbiased**, by the
      proof of `relations.sketch.Sketch`, of which this is one row. With fp16 values the head is exact to 1/2048.
    - `topk`: the `head_k` largest, and the remaining mass spread evenly over all other classes (Wu et al., "TinyViT",
      ECCV 2022). **Biased**: the teacher's order among the other classes is lost. Values that rounding brings above a
      mass of one are scaled down to it. The entropy is that of the decoded record, so the loss is the KL of the
      published method.
    - `dense`: every probability in fp16, for audits.

    `class_map` replaces the teacher's logits z by those of other classes, y_i = z[map_i], before the softmax. A class
    that the teacher lacks gets the logit 0, as TinyViT evaluates; or the mean of the others, which is the logit of the
    mean of their weights and biases, as TinyViT converts a classifier. The map is a constant of the cache.

    `targets.temperature` T changes the temperature t of a stored softmax: p^(t / T), scaled to a mass of one. For
    `topk` that is the softmax at T of the decoded record. Draws are no sample of it, so `draws` refuses.

    The values of the head are rounded at random to the grid of `relations.sparsify` (`uint8`), or stored in fp16. A
    class number takes the bits that the number of classes needs: its low 8 bits are a byte, the others are packed.
    """

    config: LogitsCodec
    measure: ClassVar[str] = "kl"

    @property
    def unbiased(self) -> bool:
        """See `TargetKind`."""
        return self.config.name != "topk"

    @property
    def meaning(self) -> tuple[object, ...]:
        """See `TargetKind`."""
        mapped = self.config.class_map
        return ("logits", self.config.classes, self.temperature, None if mapped is None else mapped.absent)

    @property
    def temperature(self) -> float:
        """T of the loss."""
        return self.targets.temperature or self.config.temperature

    @property
    def taps(self) -> tuple[Tap, ...]:
        """See `TargetKind`."""
        return (Tap("logits"),)

    def probabilities(self, tapped: Tapped, temperature: float) -> Float[Tensor, "B L"]:
        """The teacher's softmax, float64.

        Raises:
            RecipeError: the teacher has another number of classes.
        """
        return (self._logits(tapped) / temperature).softmax(-1)

    def _logits(self, tapped: Tapped) -> Float[Tensor, "B L"]:
        """The teacher's logits of the stored classes, float64."""
        [logits] = tapped[self.taps[0]]
        if self.config.class_map is not None:
            held = self.constants["class_map"].to(logits.device)
            absent = held == ABSENT
            found = logits.double()[:, held.clamp(min=0)].masked_fill(absent, 0.0)
            if self.config.class_map.absent == "mean":
                found = torch.where(absent, found.sum(-1, keepdim=True) / (~absent).sum(), found)
            return found
        if logits.shape[-1] != self.config.classes:
            raise RecipeError(
                "the teacher has another number of classes",
                got=f"codec.classes {self.config.classes}",
                expected=logits.shape[-1],
            )
        return logits.double()

    def hits(self, tapped: Tapped, labels: Int64[Tensor, " B"]) -> Float[Tensor, " B"]:
        """See `TargetKind`."""
        first = self._logits(tapped).argmax(-1)
        return torch.where(labels < 0, torch.nan, (first == labels).float())

    # ---- records

    def draws(self, shapes: Shapes) -> bool:
        """See `TargetKind`."""
        return self.config.name == "draws" or (self.config.name == "topk" and self.config.values == "uint8")

    def specs(self, shapes: Shapes) -> tuple[ArraySpec, ...]:
        """See `TargetKind`: kept classes, values of the head, and the entropy, which `topk` does not need."""
        config = self.config
        entropy = (ArraySpec("entropy", "float32", ()),)
        if config.name == "dense":
            return (ArraySpec("probs", "float16", (config.classes,)), *entropy)
        kept = config.head_k + config.tail_k
        found = [ArraySpec("low", "uint8", (kept,))]
        if self._high_bits:
            found.append(ArraySpec("high", "uint8", (-(-kept * self._high_bits // 8),)))
        if config.head_k:
            found.append(ArraySpec("value", config.values, (config.head_k,)))
        return (*found, *(entropy if config.name == "draws" else ()))

    @torch.no_grad()
    def encode(self, tapped: Tapped, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """See `TargetKind`."""
        config = self.config
        probs = self.probabilities(tapped, config.temperature)
        entropy = torch.special.entr(probs).sum(-1).float()
        if config.name == "dense":
            return {"probs": probs.half(), "entropy": entropy}
        rows = probs[:, None, None]
        head, value = top_entries(rows, config.head_k)
        index = head
        if config.tail_k:
            uniform = uniforms(view_keys, _TAIL, (1, 1))
            index = torch.cat([head, systematic_draws(rows, head, uniform, config.tail_k)], dim=-1)
        index = index[:, 0, 0]
        arrays = {"low": (index & 255).to(torch.uint8)}
        if self._high_bits:
            arrays["high"] = self._packing(index.device).pack((index >> 8).to(torch.uint8))
        if config.head_k:
            value = value[:, 0, 0]
            if config.values == "uint8":
                value = quantise(value, uniforms(view_keys, _ROUNDING, (config.head_k,)))
            arrays["value"] = value.to(getattr(torch, config.values))
        return arrays | ({"entropy": entropy} if config.name == "draws" else {})

    @torch.no_grad()
    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], shapes: Shapes) -> LogitTarget:
        """See `TargetKind`."""
        config = self.config
        power = config.temperature / self.temperature
        if config.name == "dense":
            probs, entropy = arrays["probs"].float(), arrays["entropy"]
            if power != 1:
                probs = probs**power / (probs**power).sum(-1, keepdim=True)
                entropy = torch.special.entr(probs).sum(-1)
            return _dense(probs, entropy)
        index = arrays["low"].long()
        if self._high_bits:
            index = index | (self._packing(index.device).unpack(arrays["high"]).long() << 8)
        weight = torch.zeros(len(index), 0, device=index.device)
        if config.head_k:
            weight = dequantise(arrays["value"]) if config.values == "uint8" else arrays["value"].float()
        left = 1.0 - weight.sum(-1)
        if config.name == "draws":
            tail = (left / config.tail_k)[:, None].expand(-1, config.tail_k)
            return LogitTarget(index, torch.cat([weight, tail], dim=-1), torch.zeros_like(left), arrays["entropy"])
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1.0)  # values may be rounded above a mass of one
        others = config.classes - config.head_k
        share = left.clamp(min=0.0) / others
        if power != 1:
            weight, share = weight**power, share**power
            mass = weight.sum(-1) + others * share
            weight, share = weight / mass[:, None], share / mass
        entropy = torch.special.entr(weight).sum(-1) + others * torch.special.entr(share)
        return LogitTarget(index, weight, share, entropy)

    @torch.no_grad()
    def exact(self, tapped: Tapped) -> LogitTarget:
        """See `TargetKind`: float32 (float64 for float64 inputs) [B, L]."""
        dtype = torch.promote_types(tapped[self.taps[0]][0].dtype, torch.float32)
        probs = self.probabilities(tapped, self.temperature)
        return _dense(probs.to(dtype), torch.special.entr(probs).sum(-1).to(dtype))

    @property
    def _high_bits(self) -> int:
        return max((self.config.classes - 1).bit_length() - 8, 0)

    def _packing(self, device: torch.device) -> Packing:
        kept = self.config.head_k + self.config.tail_k
        return Packing(torch.full((kept,), self._high_bits, dtype=torch.uint8, device=device))

    # ---- students

    def parts(self, shapes: Shapes) -> dict[str, int]:
        """See `TargetKind`."""
        return {"logits": 1}

    def head(self, student: Shapes, teacher: Shapes) -> TargetHead:
        """See `TargetKind`."""
        return LogitHead(student, self.config.classes)

    def losses(self, answers: Answers, target: LogitTarget) -> dict[str, Loss]:
        """See `TargetKind`: cross entropy in nats x temperature^2.

        With weights w of the kept classes, and the share m of each other class,

            ce = (sum of w + (L - K) m) logsumexp(z) - sum over kept (w - m) z - m sum over all z,

        so the target is never written out over all classes.
        """
        [logits] = answers
        temperature = self.temperature
        dtype = torch.promote_types(logits.dtype, torch.float32)
        with torch.autocast(logits.device.type, enabled=False):
            z = logits.to(dtype) / temperature
            z = z - z.detach().amax(-1, keepdim=True)  # leaves the loss as it is, and its digits
            weight, share = target.weight.to(dtype), target.share.to(dtype)
            kept = z
            if target.index is not None:
                kept = z.gather(1, target.index)
            assert kept.shape == weight.shape, f"student {kept.shape}, teacher {weight.shape}"
            mass = weight.sum(-1) + (z.shape[-1] - weight.shape[-1]) * share
            cross = mass * z.logsumexp(-1) - ((weight - share[:, None]) * kept).sum(-1) - share * z.sum(-1)
        square = temperature**2
        return {"logits": Loss(square * cross[:, None], square * target.entropy.to(dtype))}

    @property
    def label_classes(self) -> int:
        """See `TargetKind`."""
        return self.config.classes if self.targets.label_weight else 0

    def label_losses(self, answers: Answers, labels: Labels) -> dict[str, Loss]:
        """See `TargetKind`: cross entropy in nats at temperature 1, times `targets.label_weight`."""
        if not self.label_classes:
            return {}
        [logits] = answers
        dtype = torch.promote_types(logits.dtype, torch.float32)
        with torch.autocast(logits.device.type, enabled=False):
            z = logits.to(dtype)
            z = z - z.detach().amax(-1, keepdim=True)  # as in `losses`
            share = labels.share.to(dtype)
            both = torch.stack([labels.first, labels.second], -1)
            parts = torch.stack([share, 1 - share], -1)
            cross = (parts * (z.logsumexp(-1, keepdim=True) - z.gather(1, both))).sum(-1)
            floor = torch.where(labels.first == labels.second, 0.0, torch.special.entr(parts).sum(-1))
        weight = self.targets.label_weight
        return {"labels": Loss(weight * cross[:, None], weight * floor)}

    # ---- constants

    @property
    def calibration_views(self) -> int:
        """See `TargetKind`: a class map is a constant, and needs the teacher's number of classes alone."""
        return 0 if self.config.class_map is None else 1

    def check_teacher(self, tapped: Tapped, projection: Projection) -> None:
        """See `TargetKind`."""
        self.calibrate([tapped], projection)

    def calibrate(self, tapped: Iterable[Tapped], projection: Projection) -> dict[str, Tensor]:
        """See `TargetKind`: `class_map`, int64 [L]."""
        config = self.config.class_map
        if config is None:
            return {}
        if config.file is None:
            raise RecipeError("codec.class_map has no file", got=f"sha256 {config.sha256}", expected="its file")
        numbers = read_class_map(config.file)
        if len(numbers) != self.config.classes:
            raise RecipeError(
                f"the class map {config.file} has another number of classes",
                got=f"codec.classes {self.config.classes}",
                expected=len(numbers),
            )
        if config.sha256 not in (None, class_map_sha256(numbers)):
            raise RecipeError(
                f"the class map {config.file} is not the one that the recipe states",
                got=f"sha256 {class_map_sha256(numbers)}",
                expected=config.sha256,
            )
        found = torch.tensor(numbers)
        for each in tapped:
            _check_map(found, each[self.taps[0]][0].shape[-1])
        return {"class_map": found}

    # ---- audits

    def yardsticks(self, targets: Sequence[LogitTarget]) -> dict[str, Yardstick]:
        """See `TargetKind`: the KL to equal probabilities, and to the mean over all other views."""
        count = sum(len(each.weight) for each in targets)
        total = torch.stack([each.weight.sum(0, dtype=torch.float64) for each in targets]).sum(0)
        even = common = 0.0
        for each in targets:
            others = ((total - each.weight) / (count - 1)).clamp(min=_LEAST_PROBABILITY)
            for_even, for_common = torch.zeros_like(others), others.log() * self.temperature
            even += float(self.losses((for_even,), each)["logits"].mean()) * len(others)
            common += float(self.losses((for_common,), each)["logits"].mean()) * len(others)
        return {"logits": Yardstick(even / count, common / count)}

    def statistics(self, tapped: Tapped, target: LogitTarget) -> dict[str, dict[str, Float[Tensor, "B 1"]]]:
        """See `TargetKind`: `entropy_nats`, and `kept_mass`, the teacher's mass on the stored classes."""
        probs = self.probabilities(tapped, self.temperature)
        kept = torch.ones_like(probs)
        if target.index is not None:
            kept = torch.zeros_like(probs).scatter(1, target.index, 1.0)
        found = {"entropy_nats": torch.special.entr(probs).sum(-1), "kept_mass": (probs * kept).sum(-1)}
        return {"logits": {name: value[:, None] for name, value in found.items()}}

    # ---- pictures

    def answered(self, answers: Answers, shapes: Shapes) -> LogitTarget:
        """See `TargetKind`."""
        probs = (answers[0].float() / self.config.temperature).softmax(-1)
        return _dense(probs, torch.special.entr(probs).sum(-1))

    def picture(self, columns: Mapping[str, LogitTarget], shapes: Shapes, lines: int) -> list[PictureLine]:
        """See `TargetKind`: the largest probabilities, as bars."""
        return [probability_line("probabilities of classes", columns, self.config.classes)]


def probability_line(title: str, columns: Mapping[str, LogitTarget], classes: int) -> PictureLine:
    """Bars of the classes that are largest in the first whole target."""
    shares = {name: each.dense(classes)[0] for name, each in columns.items()}
    return class_line(title, shares, (name for name, each in columns.items() if each.index is None))


def make_logits(config: LogitsCodec, targets: TargetsConfig, block: int, constants: Mapping[str, Tensor]) -> Logits:
    """The kind; arguments and errors as `targets.kinds.make_kind`."""
    if config.name == "draws" and targets.temperature not in (None, config.temperature):
        raise RecipeError(
            "targets.temperature is not the one that the draws were made at",
            got=targets.temperature,
            expected=f"{config.temperature:g}, or no targets.temperature",
            hint="cache with codec.temperature, or with codec.name: topk or dense, which any temperature can read",
        )
    return Logits(config, targets, block, constants)


def _check_map(class_map: Int64[Tensor, " L"], classes: int) -> None:
    """Raises RecipeError where a map names a class that a teacher of so many `classes` lacks."""
    if int(class_map.max()) >= classes:
        raise RecipeError(
            "the class map names a class that the teacher lacks",
            got=f"class {int(class_map.max())}",
            expected=f"0 to {classes - 1}, or -1",
        )


def _dense(probs: Float[Tensor, "B L"], entropy: Float[Tensor, " B"]) -> LogitTarget:
    return LogitTarget(None, probs, torch.zeros_like(entropy), entropy)
