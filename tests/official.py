"""The layout of MAE's and TinyMIM's own checkpoints, and what their models compute, by the papers' formulas in float64.

The layout: https://github.com/facebookresearch/mae and https://github.com/OliverRensu/TinyMIM, names and shapes only.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

Projections = tuple[Tensor, Tensor, Tensor]


def shapes(dim: int, depth: int, patch: int = 8, size: int = 32) -> dict[str, tuple[int, ...]]:
    """The tensors of an encoder."""
    found: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1 + (size // patch) ** 2, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
    }
    for number in range(depth):
        for name, shape in {
            "norm1.weight": (dim,),
            "norm1.bias": (dim,),
            "attn.qkv.weight": (3 * dim, dim),
            "attn.qkv.bias": (3 * dim,),
            "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,),
            "norm2.weight": (dim,),
            "norm2.bias": (dim,),
            "mlp.fc1.weight": (4 * dim, dim),
            "mlp.fc1.bias": (4 * dim,),
            "mlp.fc2.weight": (dim, 4 * dim),
            "mlp.fc2.bias": (dim,),
        }.items():
            found[f"blocks.{number}.{name}"] = shape
    return found | {"norm.weight": (dim,), "norm.bias": (dim,)}


def layout(dim: int, depth: int, seed: int = 0) -> dict[str, Tensor]:
    """An encoder of random weights for 32 px and patches of 8, float32."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]) or 1)
        for name, shape in shapes(dim, depth).items()
    }


def write_training(path: Path, tensors: dict[str, Tensor], epoch: int = 299) -> Path:
    """A checkpoint as their training loops write it: with the optimiser's state and the command line."""
    arguments = argparse.Namespace(
        batch_size=128, blr=1.5e-4, lr=None, model="tinymim_vit_tiny_patch16", distributed=True
    )
    optimiser = {"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    scaler = {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 7,
    }
    torch.save({"model": tensors, "optimizer": optimiser, "epoch": epoch, "scaler": scaler, "args": arguments}, path)
    return path


def fine_tuned(tensors: dict[str, Tensor], classes: int = 10) -> dict[str, Tensor]:
    """The same encoder after their fine-tuning with mean pooling: the norm stands behind the pool; there is a head."""
    dim = tensors["cls_token"].shape[-1]
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("norm.")}
    behind = {"fc_norm.weight": torch.ones(dim), "fc_norm.bias": torch.zeros(dim)}
    return kept | behind | {"head.weight": torch.zeros(classes, dim), "head.bias": torch.zeros(classes)}


def encode(tensors: dict[str, Tensor], images: Tensor, heads: Sequence[int]) -> tuple[Tensor, list[Projections]]:
    """A ViT as Dosovitskiy et al. (2021) define it, pre-norm, exact GELU, norms with eps 1e-6; all in float64.

    Args:
        tensors: by the names of `layout`.
        images: [B, 3, S, S], normalised.
        heads: of each block.

    Returns:
        Features behind the final norm [B, T, C]; q, k and v of every block, each [B, heads, T, C / heads].
    """
    weights = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / ((centred**2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    kernel = weights["patch_embed.proj.weight"]
    tiles = images.double().unfold(2, kernel.shape[2], kernel.shape[2]).unfold(3, kernel.shape[3], kernel.shape[3])
    patches = torch.einsum("bcyxpq,dcpq->byxd", tiles, kernel).flatten(1, 2) + weights["patch_embed.proj.bias"]
    x = torch.cat([weights["cls_token"].expand(len(images), -1, -1), patches], dim=1) + weights["pos_embed"]
    found: list[Projections] = []
    for number, count in enumerate(heads):
        block = f"blocks.{number}"
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x))
        q, k, v = (torch.stack(part.chunk(count, dim=-1), dim=1) for part in qkv.chunk(3, dim=-1))
        found.append((q, k, v))
        rows = relation(q, k)
        x = x + linear(f"{block}.attn.proj", torch.cat(list((rows @ v).unbind(1)), dim=-1))
        hidden = linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))
        x = x + linear(f"{block}.mlp.fc2", 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))
    return norm("norm", x), found


def relation(a: Tensor, b: Tensor) -> Tensor:
    """softmax(a bᵀ / √d) over the last axis, d the width of a head: [B, H, T, d] twice to [B, H, T, T]."""
    logits = torch.einsum("bhqd,bhtd->bhqt", a, b) / math.sqrt(a.shape[-1])
    powers = (logits - logits.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True)
