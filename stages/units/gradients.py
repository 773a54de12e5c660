"""What a student's gradient would be, view by view: by which codecs are judged (stage `fidelity`, and I5's audit).

Shapes: H relation head, T token, C student width, D = C / H, P part, N gradient coordinate.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from tinymim.configs.codecs import Relation
from tinymim.configs.sections import ModelConfig
from tinymim.models.taps import StudentWithTap, split_qkv
from tinymim.models.vit import Normalise, build_vit
from tinymim.targets.relations.fidelity import GradientMoments, merged, rounded
from tinymim.targets.relations.losses import cross_entropy_per_head
from tinymim.targets.relations.qkv import QKV
from tinymim.targets.relations.rows import DenseRows, RowTarget, Target

# A gradient of millions is judged on a fixed random part of its coordinates: this many of every tensor.
COORDINATES_PER_TENSOR: Final = 4096
REFERENCE_WIDTH: Final = 192  # ViT-T


def reference_student(teacher: ModelConfig, grid: tuple[int, int], prefix_tokens: int, heads: int) -> StudentWithTap:
    """The student on which caches report their noise: a ViT-T at its initial weights, the same everywhere.

    Its tokens are the teacher's and its width the smallest from 192 on that `heads` divides.
    """
    step = math.lcm(heads, 12)  # 3 heads of its own, and a sine-cosine table, which needs a multiple of 4
    config = ModelConfig(
        name="vit_tiny_patch16_224",
        img_size=teacher.img_size,
        patch_size=teacher.img_size // grid[0],
        embed_dim=-(-REFERENCE_WIDTH // step) * step,
        num_heads=3,
    )
    extra: dict[str, Any] = {"reg_tokens": prefix_tokens - 1} if prefix_tokens else {"class_token": False}
    if not prefix_tokens:
        extra["global_pool"] = "avg"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return StudentWithTap(build_vit(config, **extra))


@dataclass(frozen=True)
class ViewGradient:
    """What one target of one view asks of a student.

    Attributes:
        gradients: "all" [1, N], of the summed loss over (part of) the student's parameters; and for every relation
            [H, N], of each head's loss over that head's own projections in the tap.
        cross_entropy: by relation [H], nats, mean over the target's rows.
    """

    gradients: dict[str, Tensor]
    cross_entropy: dict[str, Tensor]


class GradientProbe:
    """Gradients of the relation loss for one student, one view at a time.

    Args:
        student: any weights; it is put into evaluation mode, so that nothing is dropped.
        heads: relation heads of the targets.
    """

    def __init__(self, student: StudentWithTap, heads: int) -> None:
        self.student = student.eval()
        self.heads = heads
        device = student.tap.weight.device
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
        features = self.student.vit.forward_features(self.normalise(pixels))
        tapped = QKV(*split_qkv(self.student.tap(features), self.student.heads)).resplit(self.heads)
        sides = (tapped.q, tapped.k, tapped.v)
        for target in targets:
            leaves = tuple(side.detach().requires_grad_() for side in sides)
            student = QKV(*leaves)
            found: dict[str, Tensor] = {}
            total = [torch.zeros_like(leaf) for leaf in leaves]
            cross_entropy = cross_entropy_per_head(student, target)
            for relation, by_head in cross_entropy.items():
                grads: tuple[Tensor | None, ...] = torch.autograd.grad(
                    by_head.mean(), leaves, allow_unused=True, retain_graph=True
                )
                total = [a if b is None else a + b for a, b in zip(total, grads, strict=True)]
                # d loss / d (C x D weights of a head) = sum over tokens of feature x gradient
                used = [torch.einsum("tc,htd->hcd", features.detach()[0], g[0]) for g in grads if g is not None]
                found[relation] = torch.cat(used, dim=-1).flatten(1)
            full = torch.autograd.grad(sides, self._trained, total, retain_graph=True, allow_unused=True)
            found["all"] = self._sampled(full)
            yield ViewGradient(found, {relation: by_head[0].detach() for relation, by_head in cross_entropy.items()})

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
        self._kl: dict[Relation, Tensor] = {}
        self._error: dict[Relation, Tensor] = {}

    def add(self, exact: Target, dense: ViewGradient, draws: Sequence[ViewGradient]) -> None:
        """One view: its dense maps, the gradient under them, and under each draw of the codec."""
        self.moments.add(dense.gradients, [draw.gradients for draw in draws])
        for relation, rows in exact.items():
            exact_ce = dense.cross_entropy[relation]
            entropy = torch.special.entr(rows.dense()).sum(-1).mean((0, 2))
            codec_ce = torch.stack([draw.cross_entropy[relation] for draw in draws]).mean(0)
            self._kl[relation] = self._kl.get(relation, 0) + (exact_ce - entropy).double().cpu()
            self._error[relation] = self._error.get(relation, 0) + (codec_ce - exact_ce).double().cpu()

    def summary(self) -> dict[str, dict[str, list[float]]]:
        """`GradientMoments.summary`, and by relation kl_nats (dense) and loss_error_nats (codec - dense), per head."""
        losses = {
            str(relation): {
                "kl_nats": [rounded(v) for v in (kl / self.moments.views).tolist()],
                "loss_error_nats": [rounded(v) for v in (self._error[relation] / self.moments.views).tolist()],
            }
            for relation, kl in self._kl.items()
        }
        return merged(self.moments.summary(), losses)


def target_of(target: Target, row: int) -> Target:
    """One view of a batch's target, still with a batch axis."""
    part = slice(row, row + 1)

    def one(rows: RowTarget) -> RowTarget:
        numbers = None if rows.rows is None else rows.rows[part]
        if isinstance(rows, DenseRows):
            return DenseRows(numbers, rows.probs[part], rows.entropy[part])
        return replace(rows, rows=numbers, index=rows.index[part], weight=rows.weight[part], entropy=rows.entropy[part])

    return {relation: one(rows) for relation, rows in target.items()}
