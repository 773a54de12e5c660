"""The four spellings of `weights` lead to the same tensors wherever they are read, or to an error with the remedy."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

from tinymim.configs.errors import CheckpointError
from tinymim.configs.sections import ModelConfig
from tinymim.models.checkpoints import tensors_sha256, to_safetensors
from tinymim.models.classifier import build_classifier
from tinymim.models.files import HUB, RANDOM, weights_path
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.models.weights import build_pretrained, build_with_weights, load_weights, read_weights, stated

SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
CONFIG = ModelConfig(name="vit_tiny_patch16_224", **SIZES)


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **SIZES)


def test_a_file_and_a_hub_give_the_tensors_that_were_saved(model: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(to_safetensors(model.state_dict(), {"made_by": "a test"}))
    save_for_hf(model, str(tmp_path / "hub"), model_args=SIZES)
    hub = ModelConfig(name=f"local-dir:{tmp_path / 'hub'}", img_size=16)
    wanted = tensors_sha256(model.state_dict())
    for config, weights, metadata in ((CONFIG, str(path), {"made_by": "a test"}), (hub, HUB, {})):
        read = read_weights(config, weights)
        assert (tensors_sha256(read.tensors), read.metadata) == (wanted, metadata)
        assert tensors_sha256(build_with_weights(config, weights).state_dict()) == wanted
    assert read.origin == f"timm's '{hub.name}'" and read_weights(CONFIG, str(path)).origin == str(path)
    load_weights(build_with_weights(CONFIG, str(path)), str(path))


def test_a_packages_name_is_its_file() -> None:
    path = weights_path("package:demo-teacher")
    assert path.name == "demo-teacher.safetensors" and path.is_file()


@pytest.mark.parametrize(
    ("weights", "hint"),
    [("package:absent", "shipped weights: demo-teacher"), ("absent.pth", "'hub', or 'package:NAME'"), (RANDOM, "hub")],
)
def test_absent_weights_are_refused_with_what_there_is(weights: str, hint: str) -> None:
    for use in (lambda: read_weights(CONFIG, weights), lambda: build_with_weights(CONFIG, weights)):
        with pytest.raises(CheckpointError, match="does not exist") as caught:
            use()
        assert hint in str(caught.value.hint)


def test_a_name_without_hub_weights_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no pretrained weights"):
        build_pretrained(ModelConfig(name="vit_wee_patch16_reg1_gap_25"))


def test_only_hub_weights_state_their_pixels_and_licence() -> None:
    augreg = build_classifier(CONFIG.model_copy(update={"name": "vit_tiny_patch16_224.augreg_in21k"}), 5, "cls")
    for weights in ("a file", RANDOM):
        assert stated(augreg, weights) == (IMAGENET_MEAN, IMAGENET_STD, "unknown (local file)")
    assert stated(augreg, HUB) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "apache-2.0")
    assert stated(torch.nn.Linear(1, 1), HUB) == (IMAGENET_MEAN, IMAGENET_STD, "unknown")
