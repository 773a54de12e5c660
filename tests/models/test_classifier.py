"""What a fine-tuning starts from: all of an encoder, a new head, and never less than that without a word."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tinymim.configs.errors import CheckpointError, RecipeError
from tinymim.configs.sections.decoders import MaeConfig
from tinymim.configs.sections.models import ModelConfig
from tinymim.models.checkpoints import tensors_sha256, to_safetensors
from tinymim.models.classifier import build_classifier, load_classifier
from tinymim.models.mim import masked_autoencoder
from tinymim.models.timm_folder import timm_arguments
from tinymim.models.vit import build_model, build_vit
from tinymim.models.weights import load_weights

CONFIG = ModelConfig(name="vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
HEAD = ("head.bias", "head.weight")
FC_NORM = ("fc_norm.bias", "fc_norm.weight")


def classifier(num_classes: int = 5, pool: str = "mean", seed: int = 0, **sizes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build_classifier(CONFIG.model_copy(update=sizes), num_classes, pool)


def save(path: Path, module: nn.Module, **more: torch.Tensor) -> str:
    path.write_bytes(to_safetensors(module.state_dict() | more, {}))
    return str(path)


@pytest.fixture
def encoder(tmp_path: Path) -> tuple[nn.Module, str]:
    torch.manual_seed(7)
    module = build_vit(CONFIG)
    return module, save(tmp_path / "encoder.safetensors", module)


@pytest.mark.parametrize(
    ("pool", "new", "dropped"),
    [("mean", (*FC_NORM, *HEAD), ("norm.bias", "norm.weight")), ("cls", HEAD, ())],
)
def test_an_encoder_gets_a_new_head_and_all_else_is_its_own(
    encoder: tuple[nn.Module, str], pool: str, new: tuple[str, ...], dropped: tuple[str, ...]
) -> None:
    model = classifier(pool=pool)
    loaded = load_classifier(model, CONFIG, encoder[1])
    assert (loaded.new, loaded.dropped) == (new, dropped)
    ours, theirs = model.state_dict(), encoder[0].state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items() if name not in new)
    assert 0 < float(ours["head.weight"].abs().max()) < 1e-4 and not ours["head.bias"].any()
    assert all(parameter.requires_grad for parameter in model.parameters())  # the position embedding too


def test_the_official_mae_layout_is_an_encoder(tmp_path: Path) -> None:
    torch.manual_seed(7)
    mae = masked_autoencoder(build_vit(CONFIG), CONFIG.img_size, MaeConfig(decoder_dim=8, decoder_heads=2))
    own = {name.removeprefix("encoder."): tensor for name, tensor in mae.state_dict().items()}
    own["decoder_pos_embed"] = own.pop("position")  # as the official files call it
    torch.save({"model": own, "epoch": 3}, tmp_path / "mae.pth")
    model = classifier()
    loaded = load_classifier(model, CONFIG, str(tmp_path / "mae.pth"))
    assert loaded.new == (*FC_NORM, *HEAD) and "mask_token" in loaded.dropped
    assert torch.equal(model.state_dict()["blocks.1.attn.qkv.weight"], own["blocks.1.attn.qkv.weight"])


def test_a_head_of_as_many_classes_is_loaded_and_another_is_new(tmp_path: Path) -> None:
    before = classifier(seed=3)
    weights = save(tmp_path / "w.safetensors", before)
    again, wider = classifier(seed=4), classifier(num_classes=6, seed=4)
    assert load_classifier(again, CONFIG, weights).new == ()
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in again.state_dict().items())
    loaded = load_classifier(wider, CONFIG, weights)
    assert (loaded.new, loaded.dropped) == (HEAD, HEAD)


def test_a_file_that_does_not_fit_is_refused_with_its_keys(encoder: tuple[nn.Module, str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        load_classifier(classifier(), CONFIG, str(tmp_path / "nothing.safetensors"))
    assert "nothing.safetensors" in str(caught.value.got) and caught.value.hint
    model = classifier(depth=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"missing: blocks\.2\.attn\.proj\.bias, .* and 6 more; unexpected: none"):
        load_classifier(model, CONFIG, encoder[1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"unexpected: blocks\.1\.attn\.proj\.bias, "):
        load_classifier(classifier(depth=1), CONFIG, encoder[1])
    with pytest.raises(
        CheckpointError, match=r"other shape or type: .*blocks\.0\.attn\.proj\.weight \(16, 16\) for \(24, 24\)"
    ):
        load_classifier(classifier(embed_dim=24), CONFIG, encoder[1])
    stranger = save(tmp_path / "stranger.safetensors", encoder[0], surprise=torch.zeros(1))
    with pytest.raises(CheckpointError, match="missing: none; unexpected: surprise; other shape or type: none"):
        load_classifier(classifier(), CONFIG, stranger)
    pooled = save(tmp_path / "pooled.safetensors", classifier())
    with pytest.raises(CheckpointError, match=r"missing: norm\.bias, norm\.weight; unexpected: none") as caught:
        load_classifier(classifier(pool="cls"), CONFIG, pooled)
    assert "pool" in str(caught.value.hint)


def test_a_position_embedding_of_another_grid_is_resampled(encoder: tuple[nn.Module, str]) -> None:
    model = classifier(img_size=64)
    load_classifier(model, CONFIG, encoder[1])
    assert model.state_dict()["pos_embed"].shape == (1, 65, 16)


def test_random_weights_are_those_of_the_seed_and_only_when_asked_for() -> None:
    one, other = (load_classifier(classifier(seed=seed), CONFIG, "random").sha256 for seed in (0, 1))
    assert one != other == load_classifier(classifier(seed=1), CONFIG, "random").sha256


def test_the_arguments_in_a_file_make_the_model() -> None:
    for pool in ("mean", "cls"):
        made = classifier(pool=pool)
        model = timm.create_model(**timm_arguments(made, CONFIG, pool))
        model.load_state_dict(made.state_dict(), strict=True)


def test_a_class_token_that_is_not_there_is_refused() -> None:
    with pytest.raises(RecipeError, match="needs a class token"):
        build_classifier(ModelConfig(name="swin_tiny_patch4_window7_224"), 5, "cls")


def test_a_class_map_takes_rows_of_another_head_and_their_mean_for_minus_one(tmp_path: Path) -> None:
    """float64 reference of the mean over the mapped rows, a class that is mapped twice counting twice."""
    before = classifier(num_classes=9, seed=3)
    weights = save(tmp_path / "w.safetensors", before)
    rows = [7, 2, -1, 2]
    (tmp_path / "map.txt").write_text("".join(f"{row}\n" for row in rows))
    model = classifier(num_classes=4, seed=4)
    loaded = load_classifier(model, CONFIG, weights, tmp_path / "map.txt")
    assert loaded.new == () and loaded.sha256 == tensors_sha256(model.state_dict())
    for name in HEAD:
        theirs = before.state_dict()[name].double()
        expected = torch.stack([theirs[row] if row >= 0 else theirs[[7, 2, 2]].mean(dim=0) for row in rows])
        torch.testing.assert_close(model.state_dict()[name].double(), expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(model.state_dict()["fc_norm.weight"], before.state_dict()["fc_norm.weight"])


def test_a_class_map_that_does_not_fit_is_refused(encoder: tuple[nn.Module, str], tmp_path: Path) -> None:
    weights = save(tmp_path / "w.safetensors", classifier(num_classes=9))
    for text, file, kind, message in (
        ("0\n1\n", weights, RecipeError, "not one of the model's classes"),
        ("0\n1\n9\n2\n", weights, CheckpointError, "lacks a class"),
        ("0\n1\n2\n3\n", encoder[1], CheckpointError, "no head for class_map"),
    ):
        (tmp_path / "map.txt").write_text(text)
        with pytest.raises(kind, match=message):
            load_classifier(classifier(num_classes=4), CONFIG, file, tmp_path / "map.txt")


# ---- BEiT from a plain ViT: relative positions at fine-tuning only


RPE = CONFIG.model_copy(update={"name": "beit_base_patch16_224", "args": {"use_abs_pos_emb": True, "init_values": 0}})


def test_a_vit_with_new_relative_positions_computes_the_same_until_they_are_trained(tmp_path: Path) -> None:
    """float64: the tables start at zero, and biases of k, which BEiT lacks, change no attention."""
    vit = classifier(seed=7).double().eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.manual_seed(1)
    beit = build_classifier(RPE, 5, "mean").double().eval()
    loaded = load_classifier(beit, RPE, save(tmp_path / "vit.safetensors", vit))
    tables = tuple(f"blocks.{block}.attn.relative_position_bias_table" for block in range(2))
    assert loaded.new == tables and loaded.dropped == () and "biases of q and v" in loaded.layout
    assert all(not beit.state_dict()[name].any() for name in tables)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(beit(images), vit(images), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        beit.get_parameter(tables[0]).normal_()
    assert not torch.allclose(beit(images), vit(images), rtol=1e-3)


def test_the_old_variant_scales_the_branches_by_a_tenth(tmp_path: Path) -> None:
    old = RPE.model_copy(update={"args": {"use_abs_pos_emb": True, "init_values": 0.1}})
    beit = build_classifier(old, 5, "mean")
    loaded = load_classifier(beit, old, save(tmp_path / "vit.safetensors", build_vit(CONFIG)))
    assert [name for name in loaded.new if ".gamma_" in name] == [
        f"blocks.{block}.gamma_{branch}" for block in range(2) for branch in (1, 2)
    ]
    assert all(bool((beit.state_dict()[name] == 0.1).all()) for name in loaded.new if ".gamma_" in name)


def test_tables_of_a_window_of_14_have_732_rows_and_their_own_weights_are_loaded(tmp_path: Path) -> None:
    config = RPE.model_copy(update={"img_size": 224, "patch_size": 16, "depth": 1})
    before = build_classifier(config, 5, "mean")
    name = "blocks.0.attn.relative_position_bias_table"
    assert before.get_parameter(name).shape == (732, 2)
    torch.nn.init.normal_(before.get_parameter(name))
    again = build_classifier(config, 5, "mean")
    weights = save(tmp_path / "beit.safetensors", before)
    assert load_classifier(again, config, weights).new == ()
    assert torch.equal(again.get_parameter(name), before.get_parameter(name))


def test_weights_with_some_of_the_tables_are_incomplete(tmp_path: Path) -> None:
    state = build_classifier(RPE, 5, "mean").state_dict()
    del state["blocks.1.attn.relative_position_bias_table"]
    (tmp_path / "w.safetensors").write_bytes(to_safetensors(state, {}))
    with pytest.raises(CheckpointError, match="does not fit") as caught:
        load_classifier(build_classifier(RPE, 5, "mean"), RPE, str(tmp_path / "w.safetensors"))
    assert "blocks.1.attn.relative_position_bias_table" in str(caught.value.got)


def test_relative_positions_are_no_encoders_own(tmp_path: Path) -> None:
    """Elsewhere than in fine-tuning nothing may be new: a table that nobody trains would be zero for ever."""
    with pytest.raises(CheckpointError, match="relative_position_bias_table"):
        load_weights(build_model(RPE), save(tmp_path / "vit.safetensors", build_vit(CONFIG)))
