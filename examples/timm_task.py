"""A cache as a `timm.task`, the interface of timm's train script for distillation.

In timm's train.py, make this task where it makes a FeatureDistillationTask, and the loader where it makes loader_train.

python examples/timm_task.py caches/mine shards/mine
"""

import sys
from typing import Any

import torch
from timm.models import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.task import TrainingTask
from torch import Tensor

import tinymim


class CachedDistillationTask(TrainingTask):
    """A student with a head for every layer of a cache, and no teacher."""

    def __init__(self, student: VisionTransformer, cache: tinymim.TeacherCache) -> None:
        super().__init__()
        self.cache, self.student = cache, student
        self.heads = torch.nn.ModuleList(cache.head(layer, student) for layer in cache.layers)

    def forward(self, input: Any, target: Any) -> dict[str, Tensor]:
        """timm's dictionary, `loss` and `output`, and each of the cache's losses; `input` is a `tinymim.Batch`."""
        tokens = self.student.forward_features(input.images())
        answers = {layer: head(tokens) for layer, head in zip(self.cache.layers, self.heads, strict=True)}
        losses = self.cache.losses(answers, input)
        return {"loss": torch.stack(list(losses.values())).sum(), "output": tokens, **losses}


def main(place: str, shards: str, epochs: int = 10, batch_size: int = 64, workers: int = 2) -> float:
    """Train a student on all layers of a cache.

    Args:
        place: the cache.
        shards: the shards that it was made from.
        epochs: passes over the images.
        batch_size: views of a step.
        workers: loader processes.

    Returns:
        The loss of the last step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cache = tinymim.open_cache(place)
    grid = cache.teachers[cache.layers[0]]["shapes"]["grid"]
    student = VisionTransformer(
        img_size=cache.view_size,
        patch_size=cache.view_size // grid[0],
        embed_dim=192,
        num_heads=3,
        num_classes=0,
    )
    task = CachedDistillationTask(student, cache).to(device)
    optimiser = create_optimizer_v2(task, opt="adamw", lr=1e-3, weight_decay=0.05)
    loader = cache.loader(shards, batch_size=batch_size, workers=workers)
    result = {"loss": torch.zeros(())}
    for epoch in range(epochs):
        for loaded in loader:
            batch = loaded.to(device)
            result = task(batch, batch.labels)
            optimiser.zero_grad()
            result["loss"].backward()
            optimiser.step()
        print(f"epoch {epoch + 1}: loss {result['loss'].item():.3f}")
    return result["loss"].item()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
