"""The models of class distillation that timm lacks: their heads in float64, and their parameters."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from tinymim.configs.sections.models import ModelConfig
from tinymim.models.checkpoints import to_safetensors
from tinymim.models.classifier import build_classifier, load_classifier
from tinymim.models.distilled import HiddenDistilled, PooledDistilled
from tinymim.models.vit import build_vit
from tinymim.tests.stages.finetunes import MODEL
from tinymim.tests.stages.tiny import STATED

NAMES = {"tinymim_star_tiny_patch16_224": "cls", "mae_lite_distilled_tiny_patch16_224": "mean"}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_heads_read_what_the_papers_say(name: str) -> None:
    torch.manual_seed(0)
    model: Any = build_classifier(ModelConfig.model_validate(MODEL | {"name": name}), 5, NAMES[name]).double().eval()
    for head in (model.head, model.head_dist):
        nn.init.normal_(head.weight)
    tokens = model.forward_features(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    if isinstance(model, HiddenDistilled):
        read = [nn.functional.gelu(tokens[:, place] @ model.hidden.weight.T + model.hidden.bias) for place in (0, 1)]
        assert read[0].shape == (2, 1280) and model.dist_token.shape == (1, 1, 24)
    else:
        assert isinstance(model, PooledDistilled) and model.num_prefix_tokens == 1
        rows = [tokens[:, 1:].mean(1), tokens[:, 0]]
        read = [nn.functional.layer_norm(each, (24,), eps=1e-6) for each in rows]
    wanted = [each @ h.weight.T + h.bias for each, h in zip(read, (model.head, model.head_dist), strict=True)]
    torch.testing.assert_close(model.forward_head(tokens), (wanted[0] + wanted[1]) / 2, rtol=1e-12, atol=1e-12)
    model.set_distilled_training(True)
    model.train()
    for ours, theirs in zip(model.forward_head(tokens), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_t_star_has_the_published_parameters_without_its_heads() -> None:
    with torch.device("meta"):
        model = timm.create_model("tinymim_star_tiny_patch16_224", num_classes=0)
    assert sum(each.numel() for each in model.parameters()) == pytest.approx(5.8e6, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_a_vits_weights_fit_and_the_hidden_layer_is_not_near_zero(name: str, tmp_path: Any) -> None:
    vit, config = build_vit(ModelConfig.model_validate(MODEL)), ModelConfig.model_validate(MODEL | {"name": name})
    (tmp_path / "vit.safetensors").write_bytes(to_safetensors(vit.state_dict(), STATED))
    model = build_classifier(config, 10, NAMES[name])
    loaded = load_classifier(model, config, str(tmp_path / "vit.safetensors"))
    own = {"dist_token", "hidden.bias", "hidden.weight"} if NAMES[name] == "cls" else {"fc_norm.bias", "fc_norm.weight"}
    heads = {f"{head}.{part}" for head in ("head", "head_dist") for part in ("weight", "bias")}
    assert set(loaded.new) == own | heads
    assert all(p.std() > 0.01 for n, p in model.named_parameters() if n == "hidden.weight")
