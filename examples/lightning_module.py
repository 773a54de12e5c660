"""Train a student with Lightning: `pip install 'tinymim[lightning]'`.

python examples/lightning_module.py caches/mine shards/mine
"""

import sys
from typing import Any

import lightning
import torch
from timm.models import VisionTransformer
from torch import Tensor

import tinymim


class Distilled(lightning.LightningModule):
    """A timm ViT with a head for every layer of a cache."""

    def __init__(self, cache: tinymim.TeacherCache) -> None:
        super().__init__()
        self.cache = cache
        grid = cache.teachers[cache.layers[0]]["shapes"]["grid"]
        self.student = VisionTransformer(
            img_size=cache.view_size,
            patch_size=cache.view_size // grid[0],
            embed_dim=192,
            num_heads=3,
            num_classes=0,
        )
        self.heads = torch.nn.ModuleList(cache.head(layer, self.student) for layer in cache.layers)

    def training_step(self, batch: tinymim.Batch, index: int) -> Tensor:
        """The sum of all losses. Lightning has moved the batch by its `to`."""
        tokens = self.student.forward_features(batch.images())
        answers = {layer: head(tokens) for layer, head in zip(self.cache.layers, self.heads, strict=True)}
        losses = self.cache.losses(answers, batch)
        self.log_dict({name: loss.detach() for name, loss in losses.items()}, batch_size=len(batch.keys))
        return torch.stack(list(losses.values())).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the student and its heads."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.05)


def main(place: str, shards: str, epochs: int = 10, batch_size: int = 64, workers: int = 2, **trainer: Any) -> float:
    """Train a student on all layers of a cache.

    Args:
        place: the cache.
        shards: the shards that it was made from.
        epochs: passes over the images.
        batch_size: views of a step.
        workers: loader processes.
        trainer: further arguments of Lightning's Trainer.

    Returns:
        The sum of the last step's losses.
    """
    cache = tinymim.open_cache(place)
    # The loader shares the images among ranks itself, so Lightning must not.
    fitter = lightning.Trainer(max_epochs=epochs, use_distributed_sampler=False, **trainer)
    loader = cache.loader(
        shards, batch_size=batch_size, workers=workers, rank=fitter.global_rank, world_size=fitter.world_size
    )
    fitter.fit(Distilled(cache), loader)
    return sum(float(value) for name, value in fitter.logged_metrics.items() if "/" in name)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
