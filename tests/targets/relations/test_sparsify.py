"""Stochastic rounding and systematic draws: exact expectations over a grid of uniforms, and edge cases."""

import pytest
import torch

from tinymim.targets.relations.sparsify import LOG_GRID, dequantise, quantise, systematic_draws, top_entries

N = 4096
GRID_OF_U = (torch.arange(N, dtype=torch.float64) + 0.5) / N
NO_HEAD = torch.empty(1, 1, 1, 0, dtype=torch.int64)


def draw(row: list[float], head: list[int], u: float, count: int) -> list[int]:
    probs = torch.tensor(row).reshape(1, 1, 1, -1)
    index = torch.tensor(head, dtype=torch.int64).reshape(1, 1, 1, -1)
    uniform = torch.tensor(u, dtype=torch.float64).reshape(1, 1, 1)
    return systematic_draws(probs, index, uniform, count).flatten().tolist()


def test_grid() -> None:
    assert len(LOG_GRID) == 256 and LOG_GRID[0] == 0 and LOG_GRID[1] == 2.0**-16 and LOG_GRID[255] == 1
    assert (LOG_GRID.diff() > 0).all()


def test_grid_values_are_exact_whatever_the_uniform() -> None:
    codes = torch.arange(256)
    for u in (0.0, 0.5, 1 - 2.0**-53):
        assert torch.equal(quantise(LOG_GRID, torch.full((256,), u, dtype=torch.float64)), codes)
    assert torch.equal(dequantise(codes.to(torch.uint8)), LOG_GRID)


@pytest.mark.parametrize("p", [1e-9, 2.0**-17, 3e-5, 0.0123, 0.1, 1 / 3, 0.5, 0.97, 0.999999])
def test_rounding_is_unbiased_in_linear_space(p: float) -> None:
    values = dequantise(quantise(torch.full((N,), p, dtype=torch.float64), GRID_OF_U)).double()
    assert len(set(values.tolist())) <= 2
    # N equally spaced uniforms integrate the two-point law to within one of them; neighbours are 4.5 % apart.
    assert abs(values.mean() - p) <= (0.05 * p + 2.0**-16) / N


def test_systematic_draws_are_proportional() -> None:
    probs = torch.rand(1, 1, 1, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probs /= probs.sum()
    head, count = torch.tensor([2, 7]).reshape(1, 1, 1, 2), 4
    draws = systematic_draws(probs.expand(1, 1, N, 13), head.expand(1, 1, N, 2), GRID_OF_U.reshape(1, 1, N), count)
    assert (draws.diff(dim=-1) >= 0).all()
    picked = torch.nn.functional.one_hot(draws, 13).sum(-2).reshape(N, 13).double()
    rest = probs.flatten().scatter(0, head.flatten(), 0)
    expected = count * rest / rest.sum()
    assert (picked.mean(0) - expected).abs().max() <= 2 * count / N
    assert ((picked - expected).abs() < 1).all()
    assert (picked[:, [2, 7]] == 0).all()


@pytest.mark.parametrize("u", [0.0, 0.3, 1 - 2.0**-53])
def test_zero_entries_are_never_drawn(u: float) -> None:
    row = [0.0, 0.25, 0.0, 0.0, 0.5, 0.25, 0.0]
    assert set(draw(row, [4], u, 5)) <= {1, 5}
    assert set(draw(row, [], u, 5)) <= {1, 4, 5}


@pytest.mark.parametrize("count", [1, 3, 7, 1000])
def test_the_last_point_stays_inside(count: int) -> None:
    row = [0.1] * 10 + [0.0, 0.0]
    assert max(draw(row, [9], 1 - 2.0**-53, count)) == 8
    assert min(draw(row, [0], 0.0, count)) == 1


def test_an_empty_tail_gives_the_first_token_outside_the_head() -> None:
    assert draw([0.0, 1.0, 0.0], [1], 0.4, 2) == [0, 0]
    assert draw([0.5, 0.5, 0.0], [0, 1], 0.999, 2) == [2, 2]
    assert draw([0.5, 0.0, 0.5, 0.0], [0, 2], 0.0, 1) == [1]


def test_equal_entries_are_drawn_evenly() -> None:
    assert draw([0.125] * 8, [], 0.5, 8) == list(range(8))


def test_top_entries() -> None:
    probs = torch.tensor([0.1, 0.4, 0.05, 0.45]).reshape(1, 1, 1, 4)
    index, value = top_entries(probs, 2)
    assert index.flatten().tolist() == [1, 3]
    assert torch.equal(value.flatten(), torch.tensor([0.4, 0.45]))
    assert top_entries(probs, 0)[0].shape == (1, 1, 1, 0)
    assert len(set(top_entries(torch.full((1, 1, 1, 9), 1 / 9), 3)[0].flatten().tolist())) == 3


def _row(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


# Every row sums to one exactly, so that what is expected is the row itself.
ROWS = {
    "p is 1 and 0": _row(0, 0, 1, 0, 0),
    "p is 0 within": _row(0.5, 0, 0.375, 0, 0.125),
    "equal entries": _row(*[0.0625] * 16),
    "a tie across the head's edge": _row(0.03125, 0.25, 0.25, 0.25, 0.0625, 0.15625),
    "a tie of two halves": _row(0.5, 0, 0, 0.5),
    "peaked": _row(2.0**-8, 1 - 2.0**-7, 0, 2.0**-8),
    "fp16, equal entries": _row(*[0.125] * 8, dtype=torch.float16),
    "fp16, a tie and a zero": _row(77 / 1024, 0, 300 / 1024, 300 / 1024, 347 / 1024, dtype=torch.float16),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("head_k", [0, 1, 2, 3])
def test_head_and_tail_together_are_unbiased(name: str, head_k: int) -> None:
    n, tail_k, row = 20_000, 3, ROWS[name]
    u = torch.rand(n, head_k + 1, generator=torch.Generator().manual_seed(head_k), dtype=torch.float64)
    probs = row.expand(1, 1, n, -1)
    index, head = top_entries(probs, head_k)
    value = dequantise(quantise(head, u[None, None, :, :head_k])).double()
    draws = systematic_draws(probs, index, u[None, None, :, head_k], tail_k)
    weight = (1 - value.sum(-1, keepdim=True)) / tail_k
    decoded = torch.zeros(probs.shape, dtype=torch.float64).scatter(-1, index, value)
    decoded = decoded.scatter_add(-1, draws, weight.expand(draws.shape))[0, 0]
    standard_error = decoded.std(0) / n**0.5
    # An entry without spread must be exact; 5 standard errors fail a correct one once in 9,000 (234 entries).
    assert ((decoded.mean(0) - row.double()).abs() <= 5 * standard_error + 1e-12).all()
