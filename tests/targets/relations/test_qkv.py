"""Relations against the written-out formula, and the re-split of heads."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tinymim.configs.codecs.relations import Relation
from tinymim.targets.relations.draws import sample_rows
from tinymim.targets.relations.qkv import QKV, relation_logits, relation_probs

MakeQKV = Callable[..., QKV]
SIDES = {"qk": ("q", "k"), "vv": ("v", "v"), "qq": ("q", "q"), "kk": ("k", "k")}


def formula(qkv: QKV, relation: Relation) -> Tensor:
    a, b = (getattr(qkv, side) for side in SIDES[relation])
    e = torch.einsum("bhqd,bhkd->bhqk", a, b).div(math.sqrt(a.shape[-1])).exp()
    return e / e.sum(-1, keepdim=True)


@pytest.mark.parametrize("relation", ["qk", "vv", "qq", "kk"])
def test_all_rows_follow_the_formula(make_qkv: MakeQKV, relation: Relation) -> None:
    qkv = make_qkv(2, 3, 11, 5)
    torch.testing.assert_close(relation_probs(qkv, relation), formula(qkv, relation), rtol=0, atol=1e-12)


@pytest.mark.parametrize("relation", ["qk", "vv", "qq", "kk"])
def test_sampled_rows_are_those_rows(make_qkv: MakeQKV, relation: Relation) -> None:
    qkv = make_qkv(2, 3, 11, 5)
    rows = sample_rows(torch.tensor([5, 6]), relation, 3, 11, 4)
    expected = formula(qkv, relation).gather(2, rows[..., None].expand(-1, -1, -1, 11))
    got = relation_probs(qkv, relation, rows)
    assert got.shape == (2, 3, 4, 11)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_fp32_even_under_autocast(make_qkv: MakeQKV, dtype: torch.dtype) -> None:
    qkv = make_qkv(1, 2, 9, 8, dtype=dtype)
    exact = formula(QKV(qkv.q.double(), qkv.k.double(), qkv.v.double()), "qk")
    with torch.autocast("cpu", torch.bfloat16):
        logits = relation_logits(qkv, "qk")
        probs = relation_probs(qkv, "qk")
    assert logits.dtype == probs.dtype == torch.float32
    torch.testing.assert_close(probs.double(), exact, rtol=0, atol=1e-6)


def test_resplit_keeps_channels_in_order(make_qkv: MakeQKV) -> None:
    qkv = make_qkv(2, 3, 7, 8)
    split = qkv.resplit(4)
    assert split.q.shape == (2, 4, 7, 6)

    def channels(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(2, 7, 24)

    for side in "qkv":
        assert torch.equal(channels(getattr(split, side)), channels(getattr(qkv, side)))
        assert torch.equal(getattr(split.resplit(3), side), getattr(qkv, side))
    assert qkv.resplit(3) is qkv


def test_resplit_takes_no_heads_that_do_not_divide_the_width(make_qkv: MakeQKV) -> None:
    with pytest.raises(AssertionError, match="3 heads x 8 into 16"):
        make_qkv(2, 3, 7, 8).resplit(16)
