"""The folder for timm: every kind of model comes back with its function and its input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tinymim.configs.sections.models import ModelConfig
from tinymim.models import backbone
from tinymim.models.checkpoints import to_safetensors
from tinymim.models.classifier import build_classifier
from tinymim.models.timm_folder import Pixels, crop_of, timm_config
from tinymim.models.vit import build_vit
from tinymim.pipeline.decode import render
from tinymim.pipeline.views import CentreView
from tinymim.stages.run.folder import write_weights

SIZES: dict[str, Any] = {"img_size": 48, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 4}
CONFIG = ModelConfig(name="vit_tiny_patch16_224.augreg_in21k", **SIZES)
PIXELS = Pixels((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9)


def loaded(path: Path, model: nn.Module, config: dict[str, Any], **arguments: Any) -> Any:
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    write_weights(path / "mine.safetensors", to_safetensors(model.state_dict(), {}), config)
    assert (path / "mine.safetensors").read_bytes() == (path / "mine" / "model.safetensors").read_bytes()
    return timm.create_model(f"local-dir:{path / 'mine'}", pretrained=True, **arguments).eval()


@pytest.mark.parametrize("pool", [None, "mean", "cls"])
def test_a_model_comes_back_with_its_function_and_its_input(tmp_path: Path, pool: str | None) -> None:
    classes = ["ant", "bee", "cat"]
    model = build_classifier(CONFIG, 3, pool).eval() if pool else build_vit(CONFIG).eval()
    config = timm_config(model, CONFIG, PIXELS, pool, classes if pool else ())
    again = loaded(tmp_path, model, config)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    assert again.num_classes == (3 if pool else 0) and backbone.heads(again) == 4
    assert timm.data.resolve_model_data_config(again) == {
        "input_size": (3, 48, 48), "interpolation": "bilinear", "crop_pct": 0.9, "crop_mode": "center",
        "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
    }  # fmt: skip
    assert again.pretrained_cfg.get("label_names") == (classes if pool else None)


def test_another_head_can_be_put_on(tmp_path: Path) -> None:
    model = build_vit(CONFIG)
    again = loaded(tmp_path, model, timm_config(model, CONFIG, PIXELS), num_classes=7)
    assert again(torch.zeros(1, 3, 48, 48)).shape == (1, 7)
    assert torch.equal(again.pos_embed, model.pos_embed)  # type: ignore[arg-type]


def test_a_model_from_a_folder_is_written_again_with_its_sizes(tmp_path: Path) -> None:
    first = build_vit(CONFIG)
    loaded(tmp_path, first, timm_config(first, CONFIG, PIXELS))
    config = ModelConfig(name=f"local-dir:{tmp_path / 'mine'}", img_size=48)
    second = build_vit(config)
    (tmp_path / "next").mkdir()
    again = loaded(tmp_path / "next", second, json.loads(json.dumps(timm_config(second, config, PIXELS))))
    assert backbone.heads(again) == 4 and backbone.grid(again) == (6, 6)


def test_a_squeezed_validation_is_timms_squash(tmp_path: Path) -> None:
    """Pixel by pixel, of an image twice as wide as high; timm rounds to whole levels, as our decoder does."""
    model, pixels = build_vit(CONFIG), replace(PIXELS, crop_pct=crop_of("squeeze")[0], squeezed=crop_of("squeeze")[1])
    again = loaded(tmp_path, model, timm_config(model, CONFIG, pixels))
    settings = timm.data.resolve_model_data_config(again)
    assert (settings["crop_mode"], settings["crop_pct"]) == ("squash", 1.0)
    transform = timm.data.create_transform(**settings | {"interpolation": "bicubic"}, normalize=False)
    image = torch.randint(0, 256, (3, 90, 180), dtype=torch.uint8)
    theirs = transform(Image.fromarray(image.permute(1, 2, 0).numpy()))
    ours = render(image, CentreView(48, "squeeze")("key", 0, 90, 180), 48, "bicubic")
    assert (ours.double() - theirs.double()).abs().max() <= 1
