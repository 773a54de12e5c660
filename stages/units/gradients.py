"""Per-view gradients of a student under a target; they measure the bias and noise that a codec adds (I5).

Shapes: P part of a loss, N gradient coordinate, S pixel.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from tinymim.configs.sections import ModelConfig
from tinymim.configs.taps import Shapes
from tinymim.models.student import StudentModel, shapes_of
from tinymim.models.vit import Normalise, build_vit
from tinymim.targets.contract import Loss, Target, TargetHead, TargetKind
from tinymim.targets.fidelity import GradientMoments, merged, rounded

# A gradient of millions is judged on a fixed random part of its coordinates: this many of every tensor.
COORDINATES_PER_TENSOR: Final = 4096
REFERENCE_WIDTH: Final = 192  # ViT-T


def reference_student(kind: TargetKind, view_size: int, teacher: Shapes) -> StudentModel:
    """The student on which caches report their noise: a ViT-T at its initial weights, the same everywhere.

    Its tokens are the teacher's, and its width is the smallest from 192 on that the kind's parts divide.
    """
    # 3 heads of its own, and a sine-cosine table, which needs a multiple of 4
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
        return StudentModel(vit, kind.head(shapes_of(vit), teacher))


@dataclass(frozen=True)
class ViewGradient:
    """What one target of one view asks of a student.

    Attributes:
        gradients: "all" [1, N], of the summed losses over (part of) the student's parameters; and for every loss
            [P, N], of each part over the head's own weights for that part.
        losses: by name, [1, P] and [1] or [1, P].
    """

    gradients: dict[str, Tensor]
    losses: dict[str, Loss]


class GradientProbe:
    """Gradients of a kind's losses for one student, one view at a time.

    Args:
        kind: what the student is compared on.
        student: any weights; it is put into evaluation mode, so that nothing is dropped.
        shapes: of the teacher.
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
        # Of all parameters in a row: on a GPU three operations instead of three for each of 150 tensors.
        self._chosen, self._scale = torch.cat(chosen).to(device), torch.cat(scales).to(device)

    def __call__(self, pixels: Tensor, targets: Iterable[Target]) -> Iterator[ViewGradient]:
        """The gradient under every target of one view; the student runs forward once.

        Args:
            pixels: uint8 [1, 3, S, S].
            targets: each of one view.
        """
        tokens = self.student.tokens(self.normalise(pixels))
        head = self.student.head
        assert isinstance(head, TargetHead)  # by `kind.head`
        answers = head(tokens)
        for target in targets:
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


class Judged:
    """One codec as one student sees it, view by view.

    Args:
        views: how many views will be added.
    """

    def __init__(self, views: int) -> None:
        self.moments = GradientMoments(views)
        self._loss: dict[str, Tensor] = {}
        self._error: dict[str, Tensor] = {}

    def add(self, dense: ViewGradient, draws: Sequence[ViewGradient]) -> None:
        """One view: the gradient under its dense target, and under each draw of the codec."""
        self.moments.add(dense.gradients, [draw.gradients for draw in draws])
        for name, exact in dense.losses.items():
            codec = torch.stack([draw.losses[name].parts[0] for draw in draws]).mean(0)
            self._loss[name] = self._loss.get(name, 0) + exact.per_part()[0].double().cpu()
            self._error[name] = self._error.get(name, 0) + (codec - exact.parts[0]).double().cpu()

    def summary(self) -> dict[str, dict[str, list[float]]]:
        """`GradientMoments.summary`, and by loss kl_nats (dense) and loss_error_nats (codec - dense), per part."""
        losses = {
            name: {
                "kl_nats": [rounded(v) for v in (loss / self.moments.views).tolist()],
                "loss_error_nats": [rounded(v) for v in (self._error[name] / self.moments.views).tolist()],
            }
            for name, loss in self._loss.items()
        }
        return merged(self.moments.summary(), losses)
