"""timm's notation of RandAugment is read as timm reads it, and what is unknown is named."""

import math

import pytest
from timm.data.auto_augment import rand_augment_transform

from tinymim.configs.rand_augment import checked_rand_augment, parse_rand_augment


@pytest.mark.parametrize(
    "text",
    [
        "rand-m9-mstd0.5-inc1",
        "rand",
        "rand-m5-n3-p0.7-inc0",
        "rand-n1-m12-mmax20-mstd101-inc1",
        "rand-mstd1-tweights",
        "rand-t3a-m7",
        "rand-inc1-t3aw-n4",
    ],
)
def test_what_timm_reads(text: str) -> None:
    ours, theirs = parse_rand_augment(text), rand_augment_transform(text)
    assert list(ours.weights) == [op.name for op in theirs.ops]
    assert ours.layers == theirs.num_layers and ours.replace == (theirs.choice_weights is None)
    if theirs.choice_weights is not None:
        total = sum(ours.weights.values())
        assert [weight / total for weight in ours.weights.values()] == pytest.approx(list(theirs.choice_weights))
    for op in theirs.ops:
        assert (op.prob, op.magnitude, op.magnitude_std) == (ours.probability, ours.magnitude, ours.deviation)
        assert (op.magnitude_max or 10) == ours.largest
    assert checked_rand_augment(text) == text


def test_more_than_a_hundred_is_uniform() -> None:
    assert parse_rand_augment("rand-mstd101").deviation == math.inf
    assert checked_rand_augment(None) is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "got ''"),
        ("strong", "got 'strong'"),
        ("augmix-m3", "got 'augmix-m3'"),
        ("rand-m9-zz3", "section 'zz3'"),
        ("rand-m9.5", "section 'm9.5'"),
        ("rand-mstdinf", "section 'mstdinf'"),  # timm ignores these
        ("rand-inc", "section 'inc'"),
        ("rand-m9-m5", "section 'm5'"),
        ("rand-tall", "section 'tall'"),
        ("rand--m9", "section ''"),
        ("rand-p1.5", "at most 1"),
        ("rand-tweights-n16", "n16 operations"),
    ],
)
def test_what_is_unknown_is_named(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse_rand_augment(text)
