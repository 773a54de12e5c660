"""Damaged files of weights end in a CheckpointError, or load; never in another error."""

import io
import random
from pathlib import Path

import pytest
import torch

from tinymim.configs.sections.models import ModelConfig
from tinymim.models.checkpoints import to_safetensors
from tinymim.models.vit import build_vit
from tinymim.models.weights import load_weights
from tinymim.tests.fuzz.damage import damaged, outcomes

TINY = ModelConfig(name="vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2)


@pytest.mark.parametrize(
    "count",
    [500, pytest.param(40_000, marks=pytest.mark.slow)],  # slow: half a minute, for rare combinations
)
@pytest.mark.parametrize("kind", ["safetensors", "pth", "legacy pth"])
def test_damaged_weights_are_refused_or_load(kind: str, count: int, tmp_path: Path) -> None:
    model = build_vit(TINY)
    buffer = io.BytesIO()
    if kind == "safetensors":
        buffer.write(to_safetensors(model.state_dict(), {"recipe": "stage: pretrain-mae\nmodel: {num_heads: 2}"}))
    else:
        content = {"model": model.state_dict(), "metadata": {"a": "b"}, "args": None}
        torch.save(content, buffer, _use_new_zipfile_serialization=kind == "pth")
    whole, rng = buffer.getvalue(), random.Random(0)

    def read(number: int) -> str:
        path = tmp_path / ("w.safetensors" if number % 2 else "w.pth")
        path.write_bytes(damaged(whole, rng))
        load_weights(model, str(path))
        return "loads"

    found = outcomes(read, count)
    print(f"{kind}: {sum(found.values()):,} damaged files: {dict(found)}")
    assert found["CheckpointError"] > count / 2
