"""The evaluator `throughput`: multiply-adds and parameters, what it writes, and its columns in a comparison."""

from pathlib import Path

import pytest
import torch

from tinymim.configs.sections.models import ModelConfig
from tinymim.models.vit import build_model, count_parameters
from tinymim.stages import evaluate
from tinymim.stages.compare import table_cells
from tinymim.stages.evaluation.throughput import multiply_adds
from tinymim.stages.pages.summary import read_runs
from tinymim.tests.models.test_tiny_vit import macs
from tinymim.tests.stages.test_evaluate import MODEL, recipe


def test_multiply_adds_of_a_vit_are_those_of_its_formula() -> None:
    model = build_model(ModelConfig.model_validate(MODEL), num_classes=10).eval()
    tokens, width, patches = 17, 24, 16
    block = tokens * (4 * width**2 + 8 * width**2) + 2 * tokens**2 * width  # qkv, proj, mlp; q k^T and its product
    expected = patches * width * 3 * 8 * 8 + 2 * block + 10 * width
    assert multiply_adds(model, torch.zeros(1, 3, 32, 32)) == expected


def test_multiply_adds_of_tiny_vit_are_those_that_reproduce_the_published() -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(name="tiny_vit_5m_224"), num_classes=1000).eval()
    expected = macs(model, 224)
    assert multiply_adds(model, torch.empty(1, 3, 224, 224, device="meta")) == expected


def test_a_run_needs_no_images_and_is_compared(drawn_shards: Path, tmp_path: Path) -> None:
    evaluators = [{"name": "throughput", "batch_size": 2, "passes": 2, "warmup_passes": 1, "precision": "bf16"}]
    wanted = recipe(drawn_shards, tmp_path / "run", train=None, val=None, evaluators=evaluators)
    result = evaluate.run(wanted)
    model = build_model(ModelConfig.model_validate(MODEL), num_classes=None)  # timm's classifier belongs to it
    assert result["params_m"] == count_parameters(model) / 1e6
    assert result["gmacs"] == pytest.approx(multiply_adds(model.eval(), torch.zeros(1, 3, 32, 32)) / 1e9)
    assert result["throughput_images_per_s"] > 0
    assert (result["throughput_batch_size"], result["throughput_precision"]) == (2, "bf16")
    assert result["throughput_device"] == "cpu, 1 threads"
    header, cells = table_cells(read_runs([tmp_path / "run"]))
    shown = dict(zip(header, cells, strict=True))
    assert {"images/s of a pass", "M params", "GMACs"} <= shown.keys()
    assert shown["M params"] == f"{result['params_m']:.2f}"
