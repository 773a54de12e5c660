"""The tap sees exactly what timm's own attention sees, whatever the ViT."""

from typing import Any

import pytest
import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError
from tinymim.configs.taps import Tap
from tinymim.models.taps import CutTeacher, finite_views, require_finite
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
    tap = Tap("qkv", block)
    qkv = QKV(*CutTeacher(small_vit(**VARIANTS[variant]), [tap])(images)[tap])
    torch.testing.assert_close(relation_probs(qkv, "qk"), qk, rtol=0, atol=1e-10)
    torch.testing.assert_close(relation_probs(qkv, "vv"), vv, rtol=0, atol=1e-10)


def test_nothing_behind_the_tap_is_kept_or_run() -> None:
    model = small_vit()
    tapped: Any = model.blocks[1]
    tapped.attn.proj = _Bomb()
    model.norm = _Bomb()
    tap = Tap("qkv", 2)
    q, k, v, _ = CutTeacher(model, [tap])(torch.zeros(1, 3, 32, 32, dtype=torch.float64))[tap]
    assert len(model.blocks) == 2
    assert q.shape == k.shape == v.shape == (1, 3, 17, 8)


class _Bomb(nn.Module):
    def forward(self, _x: Tensor) -> Tensor:
        raise AssertionError("computed behind the tap")


@pytest.mark.parametrize("block", [0, 5])
def test_a_block_outside_the_teacher_is_refused(block: int) -> None:
    with pytest.raises(RecipeError, match=r"outside the teacher"):
        CutTeacher(small_vit(), [Tap("qkv", block)])


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(RecipeError, match="needs a plain ViT"):
        CutTeacher(timm.create_model("resnet18"), [Tap("qkv", 1)])


@pytest.mark.parametrize("tap", [Tap("qkv", 3), Tap("tokens", 3)], ids=str)
def test_compiled_blocks_give_the_same_tensors_and_batches_of_any_size(
    tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dynamo and autograd's tracing, without inductor, which needs a C++ compiler and a minute."""
    compile_in_place = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_in_place(module, backend="aot_eager"))
    eager, compiled = CutTeacher(small_vit(), [tap]), CutTeacher(small_vit(), [tap])
    compiled.compile_blocks()
    assert [block._compiled_call_impl is not None for block in compiled.model.blocks] == [True, True, False]  # type: ignore[union-attr]
    with torch.no_grad():
        for count in (3, 2, 3, 1):
            images = torch.randn(count, 3, 32, 32, dtype=torch.float64)
            for ours, theirs in zip(compiled(images)[tap], eager(images)[tap], strict=True):
                torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()


def test_the_tap_leaves_no_hook_and_no_mode_behind() -> None:
    tap = Tap("qkv", 2)
    cut = CutTeacher(small_vit(), [tap])
    with pytest.raises(AssertionError), torch.no_grad():
        cut(torch.randn(1, 3, 32, 30, dtype=torch.float64))  # the patch embedding refuses it
    cut(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert not cut.attention(tap)._forward_pre_hooks and not cut.attention(tap)._forward_hooks
    assert torch.overrides._len_torch_function_stack() == 0  # type: ignore[attr-defined]


def test_several_taps_give_what_each_gives_alone_and_the_last_one_ends_the_pass() -> None:
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    taps = [Tap("tokens", 3), Tap("qkv", 1), Tap("qkv", 3), Tap("tokens", 1), Tap("attention", 3), Tap("normed", 2)]
    model = small_vit()
    model.norm = _Bomb()
    cut = CutTeacher(model, taps)
    together = cut(images)
    assert set(together) == set(taps) and len(cut.model.blocks) == 3  # type: ignore[arg-type]
    for tap in taps:
        alone = CutTeacher(small_vit(), [tap])(images)[tap]
        for ours, theirs in zip(together[tap], alone, strict=True):
            assert torch.equal(ours, theirs), tap
    assert together[Tap("tokens", 3)][0].shape == (2, 17, 24)
    assert torch.overrides._len_torch_function_stack() == 0  # type: ignore[attr-defined]


def test_tokens_are_those_behind_the_block() -> None:
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model, caught = small_vit(), list[Tensor]()
    model.blocks[2].register_forward_hook(lambda _m, _args, out: caught.append(out))
    model.forward_features(images)
    tap = Tap("tokens", 3)
    assert torch.equal(CutTeacher(small_vit(), [tap])(images)[tap][0], caught[0])


def test_taps_of_tokens_attention_and_norm_are_what_the_model_computes() -> None:
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model, caught = small_vit(reg_tokens=2), dict[str, Tensor]()
    layers: Any = model.blocks
    layers[1].norm1.register_forward_hook(lambda _m, _args, out: caught.update(normed=out))
    layers[1].register_forward_hook(lambda _m, _args, out: caught.update(tokens=out))
    final = model.forward_features(images)
    expected = {
        Tap("normed", 2): (caught["normed"], caught["normed"][:, :3]),
        Tap("tokens", 2): (caught["tokens"], caught["tokens"][:, :3]),
        Tap("cls", 2): (caught["tokens"][:, 0],),
        Tap("tokens"): (final, final[:, :3]),
        Tap("cls"): (final[:, 0],),
        Tap("pooled"): (model.forward_head(final, pre_logits=True),),
    }
    q, k, *_ = CutTeacher(small_vit(reg_tokens=2), [Tap("qkv", 2)])(images)[Tap("qkv", 2)]
    expected[Tap("attention", 2)] = (q, k, q[:, :, :3])
    together = CutTeacher(small_vit(reg_tokens=2), list(expected))(images)
    assert together.keys() == expected.keys()
    for tap, tensors in expected.items():
        alone = CutTeacher(small_vit(reg_tokens=2), [tap])(images)[tap]
        for ours, single, theirs in zip(together[tap], alone, tensors, strict=True):
            assert torch.equal(ours, theirs) and torch.equal(single, theirs), tap


def test_logits_are_the_classifiers() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_classes=7)
    images = torch.randn(2, 3, 32, 32)
    expected = model.eval()(images)
    [found] = CutTeacher(model, [Tap("logits")])(images)[Tap("logits")]
    assert torch.equal(found, expected) and str(Tap("logits")) == "logits@0" and Tap.parse("logits@0") == Tap("logits")


@pytest.mark.parametrize(("tap", "message"), [("cls", "no class token"), ("logits", "no classifier")])
def test_what_a_teacher_lacks_is_refused(tap: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        CutTeacher(small_vit(class_token=False, global_pool="avg"), [Tap(tap)])
    assert caught.value.hint is not None


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_views_that_are_not_finite_are_found_each(wrong: float, dtype: torch.dtype) -> None:
    """1e30 is finite, and its products in fp32 are not."""
    tapped = {Tap("qkv", 1): tuple(torch.randn(3, 2, 5, 4, dtype=dtype) for _ in range(3))}
    require_finite(finite_views(tapped))
    tapped[Tap("qkv", 1)][2][1, 0, 3, 2] = wrong
    assert finite_views(tapped).tolist() == [True, False, True]
    with pytest.raises(RecipeError, match="not finite") as caught:
        require_finite(finite_views(tapped))
    assert caught.value.got == "1 of 3 views with inf or nan" and "precision" in str(caught.value.hint)
