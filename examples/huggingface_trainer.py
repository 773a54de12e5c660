"""Train a student with Hugging Face's Trainer: `pip install 'tinymim[transformers]'`.

python examples/huggingface_trainer.py caches/mine shards/mine runs/hf
"""

import sys
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import tinymim


class Distilled(nn.Module):
    """A timm ViT with a head for every layer of a cache; its output is the loss, as Trainer expects."""

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
        self.heads = nn.ModuleList(cache.head(layer, self.student) for layer in cache.layers)

    def forward(self, batch: tinymim.Batch) -> dict[str, Tensor]:
        """The sum of all losses."""
        batch = batch.to(next(self.parameters()).device)
        tokens = self.student.forward_features(batch.images())
        answers = {layer: head(tokens) for layer, head in zip(self.cache.layers, self.heads, strict=True)}
        return {"loss": torch.stack(list(self.cache.losses(answers, batch).values())).sum()}


class CacheTrainer(Trainer):
    """Trainer on a loader that makes whole batches."""

    def __init__(self, loader: tinymim.Loader, **arguments: Any) -> None:
        self.loader = loader
        super().__init__(train_dataset=loader, **arguments)

    def get_train_dataloader(self) -> Any:
        """The loader as it is; each item is a Trainer's dictionary of inputs."""
        return torch.utils.data.DataLoader(self.loader, batch_size=None, collate_fn=lambda batch: {"batch": batch})


def main(place: str, shards: str, folder: str, epochs: int = 10, batch_size: int = 64, workers: int = 2) -> float:
    """Train a student on all layers of a cache, on one device.

    Args:
        place: the cache.
        shards: the shards that it was made from.
        folder: the folder that Trainer writes to.
        epochs: passes over the images.
        batch_size: views of a step.
        workers: loader processes.

    Returns:
        The mean loss of the training.
    """
    cache = tinymim.open_cache(place)
    loader = cache.loader(shards, batch_size=batch_size, workers=workers)
    arguments = TrainingArguments(folder, num_train_epochs=epochs, learning_rate=1e-3, report_to=[], save_strategy="no")
    trained = CacheTrainer(loader, model=Distilled(cache), args=arguments).train()
    return float(trained.training_loss)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
