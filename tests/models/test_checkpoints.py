"""Weights in and out: what is loaded, what is dropped, what is refused."""

import argparse
import errno
import pickle
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer

from tinymim.configs.errors import CheckpointError
from tinymim.configs.sections.decoders import MaeConfig
from tinymim.configs.sections.models import ModelConfig
from tinymim.models.checkpoints import load_tensors, read_checkpoint, read_metadata, tensors_sha256, to_safetensors
from tinymim.models.mim import masked_autoencoder
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
    model = masked_autoencoder(vit(1), 32, MaeConfig(decoder_dim=8, decoder_heads=2))
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
    with pytest.raises(CheckpointError, match=r"no tensors by name(.|\n)*got: a list"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize("keys", [{1: torch.zeros(1)}, {"a": torch.zeros(1), 2: torch.zeros(1)}, {}, {"epoch": 3}])
@pytest.mark.parametrize("under", [None, "model"])
def test_keys_that_are_no_names_and_no_tensors_are_refused(
    tmp_path: Path, keys: dict[Any, Any], under: str | None
) -> None:
    torch.save({under: keys} if under else keys, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="no tensors by name"):
        load_weights(vit(), str(tmp_path / "w.pth"))


def test_a_file_of_several_models_names_them_and_one_can_be_taken(tmp_path: Path) -> None:
    """DINO's layout: the keys of each model have a prefix, and heads beside the backbone."""
    models = {}
    for seed, name in enumerate(("student", "teacher")):
        tensors = {f"module.backbone.{key}": tensor for key, tensor in vit(seed).state_dict().items()}
        models[name] = tensors | {"module.head.mlp.0.weight": torch.zeros(3)}
    content = models | {"epoch": 3, "args": argparse.Namespace(output_dir=PurePosixPath("out"))}
    torch.save(content, tmp_path / "dino.pth")
    target = vit(2)
    with pytest.raises(CheckpointError) as caught:
        load_weights(target, str(tmp_path / "dino.pth"))
    count = len(models["teacher"])
    assert str(caught.value.got) == f"keys 'student' ({count} tensors), 'teacher' ({count} tensors), 'epoch', 'args'"
    assert caught.value.hint == f"name one of them after #: weights={tmp_path / 'dino.pth'}#teacher"
    load_weights(target, f"{tmp_path / 'dino.pth'}#teacher")
    assert same(target, vit(1))
    with pytest.raises(CheckpointError, match="under nobody"):
        load_weights(target, f"{tmp_path / 'dino.pth'}#nobody")


def test_a_name_with_a_hash_is_a_file_where_there_is_one(tmp_path: Path) -> None:
    weights, target = save(tmp_path / "w.pth#teacher", vit(1)), vit(2)
    load_weights(target, weights)
    assert same(target, vit(1))
    with pytest.raises(CheckpointError, match="one model"):
        load_weights(target, f"{weights}#teacher")


@pytest.mark.parametrize("name", ["PosixPath", "WindowsPath", "PurePosixPath"])
@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_among_the_arguments_of_a_training_loop_are_read_as_data(tmp_path: Path, module: str, name: str) -> None:
    """MAE's launcher saves `args.output_dir` as a path; the module's name depends on the version of Python."""
    pickled = argparse.Namespace(output_dir=PurePosixPath("jobs", "3"))
    torch.save({"model": vit(1).state_dict(), "args": pickled}, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(tmp_path / "w.pth", "w") as renamed:
        for entry in whole.namelist():
            data = whole.read(entry)
            for old in ("pathlib._local", "pathlib"):
                data = data.replace(f"c{old}\nPurePosixPath\n".encode(), f"c{module}\n{name}\n".encode())
            renamed.writestr(entry, data)
    target = vit(2)
    load_weights(target, str(tmp_path / "w.pth"))
    assert same(target, vit(1))


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64, torch.uint8])
def test_weights_that_are_no_real_numbers_are_refused(tmp_path: Path, kind: torch.dtype) -> None:
    tensors = vit(1).state_dict()
    name = "blocks.1.mlp.fc1.weight"
    torch.save(tensors | {name: tensors[name].to(kind)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=f"{name} {str(kind)[6:]} for float32"):
        load_weights(vit(), str(tmp_path / "w.pth"))


def test_a_sparse_tensor_is_refused(tmp_path: Path) -> None:
    tensors = vit(1).state_dict()
    torch.save(tensors | {"norm.bias": tensors["norm.bias"].to_sparse()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"norm\.bias float32, not dense, for float32"):
        load_weights(vit(), str(tmp_path / "w.pth"))


def test_whole_numbers_of_a_model_stay_whole(tmp_path: Path) -> None:
    """Swin's table of relative positions, for one, is no weight."""
    source = torch.nn.BatchNorm1d(2)
    source.num_batches_tracked = torch.tensor(2**53 + 1)
    target = torch.nn.BatchNorm1d(2)
    load_tensors(target, source.state_dict(), "here")
    assert int(target.num_batches_tracked) == 2**53 + 1  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [32, 48])
def test_a_table_without_a_row_for_the_class_token_is_as_one_with_zeros(tmp_path: Path, size: int) -> None:
    """DeiT III adds positions to the patches only."""
    source, target = vit(1), vit(2, img_size=size)
    assert source.pos_embed is not None
    torch.nn.init.normal_(source.pos_embed)
    with torch.no_grad():
        source.pos_embed[:, :1] = 0
    tensors = source.state_dict()
    torch.save(tensors | {"pos_embed": tensors["pos_embed"][:, 1:]}, tmp_path / "deit3.pth")
    load_weights(target, str(tmp_path / "deit3.pth"))
    wanted = vit(3, img_size=size)
    load_weights(wanted, save(tmp_path / "w.safetensors", source))
    assert same(target, wanted)


@pytest.mark.parametrize("shape", [(1, 15, 16), (1, 17, 99), (2, 26, 16), (26, 16), (1, 0, 16), (1,), ()])
def test_a_table_of_another_form_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    torch.save(vit(1).state_dict() | {"pos_embed": torch.zeros(shape)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="other shape or type: pos_embed"):
        load_weights(vit(), str(tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w"])
def test_the_content_decides_and_not_the_suffix(tmp_path: Path, name: str) -> None:
    target = vit(2)
    load_weights(target, save(tmp_path / name, vit(1), made_by="a test"))
    assert same(target, vit(1)) and read_metadata(tmp_path / name) == {"made_by": "a test"}
    torch.save({"model": vit(3).state_dict(), "metadata": {"a": "b", 1: "c"}}, tmp_path / "t.safetensors")
    load_weights(target, str(tmp_path / "t.safetensors"))
    assert same(target, vit(3)) and read_metadata(tmp_path / "t.safetensors") == {"a": "b"}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_file_that_must_not_be_read_says_so(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    save(tmp_path / name, vit())
    monkeypatch.setattr("builtins.open", refuse)  # root reads everything
    with pytest.raises(CheckpointError, match=r"cannot be read(.|\n)*Permission denied"):
        load_weights(vit(), str(tmp_path / name))


@pytest.mark.parametrize(("weights", "words"), [("nowhere.pth", "hub"), ("package:nothing", "shipped weights")])
def test_weights_that_are_not_there_come_with_a_hint(weights: str, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_weights(vit(), weights)
    assert words in str(caught.value.hint)
