"""Models that are not timm's, as a user writes them; the tests name them in recipes as factories."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tinymim.configs.taps import Shapes

SHAPES = Shapes(heads=2, head_dim=4, tokens=17, prefix_tokens=1, grid=(4, 4))  # of images of 32 pixels


class Mixer(nn.Module):
    """Patches, one linear layer and a mean token in front: tokens, class token, q, k, v and logits."""

    def __init__(self, shapes: Shapes = SHAPES, seed: int = 0, classes: int = 5) -> None:
        super().__init__()
        self.shapes = shapes
        torch.manual_seed(seed)
        side = 32 // shapes.grid[0]
        self.patches = nn.Conv2d(3, shapes.width, side, side)
        self.mix = nn.Linear(shapes.width, 3 * shapes.width)
        self.top = nn.Linear(3 * shapes.width, shapes.width)
        self.classifier = nn.Linear(shapes.width, classes)

    def _tokens(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).mT
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)

    def forward_features(self, images: Tensor) -> Tensor:
        tokens = self._tokens(images)
        final: Tensor = tokens + self.top(self.mix(tokens).relu())
        return final


class TeacherMixer(Mixer):
    """A teacher of four taps."""

    license = "apache-2.0"

    def forward_taps(self, images: Tensor, taps: Sequence[str]) -> dict[str, Tensor | tuple[Tensor, ...]]:
        tokens, final = self._tokens(images), self.forward_features(images)
        heads = self.mix(tokens).unflatten(2, (3, self.shapes.heads, -1)).permute(2, 0, 3, 1, 4)
        return {
            "qkv@1": tuple(heads),
            "tokens@1": final,
            "tokens@0": final,
            "cls@0": final[:, 0],
            "logits@0": self.classifier(final[:, 0]),
        }


def teacher(seed: int = 0) -> nn.Module:
    return TeacherMixer(seed=seed).eval()


def coarse_teacher() -> nn.Module:
    """It states sizes that its tensors do not have."""
    model = TeacherMixer()
    model.shapes = Shapes(2, 4, 10, 1, (3, 3))
    return model


def student(heads: int = 2) -> nn.Module:
    return Mixer(Shapes(heads, 8 // heads, 17, 1, (4, 4)), seed=3)


def vit(**sizes: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, **sizes)


def plain() -> nn.Module:
    return nn.Linear(2, 2)


def nothing() -> str:
    return "no module"


def broken(message: str) -> nn.Module:
    raise ValueError(message)
