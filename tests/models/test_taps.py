"""The tap sees exactly what timm's own attention sees, whatever the ViT."""

from typing import Any

import pytest
import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError
from tinymim.configs.sections import ModelConfig
from tinymim.models.taps import CutTeacher, StudentWithTap
from tinymim.models.vit import build_vit
from tinymim.targets.relations.qkv import QKV, relation_probs

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no qkv bias": {"qkv_bias": False},
    "LayerScale": {"init_values": 0.3},
    "register tokens": {"reg_tokens": 4},
    "qk norm": {"qk_norm": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
}


def small_vit(**kwargs: Any) -> VisionTransformer:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=0, **kwargs
    )
    assert isinstance(model, VisionTransformer)
    for parameter in model.parameters():  # biases and gains off their initial zeros and ones
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def timm_attention(model: VisionTransformer, block: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """QK as timm's unfused path computes it (caught before its dropout), VV by the formula from timm's qkv layer."""
    attention: Any = model.blocks[block - 1].attn
    attention.fused_attn = False
    caught: dict[str, Tensor] = {}
    handles = [
        attention.attn_drop.register_forward_pre_hook(lambda _m, args: caught.update(qk=args[0])),
        attention.qkv.register_forward_hook(lambda _m, _args, out: caught.update(qkv=out)),
    ]
    model.forward_features(images)
    for handle in handles:
        handle.remove()
    batch, tokens, width = caught["qkv"].shape
    dim = width // 3 // attention.num_heads
    v = caught["qkv"][..., 2 * width // 3 :].reshape(batch, tokens, attention.num_heads, dim).transpose(1, 2)
    return caught["qk"], torch.softmax(torch.einsum("bhqd,bhkd->bhqk", v, v) / dim**0.5, dim=-1)


@pytest.mark.parametrize("block", [1, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_relations_equal_timms_own_attention(variant: str, block: int) -> None:
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    qk, vv = timm_attention(small_vit(**VARIANTS[variant]), block, images)
    qkv = QKV(*CutTeacher(small_vit(**VARIANTS[variant]), block)(images))
    torch.testing.assert_close(relation_probs(qkv, "qk"), qk, rtol=0, atol=1e-10)
    torch.testing.assert_close(relation_probs(qkv, "vv"), vv, rtol=0, atol=1e-10)


def test_nothing_behind_the_tap_is_kept_or_run() -> None:
    model = small_vit()
    tapped: Any = model.blocks[1]
    tapped.attn.proj = _Bomb()
    model.norm = _Bomb()
    q, k, v, _ = CutTeacher(model, 2)(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    assert len(model.blocks) == 2
    assert q.shape == k.shape == v.shape == (1, 3, 17, 8)


class _Bomb(nn.Module):
    def forward(self, _x: Tensor) -> Tensor:
        raise AssertionError("computed behind the tap")


@pytest.mark.parametrize("block", [0, 5])
def test_a_block_outside_the_teacher_is_refused(block: int) -> None:
    with pytest.raises(RecipeError, match=r"outside the teacher"):
        CutTeacher(small_vit(), block)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(RecipeError, match="no attention blocks"):
        CutTeacher(timm.create_model("resnet18"), 1)


STUDENT = ModelConfig(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)


def test_every_exported_parameter_of_the_student_is_trained() -> None:
    student = StudentWithTap(build_vit(STUDENT))
    sum(x.square().sum() * (i + 1) for i, x in enumerate(student(torch.randn(2, 3, 32, 32)))).backward()
    idle = [n for n, p in student.vit.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert idle == ["pos_embed"]  # the fixed sine-cosine table


def test_the_student_tap_is_norm_and_qkv_in_its_own_heads() -> None:
    student = StudentWithTap(build_vit(STUDENT)).eval()
    images = torch.randn(2, 3, 32, 32)
    q, _, v = student(images)
    features = student.vit.forward_features(images)
    flat = features @ student.tap.weight.T + student.tap.bias
    assert q.shape == (2, 3, 17, 8)
    torch.testing.assert_close(q[:, 1], flat[..., 8:16])
    torch.testing.assert_close(v[:, 2], flat[..., 48 + 16 :])


def test_compiled_blocks_give_the_same_relations_and_batches_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dynamo and autograd's tracing, without inductor, which needs a C++ compiler and a minute."""
    compile_in_place = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_in_place(module, backend="aot_eager"))
    eager, compiled = CutTeacher(small_vit(), 3), CutTeacher(small_vit(), 3)
    compiled.compile_blocks()
    assert [block._compiled_call_impl is not None for block in compiled.model.blocks] == [True, True, False]  # type: ignore[union-attr]
    with torch.no_grad():
        for count in (3, 2, 3, 1):
            images = torch.randn(count, 3, 32, 32, dtype=torch.float64)
            for ours, theirs in zip(compiled(images), eager(images), strict=True):
                torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()


def test_the_tap_leaves_no_hook_and_no_mode_behind() -> None:
    cut = CutTeacher(small_vit(), 2)
    with pytest.raises(AssertionError), torch.no_grad():
        cut(torch.randn(1, 3, 32, 30, dtype=torch.float64))  # the patch embedding refuses it
    cut(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert not cut.attention._forward_pre_hooks
    assert torch.overrides._len_torch_function_stack() == 0  # type: ignore[attr-defined]
