"""Shared inputs of the target tests."""

from collections.abc import Callable

import pytest
import torch

from tinymim.targets.relations.qkv import QKV

MakeQKV = Callable[..., QKV]


@pytest.fixture
def make_qkv() -> MakeQKV:
    """Normal q, k, v of shape [B, H, T, D], the same for the same seed whatever the dtype."""

    def make(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> QKV:
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (scale * torch.randn(3, *shape, generator=generator, dtype=torch.float64)).to(dtype)
        return QKV(q, k, v)

    return make
