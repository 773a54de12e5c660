"""Weights in the layouts of other repositories mean what they mean there; what fits no layout is refused by name."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from tinymim.configs.errors import CheckpointError
from tinymim.configs.sections.models import ModelConfig
from tinymim.models.checkpoints import load_tensors
from tinymim.models.layouts import TIMM, rewritten
from tinymim.models.vit import build_model
from tinymim.models.weights import load_weights
from tinymim.tests.models.families import FAMILIES, made

Tensors = dict[str, Tensor]
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def drawn(family: str, **extra: Any) -> nn.Module:
    """A model whose every parameter is drawn, biases and scales too."""
    model = made(family, **extra)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    return model


def same(model: nn.Module, other: nn.Module, images: Tensor = IMAGES) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(images), other(images))


# ---------------------------------------------------------------- transformers


def vit_of_transformers(hidden: int, layers: int, prefix: str = "") -> Tensors:
    """The names and shapes of ViTModel, drawn."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, hidden),
        "embeddings.position_embeddings": (1, 17, hidden),
        "embeddings.patch_embeddings.projection.weight": (hidden, 3, 16, 16),
        "embeddings.patch_embeddings.projection.bias": (hidden,),
        "layernorm.weight": (hidden,),
        "layernorm.bias": (hidden,),
    }
    for number in range(layers):
        for part, (rows, columns) in {
            **{f"attention.attention.{side}": (hidden, hidden) for side in ("query", "key", "value")},
            "attention.output.dense": (hidden, hidden),
            "intermediate.dense": (4 * hidden, hidden),
            "output.dense": (hidden, 4 * hidden),
        }.items():
            shapes |= {f"encoder.layer.{number}.{part}.weight": (rows, columns)}
            shapes |= {f"encoder.layer.{number}.{part}.bias": (rows,)}
        for norm in ("layernorm_before", "layernorm_after"):
            shapes |= {f"encoder.layer.{number}.{norm}.{part}": (hidden,) for part in ("weight", "bias")}
    generator = torch.Generator().manual_seed(1)
    return {prefix + name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def tokens_of_transformers(w: Tensors, images: Tensor, heads: int, layers: int) -> Tensor:
    """ViTModel's `last_hidden_state`, from its tensors: q, k and v are three layers."""

    def layer(name: str, x: Tensor) -> Tensor:
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    projection = "embeddings.patch_embeddings.projection"
    patches = nn.functional.conv2d(images, w[f"{projection}.weight"], w[f"{projection}.bias"], stride=16)
    x = torch.cat([w["embeddings.cls_token"].expand(len(images), -1, -1), patches.flatten(2).mT], 1)
    x = x + w["embeddings.position_embeddings"]
    for number in range(layers):
        at = f"encoder.layer.{number}"
        normed = norm(f"{at}.layernorm_before", x)
        q, k, v = (
            layer(f"{at}.attention.attention.{side}", normed).unflatten(-1, (heads, -1)).transpose(1, 2)
            for side in ("query", "key", "value")
        )
        mixed = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + layer(f"{at}.attention.output.dense", mixed.transpose(1, 2).flatten(2))
        x = x + layer(f"{at}.output.dense", gelu(layer(f"{at}.intermediate.dense", norm(f"{at}.layernorm_after", x))))
    return norm("layernorm", x)


@pytest.mark.parametrize("prefix", ["", "vit.", "module.vit."])
@torch.no_grad()
def test_vits_of_transformers_give_their_own_tokens(prefix: str) -> None:
    plain, model = vit_of_transformers(24, 2), made("vit")
    beside = {"decoder.decoder_pred.weight": torch.zeros(2, 2), "pooler.dense.weight": torch.zeros(2, 2)}
    tensors = {prefix + name: each for name, each in plain.items()}
    loaded = load_tensors(model, tensors | (beside if prefix else {}), "here")
    assert loaded.layout == "transformers' ViT" and set(loaded.dropped) == (set(beside) if prefix else set())
    forward: Callable[[Tensor], Tensor] = model.forward_features  # type: ignore[assignment]
    torch.testing.assert_close(forward(IMAGES), tokens_of_transformers(plain, IMAGES, 3, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_read_together_and_their_layout_is_printed(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = vit_of_transformers(24, 2)
    half = sorted(tensors)[::2]
    parts = [{n: tensors[n] for n in half}, {n: each for n, each in tensors.items() if n not in half}]
    stem, index = {"safetensors": ("model", "model.safetensors"), "bin": ("pytorch_model", "pytorch_model.bin")}[suffix]
    names = [f"{stem}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, tmp_path / name) if suffix == "safetensors" else torch.save(part, tmp_path / name)
    where = {n: name for name, part in zip(names, parts, strict=True) for n in part}
    (tmp_path / f"{index}.index.json").write_text(json.dumps({"weight_map": where}))
    model, other = made("vit"), made("vit")
    with caplog.at_level("INFO", "tinymim"):
        load_weights(model, str(tmp_path))
    assert "read as transformers' ViT" in caplog.text
    load_tensors(other, tensors, "here")
    same(model, other)
    (tmp_path / f"{index}.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere"}}))
    with pytest.raises(CheckpointError, match="not an index of shards"):
        load_weights(model, str(tmp_path))


# ---------------------------------------------------------------- repositories


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "target_encoder.", "module.backbone.", "encoder."])
def test_wrappers_come_off_and_what_is_beside_them_is_named(prefix: str) -> None:
    source, target = drawn("vit"), made("vit")
    tensors = {prefix + name: each for name, each in source.state_dict().items()}
    if prefix:
        tensors |= {
            "projector.weight": torch.zeros(2),
            "decoder.0.weight": torch.zeros(2),
            "mask_token": torch.zeros(2),
        }
    loaded = load_tensors(target, tensors, "here")
    assert loaded.layout == TIMM
    assert set(loaded.dropped) == ({"projector.weight", "decoder.0.weight", "mask_token"} if prefix else set())
    same(source, target)


@torch.no_grad()
def test_dinov2_adds_the_position_of_the_class_token_before_the_registers() -> None:
    """Their forward: positions to class token and patches, then the registers between them; blocks in chunks."""
    source, images = drawn("dinov2"), torch.randn(2, 3, 56, 56)
    timm_vit: Any = source
    positions = 0.2 * torch.randn(1, 17, 24)
    tensors = {n: e for n, e in source.state_dict().items() if n not in ("pos_embed", "reg_token")}
    tensors = {re.sub(r"^blocks\.(\d)\.", r"blocks.0.\1.", name): each for name, each in tensors.items()}
    tensors |= {"pos_embed": positions, "register_tokens": timm_vit.reg_token, "mask_token": torch.zeros(1, 24)}
    cls, patches = timm_vit.cls_token.expand(2, -1, -1), timm_vit.patch_embed(images)
    tokens = torch.cat([cls, patches], 1) + positions
    tokens = torch.cat([tokens[:, :1], timm_vit.reg_token.expand(2, -1, -1), tokens[:, 1:]], 1)
    expected = timm_vit.norm(timm_vit.blocks(tokens))
    target: Any = made("dinov2")
    loaded = load_tensors(target, tensors, "here")
    assert loaded.layout == "DINOv2's repository" and loaded.dropped == ("mask_token",)
    torch.testing.assert_close(target.forward_features(images), expected)


def test_dinov3_names_registers_and_scales_in_its_own_way() -> None:
    source, target = drawn("dinov3"), made("dinov3")
    tensors = {
        re.sub(r"gamma_([12])", r"ls\1.gamma", name.replace("reg_token", "storage_tokens")): each
        for name, each in source.state_dict().items()
    }
    tensors |= {"rope_embed.periods": torch.zeros(2), "mask_token": torch.zeros(1, 24)}
    zeros = {f"blocks.{number}.attn.qkv.bias": torch.zeros(72) for number in range(2)}
    masks = {f"blocks.{number}.attn.qkv.bias_mask": torch.ones(72) for number in range(2)}
    loaded = load_tensors(target, tensors | zeros | masks, "here")
    assert loaded.layout == "DINOv3's repository"
    same(source, target)
    with pytest.raises(CheckpointError, match=r"DINOv3's repository(.|\n)*unexpected: blocks.0.attn.qkv.bias"):
        load_tensors(target, tensors | zeros | {"blocks.0.attn.qkv.bias": torch.ones(72)}, "here")


def test_beits_pre_training_shares_one_table() -> None:
    source, target = drawn("beit"), made("beit")
    tensors = source.state_dict()
    table = tensors["blocks.0.attn.relative_position_bias_table"]
    shared = {name: each for name, each in tensors.items() if "relative_position" not in name}
    shared |= {"rel_pos_bias.relative_position_bias_table": table, "lm_head.weight": torch.zeros(2, 24)}
    shared |= {"rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64)}
    source.load_state_dict(tensors | {"blocks.1.attn.relative_position_bias_table": table})
    loaded = load_tensors(target, shared, "here")
    assert loaded.layout == "BEiT's pre-training" and loaded.dropped == ("lm_head.weight",)
    same(source, target)


def test_swins_stages_end_with_the_downsampling() -> None:
    """SimMIM's file: a wrapped encoder, its decoder and mask token, and tables of indices."""
    source, target = drawn("swin"), made("swin")
    tensors = {
        "encoder."
        + re.sub(r"^layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name): each
        for name, each in source.state_dict().items()
    }
    assert "encoder.layers.0.downsample.reduction.weight" in tensors
    tensors |= {"encoder.mask_token": torch.zeros(1, 1, 12), "decoder.0.weight": torch.zeros(2)}
    tensors |= {"encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(4, 4, dtype=torch.int64)}
    loaded = load_tensors(target, tensors, "here")
    assert loaded.layout == "Swin's repository"
    assert set(loaded.dropped) >= {"decoder.0.weight", "mask_token", "layers.0.blocks.0.attn.relative_position_index"}
    same(source, target)


def test_tiny_vits_repository_has_other_names() -> None:
    source, target = drawn("tiny_vit", num_classes=5), made("tiny_vit", num_classes=5)
    named: Tensors = {}
    for name, each in source.state_dict().items():
        name = re.sub(r"^stages\.(\d)\.downsample", lambda found: f"stages.{int(found[1]) - 1}.downsample", name)
        name = re.sub(r"^stages\.", "layers.", name).replace(".conv.weight", ".c.weight")
        name = name.replace("patch_embed.conv1.", "patch_embed.seq.0.").replace(
            "patch_embed.conv2.", "patch_embed.seq.2."
        )
        named[name.replace("head.norm.", "norm_head.").replace("head.fc.", "head.")] = each
    assert {"patch_embed.seq.0.c.weight", "layers.0.downsample.conv1.c.weight", "head.weight"} <= named.keys()
    loaded = load_tensors(target, named, "here")
    assert loaded.layout == "TinyViT's repository" and loaded.dropped == ()
    same(source, target)


def test_names_of_no_layout_are_refused_with_what_does_not_fit() -> None:
    tensors = {name.replace("blocks.", "stuff."): each for name, each in drawn("vit").state_dict().items()}
    with pytest.raises(CheckpointError, match=r"missing: blocks.0(.|\n)*unexpected: stuff.0"):
        load_tensors(made("vit"), tensors, "here")


@pytest.mark.parametrize("family", FAMILIES)
def test_timms_own_names_stay_as_they_are(family: str) -> None:
    tensors = made(family, num_classes=5).state_dict()
    found = rewritten(made(family, num_classes=5), dict(tensors))
    assert (found.layout, found.dropped) == (TIMM, ())
    assert found.tensors.keys() == tensors.keys()


# ---------------------------------------------------------------- other sizes


@torch.no_grad()
def test_rotary_positions_need_nothing_of_a_file_at_another_size() -> None:
    small, config = drawn("dinov3"), FAMILIES["dinov3"].config().model_copy(update={"img_size": 96})
    large: Any = build_model(config).eval()
    loaded = load_tensors(large, small.state_dict(), "here")
    assert loaded.dropped == loaded.new == ()
    small.set_input_size(img_size=(96, 96)) if hasattr(small, "set_input_size") else None  # type: ignore[operator]
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(large(images), small(images))


def test_one_file_of_a_vit_is_read_at_any_size() -> None:
    """A teacher of 224 px at 128, and fine-tuned at 384."""
    source: Any = drawn("vit")
    for size, side in ((32, 2), (128, 8), (256, 16)):
        model: Any = build_model(ModelConfig.model_validate(FAMILIES["vit"].config().model_dump() | {"img_size": size}))
        load_tensors(model, source.state_dict(), "here")
        expected = resample_abs_pos_embed(source.pos_embed.data, [side, side], num_prefix_tokens=1)
        torch.testing.assert_close(model.pos_embed.data, expected)
