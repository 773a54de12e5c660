"""Heads at a student's own inner blocks: what they read, and which weights their losses train."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError
from tinymim.configs.sections.decoders import MimConfig
from tinymim.configs.sections.models import ModelConfig
from tinymim.configs.taps import Tap
from tinymim.models import backbone, hiding
from tinymim.models.student import Fit, StudentModel, build_student, check_inner
from tinymim.models.vit import build_vit
from tinymim.tests.models.families import FAMILIES

CONFIG = ModelConfig(name="vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2)
KEPT = torch.tensor([[0, 1, 2, 3], [12, 13, 14, 15]])


def student(*reads: Tap | None, mim: bool = False, **extra: Any) -> StudentModel:
    torch.manual_seed(0)
    vit = build_vit(CONFIG, **extra).double()
    for tap in reads:
        if tap is not None:
            check_inner(vit, tap, Fit())
    config = MimConfig(decoder_dim=8, decoder_depth=1, decoder_heads=2) if mim else None
    return StudentModel(vit, *(nn.Identity() for _ in reads), reads=reads, mim=config).double().eval()


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("kept", [None, KEPT], ids=["whole", "masked"])
@torch.no_grad()
def test_a_head_reads_the_block_s_own_q_k_v_or_its_tokens(kept: Tensor | None) -> None:
    ours = student(Tap("tokens", 2), Tap("attention", 3), Tap("qkv", 3), Tap("attention", 1), None, qk_norm=True)
    answers: Any = ours.answers(images(), kept)  # tensors, because these heads change nothing
    tokens, third, qkv, first, final = answers
    for block, found in ((1, first), (3, third)):
        vit: Any = ours.vit
        with hiding.seeing(vit, kept), backbone.tokens_after(vit, max(1, block - 1)) as before:
            # Before the first block are the tokens that it gets.
            held: list[Tensor] = []
            handle = vit.blocks[0].register_forward_pre_hook(lambda _module, args, held=held: held.append(args[0]))
            vit.forward_features(images())
            handle.remove()
        layer = vit.blocks[block - 1].attn
        normed = vit.blocks[block - 1].norm1(before[0] if block > 1 else held[0])
        q, k, v = layer.qkv(normed).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = layer.q_norm(q), layer.k_norm(k)
        exact = torch.cat([side.transpose(1, 2).flatten(2) for side in (q, k, v)], -1)
        torch.testing.assert_close(found, exact[..., :32], rtol=1e-12, atol=1e-12)
        if block == 3:
            assert torch.equal(tokens, before[0])
            torch.testing.assert_close(qkv, exact, rtol=1e-12, atol=1e-12)
    assert torch.equal(final, ours.tokens(images(), kept))


def trained(ours: StudentModel, number: int) -> set[str]:
    """The parts of a block whose weights have a gradient."""
    named = ours.vit.blocks[number - 1].named_parameters()
    return {name.rpartition(".")[0] for name, each in named if each.grad is not None}


WHOLE = {"norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"}


@pytest.mark.parametrize("kind", ["tokens", "attention", "qkv"])
def test_a_loss_at_a_block_leaves_later_ones_alone(kind: str) -> None:
    ours = student(Tap(kind, 3))
    answer: Any = ours.answers(images())[0]
    answer.square().mean().backward()
    at = WHOLE if kind == "tokens" else {"norm1", "attn.qkv"}
    assert [trained(ours, number) for number in range(1, 5)] == [WHOLE, WHOLE, at, set()]
    assert ours.vit.norm.weight.grad is None
    bias = ours.vit.blocks[2].attn.qkv.bias.grad
    assert kind != "attention" or not bias[32:].any()  # v has no part in the attention logits


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_are_those_of_finite_differences_beside_a_decoder_also_when_recomputed(recomputed: bool) -> None:
    ours = student(Tap("attention", 4), Tap("attention", 2), mim=True).train()
    if recomputed:
        backbone.recompute(ours.vit)
    pictures = images()

    def loss() -> Tensor:
        last, second, pixels = ours(pictures, KEPT)
        total: Tensor = last.sin().mean() + second.square().mean() + pixels
        return total

    loss().backward()
    for weight in (
        ours.vit.blocks[1].attn.qkv.weight,
        ours.vit.blocks[3].attn.qkv.weight,
        ours.vit.blocks[3].mlp.fc1.weight,
    ):
        torch.manual_seed(2)
        way = torch.randn_like(weight)
        with torch.no_grad():
            weight += 1e-5 * way
            above = loss()
            weight -= 2e-5 * way
            below = loss()
            weight += 1e-5 * way
        assert math.isclose(float((weight.grad * way).sum()), float(above - below) / 2e-5, rel_tol=1e-6)


@pytest.mark.parametrize("family", ["vit", "beit", "eva", "dinov2", "dinov3"])
def test_families_with_blocks_have_inner_heads(family: str) -> None:
    model = build_student(FAMILIES[family].config())
    for kind in ("tokens", "attention"):
        check_inner(model, Tap(kind, 1), Fit())
    ours = StudentModel(model, nn.Identity(), nn.Identity(), reads=[Tap("tokens", 1), Tap("attention", 2)]).eval()
    answers: Any = ours.answers(torch.zeros(1, 3, FAMILIES[family].img_size, FAMILIES[family].img_size))
    tokens, sides = answers
    assert sides.shape[:2] == tokens.shape[:2] and sides.shape[2] == 2 * tokens.shape[2]


def test_misfits_are_refused() -> None:
    with pytest.raises(RecipeError, match="student_block needs a plain ViT"), torch.device("meta"):
        check_inner(build_student(FAMILIES["swin"].config()), Tap("tokens", 1), Fit())
    vit = build_vit(CONFIG)
    with pytest.raises(RecipeError, match="student_block is outside the student") as caught:
        check_inner(vit, Tap("tokens", 5), Fit())
    assert caught.value.expected == "1..4"
    check_inner(vit, Tap("tokens", 4), Fit(pool=2))
    with pytest.raises(RecipeError, match="whose grid is not the teacher's"):
        check_inner(vit, Tap("qkv", 4), Fit(pool=2))
