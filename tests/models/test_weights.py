"""The four spellings of `weights` lead to the same tensors wherever they are read, or to an error with the remedy."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

from tinymim.configs.errors import CheckpointError
from tinymim.configs.sections.models import HUB, ModelConfig
from tinymim.models.checkpoints import tensors_sha256, to_safetensors
from tinymim.models.files import RANDOM, weights_file
from tinymim.models.timm_folder import Pixels, Rgb
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, build_model
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
    path, _ = weights_file("package:demo-teacher")
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


# ---------------------------------------------------------------- mean and std of the pixels

HALF = (0.5, 0.5, 0.5)
UNKNOWN = "unknown (local file)"


def file_of(model: torch.nn.Module, tmp_path: Path, **metadata: str) -> str:
    (tmp_path / "w.safetensors").write_bytes(to_safetensors(model.state_dict(), metadata))
    return str(tmp_path / "w.safetensors")


def named(name: str) -> ModelConfig:
    return ModelConfig(name=name, img_size=224)


def pixels(config: ModelConfig, weights: str, **given: Any) -> tuple[Any, ...]:
    with torch.device("meta"):
        model = build_model(config)
    found = stated(model, config, weights, **given)
    return found.mean, found.std, found.license


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("vit_base_patch16_224.augreg_in21k", HALF, HALF),
        ("vit_base_patch16_224.mae", IMAGENET_MEAN, IMAGENET_STD),
        ("vit_base_patch16_siglip_224.webli", HALF, HALF),
        ("vit_small_patch16_dinov3.lvd1689m", IMAGENET_MEAN, IMAGENET_STD),
        ("vit_large_patch16_dinov3.sat493m", (0.43, 0.411, 0.296), (0.213, 0.156, 0.143)),
        (
            "vit_base_patch16_clip_224.openai",
            (0.48145466, 0.4578275, 0.40821073),
            (0.26862954, 0.26130258, 0.27577711),
        ),
        ("tiny_vit_5m_224.dist_in22k", IMAGENET_MEAN, IMAGENET_STD),
        ("vit_tiny_patch16_224", HALF, HALF),  # all of timm's weights for it have these
    ],
)
def test_a_file_is_normalised_as_its_timm_name_says(
    model: torch.nn.Module, tmp_path: Path, name: str, mean: Rgb, std: Rgb
) -> None:
    weights = file_of(model, tmp_path)
    assert pixels(named(name), weights) == (mean, std, UNKNOWN)
    assert pixels(named(name), weights, mean=(0.1, 0.2, 0.3)) == ((0.1, 0.2, 0.3), std, UNKNOWN)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (named("vit_base_patch16_224"), r"differ: mean \(0\.5, 0\.5, 0\.5\) of \.augreg(.|\n)*\(0\.485"),
        (CONFIG, "not those of timm's 'vit_tiny_patch16_224'"),
        (named("vit_small_patch16_36x1_224"), "a file alone"),
    ],
)
def test_where_it_cannot_be_known_it_must_be_given(
    model: torch.nn.Module, tmp_path: Path, config: ModelConfig, reason: str
) -> None:
    weights = file_of(model, tmp_path, made_by="somebody")
    for given in ({}, {"mean": HALF}):
        with pytest.raises(CheckpointError, match=f"mean and std of the pixels(.|\n)*{reason}") as caught:
            pixels(config, weights, **given)
        assert "mean=[0.485" in str(caught.value.hint)
    assert pixels(config, weights, mean=HALF, std=IMAGENET_STD) == (HALF, IMAGENET_STD, UNKNOWN)


def test_our_own_files_state_it(model: torch.nn.Module, tmp_path: Path) -> None:
    own = Pixels((0.1, 0.2, 0.3), HALF)
    tagged = CONFIG.model_copy(update={"name": "vit_tiny_patch16_224.augreg_in21k"})
    for config in (CONFIG, tagged):
        assert pixels(config, file_of(model, tmp_path, **own.metadata())) == ((0.1, 0.2, 0.3), HALF, UNKNOWN)
        for command in ("pretrain-mae", "train-student"):  # files from before the statement
            old = file_of(model, tmp_path, made_by=f"tinymim {command}")
            assert pixels(config, old) == (IMAGENET_MEAN, IMAGENET_STD, UNKNOWN)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"mean": [1, 2], "std": [1, 1]}', '{"mean": [1e999, 0, 0], "std": 3}']
)
def test_a_statement_that_is_none_does_not_count(model: torch.nn.Module, tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match="mean and std"):
        pixels(CONFIG, file_of(model, tmp_path, pixels=text))


def test_hub_weights_and_new_ones(model: torch.nn.Module) -> None:
    augreg = CONFIG.model_copy(update={"name": "vit_tiny_patch16_224.augreg_in21k"})
    assert pixels(augreg, HUB) == (HALF, HALF, "apache-2.0")
    assert pixels(augreg, RANDOM) == (IMAGENET_MEAN, IMAGENET_STD, UNKNOWN)
