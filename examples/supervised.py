"""Add a cache's loss to supervised training: cross entropy on the labels, plus the teacher's targets as a regulariser.

python examples/supervised.py caches/mine shards/mine 100
"""

import sys

import torch
from timm.models import VisionTransformer
from torch.nn import functional

import tinymim


def main(
    place: str,
    shards: str,
    num_classes: int,
    epochs: int = 10,
    batch_size: int = 64,
    workers: int = 2,
    weight: float = 0.5,
) -> tuple[float, float]:
    """Train a classifier with the cache's targets beside its labels.

    Args:
        place: the cache.
        shards: the labelled shards that it was made from.
        num_classes: the number of classes.
        epochs: passes over the images.
        batch_size: views of a step.
        workers: loader processes.
        weight: the factor of the cache's loss.

    Returns:
        Cross entropy and the cache's loss of the last step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cache = tinymim.open_cache(place)
    grid = cache.teachers[cache.layers[0]]["shapes"]["grid"]
    model = VisionTransformer(
        img_size=cache.view_size,
        patch_size=cache.view_size // grid[0],
        embed_dim=192,
        num_heads=3,
        num_classes=num_classes,
    ).to(device)
    loader = cache.loader(shards, batch_size=batch_size, workers=workers)

    # ---- added: a head for every layer, trained with the model
    heads = {layer: cache.head(layer, model).to(device) for layer in cache.layers}
    parameters = [parameter for each in (model, *heads.values()) for parameter in each.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)

    supervised, taught = torch.zeros(()), torch.zeros(())
    for epoch in range(epochs):
        for loaded in loader:
            batch = loaded.to(device)
            tokens = model.forward_features(batch.images())
            supervised = functional.cross_entropy(model.forward_head(tokens), batch.soft_labels(num_classes))

            # ---- added: the losses of the same tokens
            losses = cache.losses({layer: head(tokens) for layer, head in heads.items()}, batch)
            taught = torch.stack(list(losses.values())).sum()

            optimiser.zero_grad()
            (supervised + weight * taught).backward()
            optimiser.step()
        print(f"epoch {epoch + 1}: cross entropy {supervised.item():.3f}, teacher {taught.item():.3f}")
    return supervised.item(), taught.item()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
