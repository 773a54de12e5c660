"""Frozen features of an encoder, and two classifiers on them: weighted k-NN and a linear probe.

Shapes: B image, N training image, M validation image, C feature, T token, K class.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError
from tinymim.models import backbone

_CHUNK_ELEMENTS = 2**24  # similarities in memory at once: 64 MiB in float32


def pooled_features(
    model: nn.Module, images: Float[Tensor, "B 3 S S"], block: int | None, pool: str
) -> Float[Tensor, "B C"]:
    """One feature vector per image from a timm ViT.

    Args:
        model: a timm ViT without head, in eval mode.
        images: normalised pixels.
        block: the block whose tokens are used, counted from 1. They pass a layer norm without parameters, because the
            model's own final norm was fitted to the last block. None: all blocks and the model's final norm.
        pool: "mean" over the patch tokens, or "cls", the class token.

    Raises:
        RecipeError: the model has no such block, no class token, or is no ViT.
    """
    if pool == "cls" and not backbone.has_class_token(model):
        raise RecipeError("pool: cls needs a class token", got=type(model).__name__, hint="set pool: mean")
    tokens = backbone.tokens_at(model, images, block)
    if block is not None:
        tokens = nn.functional.layer_norm(tokens, tokens.shape[-1:])
    return tokens[:, 0] if pool == "cls" else tokens[:, backbone.prefix_tokens(model) :].mean(dim=1)


@torch.no_grad()
def knn_predict(
    train_x: Float[Tensor, "N C"],
    train_y: Int64[Tensor, " N"],
    val_x: Float[Tensor, "M C"],
    num_classes: int,
    k: int,
    temperature: float,
) -> Float[Tensor, "M K"]:
    """Class scores by weighted k-NN: each of the k most similar training images votes exp(cosine / temperature).

    Source: Wu et al., CVPR 2018, §3.4; the settings of Caron et al. (DINO), ICCV 2021. Scores of an image are divided
    by their sum, which changes no ranking and keeps a small temperature from overflowing. `k` is capped at N.
    """
    train_x = nn.functional.normalize(train_x, dim=1)
    val_x = nn.functional.normalize(val_x, dim=1)
    k = min(k, len(train_x))
    scores = []
    for queries in val_x.split(max(1, _CHUNK_ELEMENTS // len(train_x))):
        similarity, neighbour = (queries @ train_x.T).topk(k, dim=1)
        votes = torch.softmax(similarity / temperature, dim=1)
        scores.append(votes.new_zeros(len(queries), num_classes).scatter_add_(1, train_y[neighbour], votes))
    return torch.cat(scores)


def linear_probe(
    train_x: Float[Tensor, "N C"],
    train_y: Int64[Tensor, " N"],
    val_x: Float[Tensor, "M C"],
    num_classes: int,
    l2: float,
    max_iter: int,
) -> Float[Tensor, "M K"]:
    """Logits of multinomial logistic regression, fitted by L-BFGS on the full batch, in float64.

    Minimises mean cross-entropy + l2 / 2 x |W|² over weights and biases (biases have no penalty), from zero, on
    features standardised by the training set's mean and deviation. The problem is convex, so the result depends on
    the data alone. The penalty is scikit-learn's with C = 1 / (N l2).
    """
    train_x, val_x = train_x.double(), val_x.double()
    mean, std = train_x.mean(dim=0), train_x.std(dim=0, correction=0)
    std = torch.where(std > 1e-12 * (1.0 + mean.abs()), std, 1.0)  # a constant feature has no deviation to divide by
    train_x, val_x = (train_x - mean) / std, (val_x - mean) / std
    weight = train_x.new_zeros(num_classes, train_x.shape[1], requires_grad=True)
    bias = train_x.new_zeros(num_classes, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iter, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimiser.zero_grad()
        with torch.enable_grad():
            logits = nn.functional.linear(train_x, weight, bias)
            loss = nn.functional.cross_entropy(logits, train_y) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(objective)  # type: ignore[arg-type, unused-ignore]  # torch types closures as () -> float
    return nn.functional.linear(val_x, weight.detach(), bias.detach())


def top_k_accuracy(scores: Float[Tensor, "M K"], labels: Int64[Tensor, " M"], k: int) -> float:
    """Share of images with their label among the k best scores; 1.0 where there are at most k classes."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return float((best == labels[:, None]).any(dim=1).double().mean())
