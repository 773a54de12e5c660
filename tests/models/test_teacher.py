"""Teachers come from timm's hub, from files and from the package, and say what they are."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from tinymim.configs.errors import CheckpointError, RecipeError
from tinymim.configs.sections.models import TeacherConfig
from tinymim.configs.taps import Shapes, Tap
from tinymim.models.teacher import Teacher, taps_of
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.tests.stages.tiny import STATED

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
PIXELS = torch.arange(2 * 3 * 32 * 32).remainder(251).to(torch.uint8).reshape(2, 3, 32, 32)
TAP = Tap("qkv", 2)


def small_vit(**kwargs: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **SIZES, **kwargs)


def test_hub_weights_load_with_the_normalisation_and_licence_that_timm_states(tmp_path: Path) -> None:
    model = small_vit()
    stated: dict[str, Any] = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "license": "cc-by-nc-4.0"}
    cfg: Any = model.pretrained_cfg
    cfg.update(stated)
    save_for_hf(model, str(tmp_path / "hub"), model_args=SIZES)
    config = TeacherConfig(name=f"local-dir:{tmp_path / 'hub'}", weights="hub", block=2, img_size=32)
    teacher = Teacher(config, [TAP])
    described = teacher.describe()
    assert described["mean"] == [0.1, 0.2, 0.3] and described["std"] == [0.4, 0.5, 0.6]
    assert described["license"] == "cc-by-nc-4.0"
    assert teacher.shapes() == Shapes(heads=3, head_dim=8, tokens=17, prefix_tokens=1, grid=(4, 4))
    save_file(model.state_dict(), tmp_path / "w.safetensors", STATED)
    from_file = TeacherConfig(
        name="vit_tiny_patch16_224",
        weights=str(tmp_path / "w.safetensors"),
        block=2,
        mean=stated["mean"],
        std=stated["std"],
        **SIZES,
    )
    for ours, theirs in zip(Teacher(from_file, [TAP])(PIXELS)[TAP], teacher(PIXELS)[TAP], strict=True):
        assert torch.equal(ours, theirs)


def test_a_name_without_hub_weights_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no pretrained weights"):
        Teacher(TeacherConfig(name="vit_wee_patch16_reg1_gap_25", weights="hub", block=1), [Tap("qkv", 1)])


def test_a_hub_that_cannot_be_reached_is_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_args: Any, **_kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    with pytest.raises(CheckpointError, match="cannot be fetched") as caught:
        Teacher(TeacherConfig(name="vit_small_patch16_224.dino", weights="hub", block=1), [Tap("qkv", 1)])
    assert caught.value.hint is not None


def test_an_unknown_name_is_refused_with_names_like_it(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").touch()
    with pytest.raises(RecipeError, match="cannot build") as caught:
        Teacher(
            TeacherConfig(name="vit_tiny_patch61_224", weights=str(tmp_path / "w.safetensors"), block=1),
            [Tap("qkv", 1)],
        )
    assert "vit_tiny_patch16_224" in str(caught.value.hint)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32(tmp_path: Path, precision: str) -> None:
    save_file(small_vit().state_dict(), tmp_path / "w.safetensors", STATED)
    weights = str(tmp_path / "w.safetensors")
    fields: dict[str, Any] = {"name": "vit_tiny_patch16_224", "weights": weights, "block": 3, **SIZES}
    tap = Tap("qkv", 3)
    exact = Teacher(TeacherConfig(**fields), [tap])(PIXELS)[tap]
    fields["precision"] = precision
    for half, full in zip(Teacher(TeacherConfig(**fields), [tap])(PIXELS)[tap], exact, strict=True):
        torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_the_qkv_projection_makes_q_k_and_v_of_the_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=0, **SIZES)  # BEiT keeps its biases beside the layer
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    monkeypatch.setattr("tinymim.models.teacher.build_with_weights", lambda *_args, **_kwargs: model)
    teacher = Teacher(
        TeacherConfig(name=name, weights="here", block=2, mean=IMAGENET_MEAN, std=IMAGENET_STD, **SIZES), [TAP]
    )
    weight, bias = teacher.projection(TAP)
    assert weight.shape == (72, 24) and bias is not None and bias.shape == (72,)
    q, k, v, x = teacher(PIXELS)[TAP]
    made = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(made, torch.cat([side.transpose(1, 2).flatten(2) for side in (q, k, v)], dim=-1))
    attention: Any = teacher.cut.attention(TAP)
    attention.qkv = torch.nn.Identity()
    with pytest.raises(RecipeError, match="no single qkv layer"):
        teacher.projection(TAP)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_fine_tuned_file_gives_logits_pooled_embedding_and_final_tokens(tmp_path: Path, pool: str) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=5, global_pool=pool, **SIZES)
    torch.nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), tmp_path / "w.safetensors", STATED)
    config = TeacherConfig(name="vit_tiny_patch16_224", weights=str(tmp_path / "w.safetensors"), block=2, **SIZES)
    taps = [Tap("logits"), Tap("pooled"), Tap("tokens", 2)]
    teacher = Teacher(config, taps)
    found = teacher(PIXELS)
    with torch.no_grad():
        features = model.eval().forward_features(teacher.normalise(PIXELS))
        assert torch.equal(found[taps[0]][0], model.forward_head(features))
        assert torch.equal(found[taps[1]][0], model.forward_head(features, pre_logits=True))
    assert teacher.shapes() == Shapes(heads=3, head_dim=8, tokens=17, prefix_tokens=1, grid=(4, 4))


def test_the_end_of_the_model_needs_its_final_norm_and_logits_a_classifier(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in small_vit().state_dict().items() if not name.startswith("norm.")}
    save_file(tensors, tmp_path / "w.safetensors", STATED)
    config = TeacherConfig(name="vit_tiny_patch16_224", weights=str(tmp_path / "w.safetensors"), block=2, **SIZES)
    assert Teacher(config, [Tap("tokens", 3)]).shapes().tokens == 17
    with pytest.raises(CheckpointError, match=r"missing: norm\.bias"):
        Teacher(config, [Tap("tokens")])
    save_file(small_vit().state_dict(), tmp_path / "w.safetensors", STATED)
    with pytest.raises(RecipeError, match="no classifier"):
        Teacher(config, [Tap("logits")])


def test_the_taps_that_a_teacher_has_are_known_without_its_weights() -> None:
    config = TeacherConfig(name="vit_medium_patch16_gap_240", img_size=240, weights="/nowhere.safetensors", block=2)
    wanted = [
        Tap("qkv", 12),
        Tap("qkv", 13),
        Tap("attention", 3),
        Tap("cls"),
        Tap("pooled"),
        Tap("tokens"),
        Tap("logits"),
    ]
    found = taps_of(config, wanted)  # 12 blocks, no class token, no classifier
    assert found == [Tap("qkv", 12), Tap("attention", 3), Tap("pooled"), Tap("tokens")]


def test_a_teacher_drops_whole_branches_and_scales_the_others() -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 0.75

    model: Any = small_vit().eval()
    config = TeacherConfig(name="vit_tiny_patch16_224", weights="random", block=2, drop_path=0.25, **SIZES)
    taps = [Tap("tokens", 1), Tap("tokens", 2), TAP]
    teacher = Teacher(config, taps, small_vit())
    assert teacher.branches == 4 and teacher.describe()["drop_path"] == 0.25  # the last of three blocks drops none
    alone = Teacher(config, [Tap("tokens", 1)], small_vit())  # its branches have the same numbers
    drops = torch.tensor([[0.1, 0.74, 0.2, 0.3], [0.1, 0.74, 0.75, 0.99]], dtype=torch.float64)
    first, second = (teacher(PIXELS, drops=drops)[tap][0] for tap in taps[:2])
    assert torch.equal(first[1], second[1]) and not torch.equal(first[0], second[0])
    assert torch.equal(alone(PIXELS, drops=drops)[taps[0]][0], first)
    for block in model.blocks[:2]:
        block.drop_path1, block.drop_path2 = Scaled(), Scaled()
    wanted = Teacher(config.model_copy(update={"drop_path": 0.0}), taps, model)(PIXELS)
    torch.testing.assert_close(first, wanted[taps[0]][0])
    torch.testing.assert_close(second[0], wanted[taps[1]][0][0])
    assert "drop_path" not in Teacher(config.model_copy(update={"drop_path": 0.0}), taps, small_vit()).describe()


def test_stochastic_depth_of_a_teacher_without_such_blocks_is_refused() -> None:
    config = TeacherConfig(name="resnet18", weights="random", img_size=32, drop_path=0.1)
    with pytest.raises(RecipeError, match=r"teacher\.drop_path needs a plain ViT"):
        Teacher(config, [Tap("pooled")], timm.create_model("resnet18"))
    with pytest.raises(ValueError, match="compile cannot be combined"):
        TeacherConfig(drop_path=0.1, compile=True)
