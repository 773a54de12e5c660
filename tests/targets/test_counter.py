"""The counter-based generator: committed numbers (they are part of format v1), uniformity, row subsets."""

import itertools

import pytest
import torch

from tinymim.configs.codecs.relations import Relation
from tinymim.targets.counter import _GAMMA, _mix, uniforms
from tinymim.targets.relations.draws import PURPOSES, RELATIONS, sample_rows, stream_of

KEYS = torch.tensor([0, 1, -1, 0x0123456789ABCDEF, -(1 << 63)])
MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """The finaliser in unbounded Python integers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_mix_is_the_published_splitmix64() -> None:
    # First outputs of Vigna's reference splitmix64.c with seed 0.
    out = _mix(torch.arange(1, 4) * _GAMMA).tolist()
    assert [bits & MASK for bits in out] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_uniforms_follow_the_definition_in_exact_integers() -> None:
    gamma, stream = 0x9E3779B97F4A7C15, 17
    got = uniforms(KEYS, stream, (2, 3))
    assert got.dtype == torch.float64 and got.shape == (5, 2, 3)
    for key, numbers in zip(KEYS.tolist(), got.flatten(1).tolist(), strict=True):
        state = splitmix64((splitmix64((key + gamma) & MASK) + (stream + 1) * gamma) & MASK)
        expected = [(splitmix64((state + i * gamma) & MASK) >> 11) * 2.0**-53 for i in range(1, 7)]
        assert numbers == expected


def test_golden_numbers() -> None:
    golden = [[0.5228164238700127, 0.06561531075437699], [0.280978006750465, 0.3233511563314241]]
    assert uniforms(KEYS[2:4], 1, (2,)).tolist() == golden


GOLDEN_ROWS: dict[Relation, list[list[int]]] = {
    "qk": [[48, 63, 105, 122, 162, 196], [9, 60, 69, 129, 132, 183]],
    "vv": [[9, 40, 74, 111, 162, 175], [4, 43, 59, 100, 144, 181]],
    "qq": [[2, 49, 55, 114, 136, 178], [11, 43, 93, 116, 151, 185]],
    "kk": [[27, 39, 66, 130, 153, 189], [9, 55, 65, 112, 140, 175]],
}


@pytest.mark.parametrize("relation", ["qk", "vv", "qq", "kk"])
def test_golden_rows(relation: Relation) -> None:
    assert sample_rows(KEYS[3:4], relation, 2, 197, 6).tolist()[0] == GOLDEN_ROWS[relation]


def test_streams_are_disjoint_and_frozen() -> None:
    table = {(p, r): stream_of(p, r) for p, r in itertools.product(PURPOSES, RELATIONS)}
    assert len(set(table.values())) == len(table) == 12
    assert table["rows", "qk"] == 0 and table["rounding", "vv"] == 17 and table["tail", "kk"] == 35


def test_numbers_are_uniform_and_uncorrelated() -> None:
    n = 20_000
    u = torch.stack([uniforms(torch.arange(n), stream, (4,)) for stream in range(3)], -1).flatten(1)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.stack([column.histc(16, 0, 1) for column in u.T])
    chi2 = ((counts - n / 16) ** 2 / (n / 16)).sum(-1)
    assert chi2.max() < 45  # chi-square, 15 degrees of freedom: p = 8e-5 each, 12 columns
    correlation = torch.corrcoef(u.T) - torch.eye(12)  # between streams and between counters
    assert correlation.abs().max() < 5 / n**0.5


def test_rows_are_ascending_subsets_and_a_function_of_the_key_alone() -> None:
    keys = torch.arange(50)
    rows = sample_rows(keys, "qk", 3, 17, 6)
    assert rows.dtype == torch.int64 and rows.shape == (50, 3, 6)
    assert (rows.diff(dim=-1) > 0).all() and rows.min() >= 0 and rows.max() < 17
    assert torch.equal(sample_rows(keys.flip(0)[:7], "qk", 3, 17, 6), rows.flip(0)[:7])
    assert not torch.equal(sample_rows(keys, "vv", 3, 17, 6), rows)


@pytest.mark.parametrize("wanted", [5, 6, 1000])
def test_rows_beyond_the_tokens_are_all_rows(wanted: int) -> None:
    rows = sample_rows(torch.arange(3), "kk", 2, 5, wanted)
    assert torch.equal(rows, torch.arange(5).expand(3, 2, 5))


@pytest.mark.parametrize(("tokens", "rows"), [(6, 4), (17, 6), (197, 64)])
def test_every_row_is_equally_likely(tokens: int, rows: int) -> None:
    n = 20_000
    drawn = sample_rows(torch.arange(n), "vv", 1, tokens, rows)[:, 0]
    p = rows / tokens
    z = (drawn.flatten().bincount(minlength=tokens) - n * p) / (n * p * (1 - p)) ** 0.5
    assert z.abs().max() < 5


def test_rows_are_spread_over_the_image() -> None:
    rows = sample_rows(torch.arange(500), "qk", 2, 197, 64)
    around = torch.cat([rows, rows[..., :1] + 197], dim=-1)
    # One of each run of 3 or 4 tokens, on a ring: no gap is as long as two runs.
    assert around.diff(dim=-1).max() < 8 and around.diff(dim=-1).min() >= 1


def test_heads_are_drawn_independently() -> None:
    n = 20_000
    rows = sample_rows(torch.arange(n), "qk", 2, 8, 4)
    hit = (rows == 0).any(-1).double()  # row 0 is in: probability 1/2 per head
    assert abs(torch.corrcoef(hit.T)[0, 1]) < 5 / n**0.5


@pytest.mark.gpu
def test_cuda_gives_the_same_bits() -> None:
    keys = torch.randint(-(1 << 62), 1 << 62, (64,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniforms(keys.cuda(), 3, (16, 197)).cpu(), uniforms(keys, 3, (16, 197)))
    assert torch.equal(sample_rows(keys.cuda(), "qk", 16, 197, 64).cpu(), sample_rows(keys, "qk", 16, 197, 64))
