"""Weights in and out: what is loaded, what is dropped, what is refused."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer

from tinymim.configs.errors import CheckpointError
from tinymim.configs.sections import MaeConfig, ModelConfig
from tinymim.models.checkpoints import read_checkpoint, read_metadata, tensors_sha256, to_safetensors
from tinymim.models.mae import MaskedAutoencoder
from tinymim.models.vit import build_vit
from tinymim.models.weights import load_weights
from tinymim.tests import official


def vit(seed: int = 0, **sizes: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    fields = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2} | sizes
    return build_vit(ModelConfig.model_validate(fields))


def save(path: Path, model: torch.nn.Module, **metadata: str) -> str:
    path.write_bytes(to_safetensors(model.state_dict(), metadata))
    return str(path)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------- what is loaded


def test_safetensors_come_back_to_the_bit_with_their_metadata(tmp_path: Path) -> None:
    source, target = vit(1), vit(2)
    assert not same(source, target)
    weights = save(tmp_path / "w.safetensors", source, made_by="a test", b="2", a="1")
    loaded = load_weights(target, weights)
    assert same(source, target)
    assert loaded.dropped == () and loaded.sha256 == tensors_sha256(source.state_dict())
    assert read_metadata(tmp_path / "w.safetensors") == {"made_by": "a test", "a": "1", "b": "2"}


def test_the_bytes_of_a_file_are_a_function_of_its_content() -> None:
    tensors = vit().state_dict()
    names = {f"field{i}": str(i) for i in range(20)}
    assert to_safetensors(tensors, names) == to_safetensors(tensors, dict(reversed(names.items())))


def test_half_precision_is_stored_and_read_back_as_fp32(tmp_path: Path) -> None:
    source, target = vit(1), vit(2)
    whole, half = to_safetensors(source.state_dict(), {}), to_safetensors(source.state_dict(), {}, half=True)
    assert len(half) < 0.6 * len(whole)
    (tmp_path / "h.safetensors").write_bytes(half)
    load_weights(target, str(tmp_path / "h.safetensors"))
    assert same(source.half().float(), target)


def test_the_official_mae_layout_loads_and_says_what_it_dropped(tmp_path: Path) -> None:
    model = MaskedAutoencoder(vit(1), MaeConfig(decoder_dim=8, decoder_heads=2))
    own = {k: v for k, v in model.encoder.state_dict().items()}
    decoder = {k: v for k, v in model.state_dict().items() if not k.startswith(("encoder.", "position"))}
    official = own | decoder | {"decoder_pos_embed": torch.zeros(1, 17, 8)}
    torch.save({"model": official, "epoch": 799, "args": None}, tmp_path / "mae_pretrain.pth")
    target = vit(2)
    loaded = load_weights(target, str(tmp_path / "mae_pretrain.pth"))
    assert same(model.encoder, target)
    assert set(loaded.dropped) == {*decoder, "decoder_pos_embed"}
    assert "mask_token" in loaded.dropped


def test_a_checkpoint_of_their_training_loop_loads(tmp_path: Path) -> None:
    """TinyMIM's checkpoint-299.pth holds the optimiser's state and the command line, an argparse.Namespace."""
    tensors = official.layout(16, 2)
    target = vit(2)
    loaded = load_weights(target, str(official.write_training(tmp_path / "checkpoint-299.pth", tensors)))
    assert loaded.dropped == () and loaded.sha256 == tensors_sha256(tensors)


def test_a_model_fine_tuned_with_mean_pooling_can_be_a_teacher_only(tmp_path: Path) -> None:
    """Its norm stands behind the pool: a cut teacher needs none, features of an encoder do."""
    tensors = official.layout(16, 2)
    weights = str(official.write_training(tmp_path / "checkpoint-99.pth", official.fine_tuned(tensors)))
    with pytest.raises(CheckpointError, match=r"missing: norm\.bias, norm\.weight;(.|\n)*hint: .*mean pooling"):
        load_weights(vit(2), weights)
    target = vit(2)
    loaded = load_weights(target, weights, unread=("norm.",))
    assert loaded.dropped == ("fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight")
    assert all(torch.equal(target.state_dict()[name], tensor) for name, tensor in tensors.items() if name[:4] != "norm")


@pytest.mark.parametrize("prefix", ["module.", "encoder.", "module.encoder."])
@pytest.mark.parametrize("under", ["model", "state_dict", None])
def test_prefixes_and_wrappers_are_taken_off(tmp_path: Path, prefix: str, under: str | None) -> None:
    source, target = vit(1), vit(2)
    tensors = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    torch.save({under: tensors} if under else tensors, tmp_path / "w.pt")
    load_weights(target, str(tmp_path / "w.pt"))
    assert same(source, target)


def test_a_position_table_of_another_grid_is_resampled(tmp_path: Path) -> None:
    source, target = vit(1, img_size=32), vit(2, img_size=48)
    assert source.pos_embed is not None and target.pos_embed is not None
    torch.nn.init.normal_(source.pos_embed)
    load_weights(target, save(tmp_path / "w.safetensors", source))
    expected = resample_abs_pos_embed(source.pos_embed.data, [6, 6], num_prefix_tokens=1)
    torch.testing.assert_close(target.pos_embed.data, expected)
    assert torch.equal(target.pos_embed.data[:, :1], source.pos_embed.data[:, :1])
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(target.get_parameter(name), source.get_parameter(name))


def test_the_digest_is_of_values_names_shapes_and_kinds() -> None:
    base = {"a": torch.arange(4.0), "b": torch.zeros(2)}
    others = [
        {"a": torch.arange(4.0), "c": torch.zeros(2)},
        {"a": torch.arange(4.0).reshape(2, 2), "b": torch.zeros(2)},
        {"a": torch.arange(4.0).double(), "b": torch.zeros(2)},
        {"a": torch.arange(4.0), "b": -torch.zeros(2)},
    ]
    digests = {tensors_sha256(tensors) for tensors in (base, *others)}
    assert len(digests) == 5
    assert tensors_sha256(dict(reversed(base.items()))) == tensors_sha256(base)


# ---------------------------------------------------------------- what is refused


def test_every_tensor_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    source = vit(1).state_dict()
    del source["norm.weight"]
    source["extra.weight"] = torch.zeros(1)
    source["cls_token"] = torch.zeros(1, 1, 99)
    (tmp_path / "w.safetensors").write_bytes(to_safetensors(source, {}))
    target = vit(2)
    before = tensors_sha256(target.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load_weights(target, str(tmp_path / "w.safetensors"))
    got = str(caught.value.got)
    assert "missing: norm.weight" in got and "unexpected: extra.weight" in got and "cls_token (1, 1, 99)" in got
    assert tensors_sha256(target.state_dict()) == before


def test_a_deeper_models_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        load_weights(vit(), save(tmp_path / "w.safetensors", vit(depth=3)))


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    content = {"model": vit().state_dict(), "bomb": Bomb(tmp_path / "exploded")}
    if writer == "torch":
        torch.save(content, tmp_path / "w.pth")
    else:
        (tmp_path / "w.pth").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="plain tensors"):
        load_weights(vit(), str(tmp_path / "w.pth"))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("content", [b"no tensors here", None])
def test_files_that_are_no_checkpoint_or_cut_short_are_refused(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    if content is None:
        whole = tmp_path / "whole"
        if name.endswith(".pth"):
            torch.save(vit().state_dict(), whole)
        else:
            save(whole, vit())
        content = whole.read_bytes()[:-500]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(tmp_path / name)


def test_an_empty_pth_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").touch()
    with pytest.raises(CheckpointError, match=r"w\.pth"):
        read_checkpoint(tmp_path / "w.pth")


def test_a_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="no state dict"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize(("weights", "words"), [("nowhere.pth", "hub"), ("package:nothing", "shipped weights")])
def test_weights_that_are_not_there_come_with_a_hint(weights: str, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_weights(vit(), weights)
    assert words in str(caught.value.hint)
