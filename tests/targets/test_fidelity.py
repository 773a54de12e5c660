"""The fidelity statistics against their definitions in plain float64, on gradients whose truth is known."""

import math

import pytest
import torch
from torch import Tensor

from tinymim.configs.codecs.kinds import codec_config
from tinymim.targets.fidelity import GradientMoments, StatisticMoments, merged, rounded
from tinymim.targets.relations.kind import exact_rows
from tinymim.targets.relations.qkv import QKV, relation_probs
from tinymim.tests.targets.relations.plain import make_codec, tapped

VIEWS, PARTS, SIZE = 48, 3, 200


def gradients(seed: int, noise: float, bias: float, draws: int = 2) -> tuple[Tensor, Tensor]:
    """Dense gradients [V, P, N] with a common mean, and draws [V, R, P, N] around them."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(PARTS, SIZE, generator=generator)
    dense = mean + torch.randn(VIEWS, PARTS, SIZE, generator=generator)
    offset = bias * mean.norm(dim=-1, keepdim=True) * torch.nn.functional.normalize(mean.roll(7, -1), dim=-1)
    errors = noise * torch.randn(VIEWS, draws, PARTS, SIZE, generator=generator)
    return dense, dense[:, None] + offset + errors


def summary(dense: Tensor, drawn: Tensor, groups: int = 16) -> dict[str, list[float]]:
    moments = GradientMoments(len(dense), groups)
    for view, draws in zip(dense, drawn, strict=True):
        moments.add({"all": view}, [{"all": draw} for draw in draws])
    return moments.summary()["all"]


def test_every_number_is_its_definition() -> None:
    dense, drawn = gradients(0, noise=0.3, bias=0.2)
    got = summary(dense, drawn)
    g, e = dense.double(), (drawn - dense[:, None]).double()
    for part in range(PARTS):
        mean, error = g[:, part].mean(0), e[:, :, part].mean((0, 1))
        found = mean + error
        flat = e[:, :, part].flatten(0, 1)
        expected = {
            "noise_ratio": flat.var(0).sum() / g[:, part].var(0).sum(),
            "norm_ratio": found.norm() / mean.norm(),
            "angle_deg": torch.rad2deg(torch.arccos(found @ mean / found.norm() / mean.norm())),
        }
        pairs = e[:, :, part].mean(1) @ e[:, :, part].mean(1).T
        square = (pairs.sum() - pairs.trace()) / (VIEWS * (VIEWS - 1))
        expected["bias"] = square.sqrt() / mean.norm()
        for name, value in expected.items():
            assert got[name][part] == pytest.approx(float(value), rel=2e-3), name


@pytest.mark.parametrize("groups", [VIEWS, 16, 7])
def test_bias_is_found_and_its_standard_error_is_honest(groups: int) -> None:
    found, stated = [], []
    for seed in range(40):
        result = summary(*gradients(seed, noise=1.0, bias=0.3), groups)
        found += result["bias"]
        stated += result["bias_se"]
        assert result["biased"] == [1.0] * PARTS
    assert sum(found) / len(found) == pytest.approx(0.3, abs=0.01)
    spread = float(torch.tensor(found).std())
    assert 0.5 < sum(stated) / len(stated) / spread < 2.0


def test_noise_without_bias_is_seldom_called_bias() -> None:
    called = [summary(*gradients(seed, noise=2.0, bias=0.0))["biased"] for seed in range(60)]
    assert sum(map(sum, called)) / (60 * PARTS) < 0.1  # 2.3 % in the limit of many views


def test_exact_gradients_have_no_fault() -> None:
    dense, _ = gradients(0, noise=0.0, bias=0.0)
    got = summary(dense, dense[:, None])
    assert got == {name: [0.0] * PARTS for name in got} | {"norm_ratio": [1.0] * PARTS, "angle_deg": got["angle_deg"]}
    assert max(got["angle_deg"]) < 1e-3


def test_a_part_without_gradient_is_no_crash() -> None:
    zero = torch.zeros(6, 1, 4)
    assert all(math.isfinite(value[0]) for value in summary(zero, zero[:, None]).values())


def test_maps_moments_are_those_of_the_rows() -> None:
    torch.manual_seed(0)
    qkv, keys = QKV(*(torch.randn(4, 2, 9, 4) for _ in range(3))), torch.arange(4)
    exact = exact_rows(qkv, ("qk", "vv"))
    largest = relation_probs(qkv, "vv").topk(2).values.sum(-1).mean(dim=(0, 2))
    for fields, kept in (
        ({"name": "dense"}, torch.ones(2)),
        ({"rows": 9, "head_k": 2, "tail": "renormalise"}, largest),
        ({"rows": 9, "head_k": 2, "tail": "uniform"}, largest),
    ):
        codec, moments = make_codec(codec_config(**fields)), StatisticMoments()
        target = codec.decode(codec.encode(qkv, keys), keys, 9)
        for row in range(4):  # one by one, as the stages do
            one = QKV(qkv.q[row : row + 1], qkv.k[row : row + 1], qkv.v[row : row + 1])
            stored = codec.decode(codec.encode(one, keys[row : row + 1]), keys[row : row + 1], 9)
            moments.add(codec.kind.statistics(tapped(one), stored), 1)
        got = moments.summary()
        assert list(got) == list(target)
        torch.testing.assert_close(torch.tensor(got["vv"]["kept_mass"]), kept, rtol=1e-3, atol=1e-4)
        entropy = torch.special.entr(exact["qk"].dense()).sum(-1).mean((0, 2))
        torch.testing.assert_close(torch.tensor(got["qk"]["entropy_nats"]), entropy, rtol=1e-3, atol=0)


def test_summaries_merge_by_name() -> None:
    assert merged({"qk": {"a": [1.0]}}, {"qk": {"b": [2.0]}, "all": {"c": [3.0]}}) == {
        "qk": {"a": [1.0], "b": [2.0]},
        "all": {"c": [3.0]},
    }
    assert rounded(0.123456) == 0.1235
