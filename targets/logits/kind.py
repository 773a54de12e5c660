"""Class probabilities as a target kind.

Shapes: B view, L class, K kept class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from tinymim.configs.codecs import LogitsCodec
from tinymim.configs.errors import RecipeError
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets.contract import (
    Answers,
    ArraySpec,
    ChosenKind,
    Loss,
    PictureLine,
    Tapped,
    TargetHead,
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
class LogitTarget:
    """The class probabilities of B views: some with their weights, and one share for each other class."""

    index: Int64[Tensor, "B K"] | None  # classes, which may repeat where `share` is zero; None: all in order
    weight: Float[Tensor, "B K"]
    share: Float[Tensor, " B"]
    entropy: Float[Tensor, " B"]  # nats

    def pick(self, some: slice, device: torch.device | None = None) -> "LogitTarget":
        """The target of some views."""

        def of(tensor: Tensor) -> Tensor:
            return tensor[some] if device is None else tensor[some].to(device)

        index = None if self.index is None else of(self.index)
        return LogitTarget(index, of(self.weight), of(self.share), of(self.entropy))

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
    def whole(self) -> bool:
        """See `TargetKind`."""
        return self.config.name == "dense"

    @property
    def meaning(self) -> tuple[object, ...]:
        """See `TargetKind`."""
        return ("logits", self.config.classes, self.config.temperature)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """See `TargetKind`."""
        return (Tap("logits"),)

    def probabilities(self, tapped: Tapped) -> Float[Tensor, "B L"]:
        """The teacher's softmax, float64.

        Raises:
            RecipeError: the teacher has another number of classes.
        """
        [logits] = tapped[self.taps[0]]
        if logits.shape[-1] != self.config.classes:
            raise RecipeError(
                "the teacher has another number of classes",
                got=f"codec.classes {self.config.classes}",
                expected=logits.shape[-1],
            )
        return (logits.double() / self.config.temperature).softmax(-1)

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
        probs, config = self.probabilities(tapped), self.config
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
        if config.name == "dense":
            return _dense(arrays["probs"].float(), arrays["entropy"])
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
        entropy = torch.special.entr(weight).sum(-1) + others * torch.special.entr(share)
        return LogitTarget(index, weight, share, entropy)

    @torch.no_grad()
    def exact(self, tapped: Tapped) -> LogitTarget:
        """See `TargetKind`: float32 (float64 for float64 inputs) [B, L]."""
        probs, dtype = self.probabilities(tapped), torch.promote_types(tapped[self.taps[0]][0].dtype, torch.float32)
        return _dense(probs.to(dtype), torch.special.entr(probs).sum(-1).to(dtype))

    def pick(self, target: LogitTarget, some: slice, device: torch.device | None = None) -> LogitTarget:
        """See `TargetKind`."""
        return target.pick(some, device)

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
        temperature = self.config.temperature
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

    # ---- audits

    def yardsticks(self, targets: Sequence[LogitTarget]) -> dict[str, Yardstick]:
        """See `TargetKind`: the KL to equal probabilities, and to the mean over all other views."""
        count = sum(len(each.weight) for each in targets)
        total = torch.stack([each.weight.sum(0, dtype=torch.float64) for each in targets]).sum(0)
        even = common = 0.0
        for each in targets:
            others = ((total - each.weight) / (count - 1)).clamp(min=_LEAST_PROBABILITY)
            for_even, for_common = torch.zeros_like(others), others.log() * self.config.temperature
            even += float(self.losses((for_even,), each)["logits"].mean()) * len(others)
            common += float(self.losses((for_common,), each)["logits"].mean()) * len(others)
        return {"logits": Yardstick(even / count, common / count)}

    def statistics(self, tapped: Tapped, target: LogitTarget) -> dict[str, dict[str, Float[Tensor, "B 1"]]]:
        """See `TargetKind`: `entropy_nats`, and `kept_mass`, the teacher's mass on the stored classes."""
        probs = self.probabilities(tapped)
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


def _dense(probs: Float[Tensor, "B L"], entropy: Float[Tensor, " B"]) -> LogitTarget:
    return LogitTarget(None, probs, torch.zeros_like(entropy), entropy)
