"""Per-view gradients of a student under a target; they measure the bias and noise that a codec adds (I5).

Shapes: P part of a loss, N gradient coordinate, S pixel.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from tinymim.configs.sections.models import ModelConfig
from tinymim.configs.taps import Shapes
from tinymim.models.student import StudentModel, shapes_of
from tinymim.models.vit import Normalise, build_vit
from tinymim.targets.contract import Loss, Target, TargetHead, TargetKind
from tinymim.targets.fidelity import GradientMoments, merged, rounded

# Gradients have millions of coordinates; a fixed random sample of this many per tensor estimates their moments.
COORDINATES_PER_TENSOR: Final = 4096
REFERENCE_WIDTH: Final = 192  # ViT-T


def reference_student(kind: TargetKind, view_size: int, teacher: Shapes) -> StudentModel:
    """The student of every unit audit: a ViT-T at fixed initial weights, so that audits of caches compare.

    Its tokens are the teacher's. Its width is the smallest from 192 on that the kind's parts divide.
    """
    # 12: the student's 3 heads, and the sine-cosine table's multiple of 4
    step = math.lcm(12, *kind.parts(teacher).values())
    config = ModelConfig(
        name="vit_tiny_patch16_224",
        img_size=view_size,
        patch_size=view_size // teacher.grid[0],
        embed_dim=-(-REFERENCE_WIDTH // step) * step,
        num_heads=3,
    )
    prefix = teacher.prefix_tokens
    extra: dict[str, Any] = {"reg_tokens": prefix - 1} if prefix else {"class_token": False, "global_pool": "avg"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = build_vit(config, **extra)
        return StudentModel(vit, kind.head(replace(shapes_of(vit), tokens=teacher.tokens), teacher))


@dataclass(frozen=True)
class ViewGradient:
    """Losses and gradients of a student under one target of one view.

    Attributes:
        gradients: "all" [1, N] is the gradient of the summed losses, at sampled coordinates of all parameters. Each
            loss has [P, N], the gradient of each part in the head's own weights for that part.
        losses: by name; parts [1, P], floor [1] or [1, P].
    """

    gradients: dict[str, Tensor]
    losses: dict[str, Loss]


class GradientProbe:
    """Gradients of a kind's losses for one student, one view at a time.

    Args:
        kind: the kind of target, which defines the losses.
        student: the student, with any weights; it is put into evaluation mode, so that nothing is dropped.
        shapes: the teacher's shapes.
    """

    def __init__(self, kind: TargetKind, student: StudentModel, shapes: Shapes) -> None:
        self.kind, self.student, self.shapes = kind, student.eval(), shapes
        device = next(student.parameters()).device
        self.normalise = Normalise().to(device)
        self._trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        generator = torch.Generator().manual_seed(0)
        chosen, scales, offset = [], [], 0
        for parameter in self._trained:
            size = parameter.numel()
            taken = min(size, COORDINATES_PER_TENSOR)
            chosen.append(offset + torch.randperm(size, generator=generator)[:taken])
            scales.append(torch.full((taken,), math.sqrt(size / taken)))  # keeps expected norms
            offset += size
        # Indices into the concatenated parameters: three GPU operations in all, not three for each of 150 tensors.
        self._chosen, self._scale = torch.cat(chosen).to(device), torch.cat(scales).to(device)

    def __call__(self, pixels: Tensor, targets: Iterable[Target], kept: Tensor | None = None) -> Iterator[ViewGradient]:
        """Yield the gradient under every target of one view; the student runs forward once.

        Args:
            pixels: uint8 [1, 3, S, S].
            targets: targets of this view.
            kept: int64 [1, M], the patches that the student sees; None: all.
        """
        tokens = self.student.tokens(self.normalise(pixels), kept)
        head = self.student.head
        assert isinstance(head, TargetHead)  # by `kind.head`
        answers = head(tokens)
        for target in targets:
            # Cut at the head's outputs: losses and parts share one backward pass through the student below.
            leaves = tuple(answer.detach().requires_grad_() for answer in answers)
            found: dict[str, Tensor] = {}
            total = [torch.zeros_like(leaf) for leaf in leaves]
            losses = self.kind.losses(leaves, target)
            for name, loss in losses.items():
                grads: tuple[Tensor | None, ...] = torch.autograd.grad(
                    loss.parts.mean(), leaves, allow_unused=True, retain_graph=True
                )
                total = [a if b is None else a + b for a, b in zip(total, grads, strict=True)]
                found[name] = head.by_part(tokens.detach(), grads, loss.parts.shape[1])
            full = torch.autograd.grad(answers, self._trained, total, retain_graph=True, allow_unused=True)
            found["all"] = self._sampled(full)
            yield ViewGradient(found, {n: Loss(loss.parts.detach(), loss.floor) for n, loss in losses.items()})

    def _sampled(self, gradients: Sequence[Tensor | None]) -> Tensor:
        flat = [
            parameter.new_zeros(parameter.numel()) if gradient is None else gradient.flatten()
            for gradient, parameter in zip(gradients, self._trained, strict=True)
        ]
        return (torch.cat(flat)[self._chosen] * self._scale)[None]


class CodecMoments:
    """Losses and gradients of one student under one codec, against those under dense targets, over views.

    Args:
        views: number of views that will be added.
    """

    def __init__(self, views: int) -> None:
        self.moments = GradientMoments(views)
        self._loss: dict[str, Tensor] = {}
        self._error: dict[str, Tensor] = {}

    def add(self, dense: ViewGradient, draws: Sequence[ViewGradient]) -> None:
        """Add a view: the gradient under its dense target, and under each draw of the codec."""
        self.moments.add(dense.gradients, [draw.gradients for draw in draws])
        for name, exact in dense.losses.items():
            codec = torch.stack([draw.losses[name].parts[0] for draw in draws]).mean(0)
            self._loss[name] = self._loss.get(name, 0) + exact.per_part()[0].double().cpu()
            self._error[name] = self._error.get(name, 0) + (codec - exact.parts[0]).double().cpu()

    def summary(self) -> dict[str, dict[str, list[float]]]:
        """`GradientMoments.summary`; by loss also kl_nats (dense) and loss_error_nats (codec - dense), per part."""
        losses = {
            name: {
                "kl_nats": [rounded(v) for v in (loss / self.moments.views).tolist()],
                "loss_error_nats": [rounded(v) for v in (self._error[name] / self.moments.views).tolist()],
            }
            for name, loss in self._loss.items()
        }
        return merged(self.moments.summary(), losses)
