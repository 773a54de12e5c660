"""Shared inputs of the target tests."""

from collections.abc import Callable

import pytest
import torch

from tinymim.targets.relations.qkv import QKV
from tinymim.tests.targets.contract import TargetKindContract

MakeQKV = Callable[..., QKV]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cases of a class that inherits the contract's suite."""
    if metafunc.cls is not None and issubclass(metafunc.cls, TargetKindContract):
        metafunc.cls().pytest_generate(metafunc)


@pytest.fixture
def make_qkv() -> MakeQKV:
    """Normal q, k, v of shape [B, H, T, D], the same for the same seed whatever the dtype."""

    def make(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> QKV:
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (scale * torch.randn(3, *shape, generator=generator, dtype=torch.float64)).to(dtype)
        return QKV(q, k, v)

    return make
