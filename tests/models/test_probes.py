"""Probes against brute force and against the optimality conditions; features against timm's own forward."""

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from tinymim.configs.errors import RecipeError
from tinymim.models import probes
from tinymim.models.probes import knn_predict, linear_probe, pooled_features, top_k_accuracy


def clouds(num: int, classes: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """float64 [num, 6] around one centre per class, and the classes [num]."""
    centres = torch.randn(classes, 6, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    labels = torch.arange(num) % classes
    noise = torch.randn(num, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return centres[labels] + spread * noise, labels


# ---- k-NN


@pytest.mark.parametrize("k", [1, 5, 500])
@pytest.mark.parametrize("chunk", [2**24, 64])
def test_knn_is_the_formula(k: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_CHUNK_ELEMENTS", chunk)
    (train_x, train_y), (val_x, _) = clouds(60, 4, 1.0, 0), clouds(17, 4, 1.0, 1)
    found = knn_predict(train_x, train_y, val_x, 4, k, 0.07)
    for query, scores in zip(val_x, found, strict=True):
        votes = []
        for x, y in zip(train_x, train_y, strict=True):
            cosine = float(query @ x) / math.sqrt(float(query @ query) * float(x @ x))
            votes.append((cosine, int(y)))
        expected = torch.zeros(4, dtype=torch.float64)
        for cosine, y in sorted(votes, reverse=True)[:k]:
            expected[y] += math.exp(cosine / 0.07)
        torch.testing.assert_close(scores, expected / expected.sum())


def test_knn_small_temperature_does_not_overflow() -> None:
    train_x, train_y = clouds(40, 4, 0.1, 0)
    scores = knn_predict(train_x.float(), train_y, train_x.float(), 4, 10, 1e-4)
    assert scores.isfinite().all() and top_k_accuracy(scores, train_y, 1) == 1.0


def test_knn_does_not_see_the_length_of_a_feature() -> None:
    (train_x, train_y), (val_x, _) = clouds(60, 4, 1.0, 0), clouds(17, 4, 1.0, 1)
    scale = torch.linspace(0.1, 9.0, 60, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        knn_predict(train_x * scale, train_y, 3 * val_x, 4, 5, 0.07), knn_predict(train_x, train_y, val_x, 4, 5, 0.07)
    )


# ---- linear probe


def test_linear_probe_separates_what_is_separable() -> None:
    (train_x, train_y), (val_x, val_y) = clouds(200, 5, 0.2, 0), clouds(100, 5, 0.2, 1)
    logits = linear_probe(train_x.float(), train_y, val_x.float(), 5, 1e-3, 200)
    assert top_k_accuracy(logits, val_y, 1) == 1.0


@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_linear_probe_is_the_minimum(l2: float) -> None:
    """Newton's method on the same objective, in its own parametrisation, reaches the same logits."""
    (train_x, train_y), (val_x, _) = clouds(150, 4, 1.5, 0), clouds(40, 4, 1.5, 1)
    found = linear_probe(train_x, train_y, val_x, 4, l2, 500)

    mean, std = train_x.mean(0), train_x.std(0, correction=0)
    inputs = torch.cat([(train_x - mean) / std, torch.ones(150, 1, dtype=torch.float64)], dim=1)
    free = torch.ones(4, 7, dtype=torch.float64)
    free[:, -1] = 0.0  # no penalty on the bias

    def objective(flat: Tensor) -> Tensor:
        theta = flat.view(4, 7)
        return F.cross_entropy(inputs @ theta.T, train_y) + 0.5 * l2 * (theta * free).square().sum()

    flat = torch.zeros(28, dtype=torch.float64)
    for _ in range(30):
        hessian = torch.autograd.functional.hessian(objective, flat)
        gradient = torch.autograd.functional.jacobian(objective, flat)
        flat = flat - torch.linalg.lstsq(hessian, gradient[:, None], driver="gelsd").solution[:, 0]
    assert torch.autograd.functional.jacobian(objective, flat).abs().max() < 1e-12
    theta = flat.view(4, 7)
    expected = (val_x - mean) / std @ theta[:, :-1].T + theta[:, -1]
    # Logits are known up to a common shift of all biases.
    torch.testing.assert_close(found.log_softmax(1), expected.log_softmax(1), atol=1e-4, rtol=0.0)


def test_linear_probe_is_deterministic_and_blind_to_shift_and_scale() -> None:
    (train_x, train_y), (val_x, _) = clouds(90, 3, 1.0, 0), clouds(20, 3, 1.0, 1)
    first = linear_probe(train_x, train_y, val_x, 3, 1e-2, 300)
    assert torch.equal(first, linear_probe(train_x, train_y, val_x, 3, 1e-2, 300))
    moved = linear_probe(train_x * 7 - 3, train_y, val_x * 7 - 3, 3, 1e-2, 300)
    torch.testing.assert_close(moved, first, atol=1e-4, rtol=0.0)


def test_linear_probe_bears_a_constant_feature_and_no_grad() -> None:
    train_x, train_y = clouds(60, 3, 0.2, 0)
    train_x[:, 2] = 5.0
    with torch.no_grad():
        logits = linear_probe(train_x, train_y, train_x, 3, 1e-3, 100)
    assert logits.isfinite().all() and top_k_accuracy(logits, train_y, 1) == 1.0


def test_top_k_accuracy() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.9, 0.06, 0.04]])
    labels = torch.tensor([2, 0, 0, 2])
    assert [top_k_accuracy(scores, labels, k) for k in (1, 2, 3, 5)] == [0.25, 0.5, 1.0, 1.0]


# ---- features


def tiny(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 12,
        "depth": 3,
        "num_heads": 2,
        "num_classes": 0,
    }
    return timm.create_model("vit_tiny_patch16_224", **(sizes | options)).eval()


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
@torch.no_grad()
def test_mean_skips_the_prefix_tokens(options: dict[str, Any]) -> None:
    model, images = tiny(**options), torch.randn(2, 3, 16, 16)
    tokens = model.forward_features(images)
    assert tokens.shape[1] - model.num_prefix_tokens == 4
    torch.testing.assert_close(pooled_features(model, images, None, "mean"), tokens[:, -4:].mean(1))


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}])
@torch.no_grad()
def test_a_block_gives_its_tokens_without_the_models_norm(options: dict[str, Any]) -> None:
    model, images = tiny(**options), torch.randn(2, 3, 16, 16)
    seen: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    later: list[Tensor] = []
    model.blocks[2].register_forward_hook(lambda _m, _i, out: later.append(out))
    found = {pool: pooled_features(model, images, 2, pool) for pool in ("mean", "cls")}
    assert later == []  # nothing behind the block is computed
    tokens = F.layer_norm(seen[0], (12,))
    torch.testing.assert_close(found["cls"], tokens[:, 0])
    torch.testing.assert_close(found["mean"], tokens[:, -4:].mean(1))


def test_blocks_and_tokens_that_are_not_there() -> None:
    images = torch.randn(1, 3, 16, 16)
    for block in (4, 99):
        with pytest.raises(RecipeError, match="block is outside the model"):
            pooled_features(tiny(), images, block, "mean")
    bare = tiny(class_token=False, global_pool="avg")
    with pytest.raises(RecipeError, match="class token"):
        pooled_features(bare, images, None, "cls")
    registers = tiny(class_token=False, global_pool="avg", reg_tokens=1)
    with pytest.raises(RecipeError, match="class token"):
        pooled_features(registers, images, None, "cls")
