"""A student of masked views: it sees no hidden pixel, and its loss on them is that of a masked autoencoder."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinymim.configs.sections.decoders import MaeConfig, MimConfig
from tinymim.configs.sections.models import ModelConfig
from tinymim.models.mim import masked_autoencoder
from tinymim.models.student import StudentModel
from tinymim.models.vit import build_vit

CONFIG = ModelConfig(name="vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2)
DECODER: dict[str, Any] = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
ORDER = torch.stack([torch.arange(16), torch.arange(16).flip(0)])  # the first four, and the last four, are visible
KEPT = torch.tensor([[0, 1, 2, 3], [12, 13, 14, 15]])


def student(paints: bool = False, mim: dict[str, Any] | None = None, **extra: Any) -> StudentModel:
    torch.manual_seed(0)
    vit = build_vit(CONFIG, **extra)
    config = None if mim is None else MimConfig.model_validate(DECODER | mim)
    return StudentModel(vit, nn.Identity(), paints=paints, mim=config).double().eval()


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


def other_hidden_pixels(pictures: Tensor) -> Tensor:
    changed = pictures.clone()
    changed[0, :, 8:] = pictures[0, :, 8:].flip(-1)  # rows of patches 1 to 3
    changed[1, :, :24] = pictures[1, :, :24].flip(-1)
    return changed


@torch.no_grad()
def test_the_loss_on_hidden_pixels_is_that_of_a_masked_autoencoder() -> None:
    ours = student(mim={})
    assert ours.decoder is not None
    reference = masked_autoencoder(ours.vit, 32, MaeConfig.model_validate(DECODER)).double().eval()
    reference.load_state_dict(ours.decoder.state_dict() | {f"encoder.{n}": t for n, t in ours.vit.state_dict().items()})
    tokens, loss = ours(images(), KEPT)
    assert tokens.shape == (2, 5, 16)
    torch.testing.assert_close(loss, reference(images(), ORDER)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("paints", [False, True])
@pytest.mark.parametrize(
    "extra",
    [{}, {"reg_tokens": 3}, {"reg_tokens": 2, "class_token": False, "global_pool": "avg"}],
    ids=["class token", "class token and registers", "registers"],
)
@torch.no_grad()
def test_hidden_pixels_change_no_answer_and_prefix_tokens_stay(paints: bool, extra: dict[str, Any]) -> None:
    ours = student(paints, {}, **extra)
    prefix = ours.vit.num_prefix_tokens
    (first, loss), (second, other_loss) = ours(images(), KEPT), ours(other_hidden_pixels(images()), KEPT)
    assert first.shape == (2, prefix + (16 if paints else 4), 16)
    assert torch.equal(first, second) and loss != other_loss
    assert not torch.equal(first, ours(images() + 1.0, KEPT)[0])
    whole = ours.tokens(images())
    assert whole.shape == (2, prefix + 16, 16)
    torch.testing.assert_close(ours.tokens(images(), torch.arange(16).expand(2, -1)), whole)


@torch.no_grad()
def test_the_learned_token_stands_before_the_positions_are_added() -> None:
    ours = student(paints=True)
    assert ours.mask_token is not None
    vit = ours.vit
    patches = vit.patch_embed(images())
    for row, kept in enumerate(KEPT.tolist()):
        for patch in set(range(16)) - set(kept):
            patches[row, patch] = ours.mask_token[0, 0]
    assert vit.cls_token is not None and vit.pos_embed is not None
    tokens = torch.cat([vit.cls_token.expand(2, -1, -1), patches], dim=1) + vit.pos_embed
    torch.testing.assert_close(ours.tokens(images(), KEPT), vit.norm(vit.blocks(tokens)), rtol=1e-12, atol=1e-12)


def test_a_decoder_of_an_earlier_block_leaves_later_ones_to_the_other_losses() -> None:
    ours = student(mim={"block": 2})
    _, loss = ours(images(), KEPT)
    loss.backward()
    for number, block in enumerate(ours.vit.blocks, start=1):
        assert all((p.grad is not None) == (number <= 2) for p in block.parameters()), number
    assert ours.vit.norm.weight.grad is None and ours.decoder is not None
    assert all(p.grad is not None for p in ours.decoder.parameters())


def test_a_painted_student_s_decoder_reads_all_tokens() -> None:
    ours = student(paints=True, mim={})
    _, loss = ours(images(), KEPT)
    loss.backward()
    assert ours.mask_token is not None and ours.mask_token.grad is not None and ours.decoder is not None
    assert ours.decoder.mask_token.grad is None  # nothing is missing
