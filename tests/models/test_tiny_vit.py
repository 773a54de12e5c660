"""TinyViT: published sizes, biases that follow their weights, the 12-block scale, frozen batch norms."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from tinymim.configs.sections.models import ModelConfig
from tinymim.configs.sections.optim import LayerwiseOptimConfig, OptimConfig
from tinymim.models import backbone
from tinymim.models.student import StudentModel, build_student
from tinymim.models.vit import build_model, count_parameters
from tinymim.stages.training.optim import make_optimiser
from tinymim.tests.models.families import made


def macs(model: nn.Module, size: int) -> int:
    """Multiply-accumulates of convolutions, linear layers and attention, on the meta device."""
    found = 0

    def count(layer: Any, _args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal found
        if isinstance(layer, nn.Conv2d):
            found += out.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            found += out.numel() * layer.in_features
        else:  # scores and their product with the values, of every window
            views, tokens = _args[0].shape[:2]
            found += views * layer.num_heads * tokens**2 * (layer.key_dim + layer.val_dim)

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) or hasattr(layer, "attention_biases"):
            layer.register_forward_hook(count)
    model(torch.empty(1, 3, size, size, device="meta"))
    return found


@pytest.mark.parametrize(
    ("name", "size", "millions", "gmacs"),
    [
        ("tiny_vit_5m_224", 224, 5.4, 1.3),
        ("tiny_vit_11m_224", 224, 11.0, 2.0),
        ("tiny_vit_21m_224", 224, 21.2, 4.3),
        ("tiny_vit_21m_384", 384, 21.2, 13.8),
        ("tiny_vit_21m_512", 512, 21.3, 27.0),
    ],
)
def test_parameters_and_macs_are_the_published_ones(name: str, size: int, millions: float, gmacs: float) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(name=name, img_size=size), num_classes=1000).eval()
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.06)
    assert macs(model, size) / 1e9 == pytest.approx(gmacs, abs=0.05, rel=0.03)


def test_windows_of_the_recipe_make_the_model_of_a_larger_input() -> None:
    with torch.device("meta"):
        named = timm.create_model("tiny_vit_21m_384", num_classes=0).state_dict()
        args: dict[str, Any] = {"window_sizes": [12, 12, 24, 12]}
        own = build_model(ModelConfig(name="tiny_vit_21m_224", img_size=384, args=args)).state_dict()
    assert {name: each.shape for name, each in own.items()} == {name: each.shape for name, each in named.items()}


@torch.no_grad()
def test_biases_of_attention_follow_weights_that_change_in_eval_mode() -> None:
    """timm keeps those of the first pass until `train` is called."""
    model, images = made("tiny_vit"), torch.randn(2, 3, 64, 64)
    state = {name: torch.randn_like(each) if "biases" in name else each for name, each in model.state_dict().items()}
    before = model(images)
    model.load_state_dict(state)
    fresh = made("tiny_vit")
    fresh.load_state_dict(state)
    assert torch.equal(model(images), fresh(images)) and not torch.equal(model(images), before)


def test_layer_decay_counts_twelve_blocks() -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(name="tiny_vit_5m_224"), num_classes=10)
    optimiser = make_optimiser(model, LayerwiseOptimConfig(steps=1, layer_decay=0.8))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {names[id(each)]: group["lr_scale"] for group in optimiser.param_groups for each in group["params"]}
    assert scales.keys() == set(names.values())
    first = {  # the scale d^(11 - i) of block i, from 0; the stages have 2, 2, 6 and 2
        "patch_embed.conv1.conv.weight": 11,
        "stages.0.blocks.0.conv1.conv.weight": 11,
        "stages.0.blocks.1.conv1.conv.weight": 10,
        "stages.1.downsample.conv1.conv.weight": 10,  # the downsampling goes with the last block before it
        "stages.1.blocks.0.attn.qkv.weight": 9,
        "stages.2.downsample.conv1.conv.weight": 8,
        "stages.2.blocks.5.mlp.fc1.weight": 2,
        "stages.3.downsample.conv1.conv.weight": 2,
        "stages.3.blocks.1.attn.proj.weight": 0,
        "head.norm.weight": 0,
        "head.fc.weight": 0,
    }
    for name, below in first.items():
        assert scales[name] == pytest.approx(0.8**below), name
    free = {names[id(e)] for group in optimiser.param_groups if not group["weight_decay"] for e in group["params"]}
    assert {name for name in scales if "attention_biases" in name} <= free
    assert free == {n for n, each in model.named_parameters() if each.ndim <= 1 or "attention_biases" in n}


def test_layer_decay_of_a_swin_has_26_layers_and_a_downsampling_is_in_the_stage_it_ends() -> None:
    """SimMIM's and FastMIM's numbers: stem 0, block i + 1, a downsampling as the block before it, head 25."""
    with torch.device("meta"):
        model = build_model(ModelConfig(name="swin_base_patch4_window7_224"), num_classes=10)
    optimiser = make_optimiser(model, LayerwiseOptimConfig(steps=1, layer_decay=0.8, weight_decay=0.05))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    group_of = {names[id(each)]: group for group in optimiser.param_groups for each in group["params"]}
    assert group_of.keys() == set(names.values())
    numbers = {
        "patch_embed.proj.weight": 0,
        "layers.0.blocks.0.attn.qkv.weight": 1,
        "layers.1.downsample.reduction.weight": 2,
        "layers.1.blocks.1.mlp.fc1.weight": 4,
        "layers.2.downsample.norm.weight": 4,
        "layers.2.blocks.0.attn.qkv.weight": 5,
        "layers.3.downsample.reduction.weight": 22,
        "layers.3.blocks.1.mlp.fc2.bias": 24,
        "norm.weight": 25,
        "head.fc.weight": 25,
    }
    for name, number in numbers.items():
        assert group_of[name]["lr_scale"] == pytest.approx(0.8 ** (25 - number), rel=1e-12), name
    free = {name for name, group in group_of.items() if not group["weight_decay"]}
    assert free == {n for n, each in model.named_parameters() if each.ndim <= 1 or "relative_position_bias" in n}


def test_a_students_tables_of_relative_positions_do_not_decay() -> None:
    student = StudentModel(build_student(ModelConfig(name="tiny_vit_5m_224")), nn.Linear(320, 2))
    decayed = make_optimiser(student, OptimConfig(steps=1)).param_groups[0]["params"]
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    kept = {names[id(each)] for each in decayed}
    assert kept and not any("attention_biases" in name for name in kept)


def test_a_plain_vit_keeps_timms_groups() -> None:
    assert backbone.layers_below_head(made("vit")) is None
