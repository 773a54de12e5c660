"""Train a timm ViT on a cache's targets in a plain PyTorch loop.

python examples/plain_loop.py caches/mine shards/mine
"""

import sys

import torch
from timm.models import VisionTransformer

import tinymim


def main(place: str, shards: str, epochs: int = 10, batch_size: int = 64, workers: int = 2, width: int = 192) -> float:
    """Train a student on all layers of a cache.

    Args:
        place: the cache.
        shards: the shards that it was made from.
        epochs: passes over the images.
        batch_size: views of a step.
        workers: loader processes.
        width: the student's width.

    Returns:
        The loss of the last step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cache = tinymim.open_cache(place)
    # The student's tokens must be those of the teacher: the same grid of patches and the same prefix tokens.
    grid = cache.teachers[cache.layers[0]]["shapes"]["grid"]
    student = VisionTransformer(
        img_size=cache.view_size,
        patch_size=cache.view_size // grid[0],
        embed_dim=width,
        num_heads=3,
        num_classes=0,
    ).to(device)
    heads = {layer: cache.head(layer, student).to(device) for layer in cache.layers}
    parameters = [parameter for model in (student, *heads.values()) for parameter in model.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)

    loader = cache.loader(shards, batch_size=batch_size, workers=workers)
    total = torch.zeros(())
    for epoch in range(epochs):
        for loaded in loader:
            batch = loaded.to(device)
            tokens = student.forward_features(batch.images())
            losses = cache.losses({layer: head(tokens) for layer, head in heads.items()}, batch)
            total = torch.stack(list(losses.values())).sum()
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
        print(f"epoch {epoch + 1}: " + ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items()))
    return total.item()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
