"""Features and class embeddings: the contract, unbiased dither, losses against float64."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tinymim.configs.codecs.kinds import codec_config
from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.errors import CacheMismatch
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets import codebooks
from tinymim.targets.contract import Tapped, TargetKind
from tinymim.targets.counter import uniforms
from tinymim.targets.dither import Dither, rotation
from tinymim.targets.fidelity import GradientMoments
from tinymim.targets.kinds import audit_kind, make_kind, stored_kind
from tinymim.targets.vectors import VectorTarget
from tinymim.tests.targets.contract import TargetKindContract

BLOCK, TOKENS, PREFIX, WIDTH = 2, 18, 2, 24
SHAPES = Shapes(4, 6, TOKENS, PREFIX, (4, 4))
STUDENT = Shapes(3, 4, 17, 1, (4, 4))
CPU = torch.device("cpu")


def no_projection(_tap: Tap) -> tuple[Tensor, None]:
    raise AssertionError("vectors need no projection")


def teacher(views: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tapped:
    generator = torch.Generator().manual_seed(seed)
    tokens = (3 * torch.randn(views, TOKENS, WIDTH, generator=generator) + 0.5).to(dtype)
    pair = (tokens, tokens[:, :PREFIX])
    vector = (tokens[:, 0],)
    return {Tap("tokens", BLOCK): pair, Tap("normed", BLOCK): pair, Tap("tokens"): pair} | dict.fromkeys(
        (Tap("cls"), Tap("cls", BLOCK), Tap("pooled")), vector
    )


def books(stages: int) -> Tensor:
    """Codebooks, each with entries half as large as those before."""
    drawn = uniforms(torch.tensor([1]), 0, (stages, 256, WIDTH))[0].float()
    return (4 * drawn - 2) * 0.5 ** torch.arange(stages)[:, None, None]


def made(fields: dict[str, Any], **targets: Any) -> TargetKind:
    wanted = TargetsConfig(**(fields.get("targets", {}) | targets))
    config = codec_config(**{name: value for name, value in fields.items() if name != "targets"})
    kind = make_kind(config, BLOCK, wanted)
    if not kind.calibration_views:
        return kind
    if fields.get("name") == "pq" and fields.get("target") != "whiten":
        return make_kind(config, BLOCK, wanted, {"codebooks": books(fields.get("stages", 8))})
    return make_kind(config, BLOCK, wanted, kind.calibrate([teacher(8, seed=5), teacher(8, seed=6)], no_projection))


class TestVectors(TargetKindContract):
    shapes: ClassVar[Shapes] = SHAPES
    student: ClassVar[Shapes] = STUDENT
    cases: ClassVar[Mapping[str, Any]] = {
        "dither": {"kind": "features", "tokens": 5},
        "dither, one bit, cosine": {"kind": "features", "tokens": 5, "bits": 1, "targets": {"loss": "cosine"}},
        "dither, smooth l1": {"kind": "features", "tokens": 5, "bits": 1, "targets": {"loss": "smooth_l1"}},
        "int8, normed, raw": {"kind": "features", "name": "int8", "at": "normed", "target": "raw"},
        "int8, final, mlp": {"kind": "features", "name": "int8", "at": "final", "targets": {"projector": "mlp"}},
        "dither, whitened": {"kind": "features", "at": "final", "target": "whiten", "tokens": None},
        "pq": {"kind": "features", "name": "pq"},
        "pq, some tokens, cosine": {
            "kind": "features",
            "name": "pq",
            "tokens": 5,
            "stages": 2,
            "at": "normed",
            "targets": {"loss": "cosine"},
        },
        "pq, whitened": {"kind": "features", "name": "pq", "target": "whiten", "stages": 3},
        "cls": {"kind": "cls"},
        "cls, int8, mse": {"kind": "cls", "name": "int8", "at": "block", "targets": {"loss": "mse"}},
        "pooled": {"kind": "cls", "at": "pooled", "target": "layernorm", "bits": 1, "targets": {"projector": "mlp"}},
    }
    golden: ClassVar[Mapping[str, str]] = {
        "dither": "090a050825151954",
        "dither, one bit, cosine": "d6059ab7e2e451fa",
        "dither, smooth l1": "d6059ab7e2e451fa",
        "int8, normed, raw": "62a7f4dce7308871",
        "int8, final, mlp": "1e0050e823bd3e61",
        "pq": "da3edb15b6232504",
        "pq, some tokens, cosine": "067366e17951f582",
        "cls": "9ecc70f9c97f5223",
        "cls, int8, mse": "5e774c140a9b4bbe",
        "pooled": "0227b620c8209ff8",
    }
    refusals: ClassVar[Mapping[str, tuple[Callable[[], object], str]]] = {
        "rows": (lambda: made({"kind": "features"}, rows=3), r"targets\.rows is for another kind"),
        "relations": (lambda: made({"kind": "cls"}, relations=("vv",)), r"targets\.relations is for another kind"),
        "keep_projector": (lambda: made({}, keep_projector=True), r"targets\.keep_projector is for another kind"),
        "loss": (lambda: made({}, loss="mse"), r"targets\.loss mse is not a loss of sampled relations"),
        "grid": (
            lambda: made({"kind": "features"}).head(Shapes(3, 4, 10, 1, (3, 3)), SHAPES),
            r"student's patches are not the teacher's\n  got: student\.img_size",
        ),
    }

    def make(self, case: Any) -> TargetKind:
        return made(case)

    def tapped(self, views: int, seed: int = 0) -> Tapped:
        return teacher(views, seed)


# ---------------------------------------------------------------- dither


@pytest.mark.parametrize("width", [1, 7, 192])
def test_the_rotation_is_orthogonal_and_frozen(width: int) -> None:
    matrix = rotation(width, CPU)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    if width == 7:
        assert [round(value, 6) for value in matrix[1].tolist()] == GOLDEN_ROTATION


GOLDEN_ROTATION = [-0.521121, -0.417907, -0.231921, 0.0, 0.231921, -0.417907, 0.521121]


@pytest.mark.parametrize(("bits", "rotated"), [(1, True), (2, True), (8, False), (2, False)])
def test_the_mean_of_many_view_keys_is_the_vector(bits: int, rotated: bool) -> None:
    """In float64, component by component; a one-hot vector and a large offset are the hardest."""
    n, width = 20_000, 6
    generator = torch.Generator().manual_seed(1)
    exact = torch.randn(3, width, generator=generator, dtype=torch.float64)
    exact[1] = torch.eye(width, dtype=torch.float64)[2] * 1e4
    exact[2] += 30
    code = Dither(width, bits, rotated)
    uniform = uniforms(torch.arange(n), 9, (3, width))
    packed, step = code.encode(exact.expand(n, -1, -1), uniform)
    assert packed.shape == (n, 3, code.num_bytes)
    got = code.decode(packed, step, uniform if rotated else None).double()
    error = (got - exact).mean(0)
    se = (got - exact).std(0) / n**0.5
    assert (error.abs() <= 5 * se + 1e-6 * exact.norm(dim=-1, keepdim=True)).all()
    if rotated:  # every component of the rotated vector has the variance step^2 / 12, whatever the vector
        expected = step[0].double() ** 2 / 12
        torch.testing.assert_close((got - exact).square().mean((0, 2)), expected, rtol=0.03, atol=0)


def test_a_zero_vector_comes_back_as_zero() -> None:
    for rotated in (True, False):
        code, uniform = Dither(6, 2, rotated), uniforms(torch.arange(4), 0, (1, 6))
        packed, step = code.encode(torch.zeros(4, 1, 6, dtype=torch.float64), uniform)
        assert not code.decode(packed, step, uniform).any()


# ---------------------------------------------------------------- targets


def test_targets_are_their_definitions() -> None:
    tapped = teacher(3)
    tokens = tapped[Tap("tokens", BLOCK)][0][:, PREFIX:].double()
    for target, expected in (
        ("raw", tokens),
        ("layernorm", torch.nn.functional.layer_norm(tokens, (WIDTH,), eps=1e-6)),
    ):
        exact = made({"kind": "features", "target": target}).exact(tapped)
        torch.testing.assert_close(exact.value.double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(exact.length.double(), expected.norm(dim=-1), rtol=1e-4, atol=1e-5)
    whitened = made({"kind": "features", "target": "whiten"})
    parts = [whitened.exact(teacher(8, seed)).value.double().flatten(0, 1) for seed in (5, 6)]
    seen = torch.cat(parts)  # the calibration views
    torch.testing.assert_close(seen.mean(0), torch.zeros(WIDTH, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cov(seen.T), torch.eye(WIDTH, dtype=torch.float64), rtol=0, atol=0.02)


def test_int8_is_near_the_exact_target() -> None:
    kind, tapped, keys = made({"kind": "features", "name": "int8"}), teacher(3), torch.tensor([4, 5, 6])
    target = kind.decode(kind.encode(tapped, keys), keys, SHAPES)
    exact = kind.exact(tapped)
    assert target.index is None and kind.whole
    step = exact.value.abs().amax(-1, keepdim=True) * 2 / 255
    assert ((target.value - exact.value).abs() <= step * 1.01).all()
    assert made({"kind": "features"}).whole is False
    error = kind.statistics(tapped, target)["features"]["relative_error"]
    assert error.shape == (3, 1) and float(error.max()) < 1e-4


# ---------------------------------------------------------------- codebooks


def test_codes_are_the_nearest_entries_of_what_is_left() -> None:
    vectors, constants = torch.randn(3, 5, WIDTH, dtype=torch.float64), books(3)
    codes = codebooks.encode(vectors, constants)
    left = vectors
    for stage, book in enumerate(constants.double()):
        nearest = torch.cdist(left, book.expand(3, -1, -1)).argmin(-1)
        assert torch.equal(codes[..., stage].long(), nearest)
        left = left - book[nearest]
    torch.testing.assert_close(codebooks.decode(codes, constants), (vectors - left).float())


def test_codebooks_are_k_means_of_residuals_and_the_same_again() -> None:
    generator = torch.Generator().manual_seed(2)
    centres = 10 * torch.randn(300, 6, generator=generator)
    vectors = (centres[torch.arange(6000) % 300] + torch.randn(6000, 6, generator=generator)).float()
    made = codebooks.codebooks(vectors, 4)
    assert made.shape == (4, 256, 6) and torch.equal(made, codebooks.codebooks(vectors, 4))
    errors = []
    for stages in range(1, 5):
        left = vectors - codebooks.decode(codebooks.encode(vectors.double(), made[:stages]), made[:stages])
        errors.append(float(left.square().mean() / vectors.square().mean()))
    assert errors[0] < 0.05 and all(after < 0.5 * before for before, after in pairwise(errors))
    first = codebooks.encode(vectors.double(), made[:1])[..., 0].long()
    means = torch.stack([vectors[first == entry].mean(0) for entry in range(256)])  # no entry is without a vector
    assert float((means - made[0]).norm() / made[0].norm()) < 0.05  # nearly at rest


@pytest.mark.parametrize("count", [1, 3, 255])
def test_fewer_vectors_than_entries_come_back_as_they_are(count: int) -> None:
    vectors = torch.randn(count, 5)
    made = codebooks.codebooks(vectors, 2)
    assert made.isfinite().all()
    back = codebooks.decode(codebooks.encode(vectors.double(), made), made)
    torch.testing.assert_close(back, vectors, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- losses


def plain(loss: str, s: Tensor, t: Tensor) -> Tensor:
    """By the definitions, [B]."""
    if loss == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(s, t, dim=-1).mean(1)
    if loss == "mse":
        return (s - t).square().mean((1, 2))
    if loss == "l1":
        return (s - t).abs().mean((1, 2))
    return torch.nn.functional.smooth_l1_loss(s, t, reduction="none").mean((1, 2))


@pytest.mark.parametrize("loss", ["mse", "cosine", "smooth_l1", "l1"])
def test_losses_are_their_definitions_in_float64_and_gradcheck(loss: Any) -> None:
    kind = made({"kind": "features"}, loss=loss)
    s = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    t = torch.randn(2, 6, 5, dtype=torch.float64)
    index = torch.tensor([[0, 3], [1, 2]])
    value = t[:, :2]
    target = VectorTarget(index, value, value.norm(dim=-1))
    picked = torch.stack([s[0, index[0]], s[1, index[1]]])
    torch.testing.assert_close(kind.losses((s,), target)["features"].per_part()[:, 0], plain(loss, picked, value))
    assert torch.autograd.gradcheck(lambda x: kind.losses((x,), target)["features"].parts, (s,))


# ---------------------------------------------------------------- fidelity


@pytest.mark.parametrize(
    ("fields", "noise"),
    [({"tokens": 8, "bits": 2}, 8.0), ({"tokens": None, "bits": 2}, 2.0), ({"name": "int8"}, 1e-3)],
)
def test_fidelity_finds_no_bias_and_bounded_noise(fields: dict[str, Any], noise: float) -> None:
    kind = made({"kind": "features", **fields})
    torch.manual_seed(0)
    head = kind.head(STUDENT, SHAPES)
    moments = GradientMoments(48)
    for view in range(48):
        tapped, tokens = teacher(1, seed=view), torch.randn(1, 17, 12)

        def gradient(target: VectorTarget, tokens: Tensor = tokens) -> Tensor:
            answers = tuple(answer.detach().requires_grad_() for answer in head(tokens))
            parts = kind.losses(answers, target)["features"].parts
            return head.by_part(tokens, torch.autograd.grad(parts.mean(), answers), 1)

        keys = torch.tensor([2 * view, 2 * view + 1])
        draws = [gradient(kind.decode(kind.encode(tapped, key), key, SHAPES)) for key in (keys[:1], keys[1:])]
        moments.add({"features": gradient(kind.exact(tapped))}, [{"features": each} for each in draws])
    [found] = moments.summary().values()
    assert found["biased"] == [0.0] and found["noise_ratio"][0] < noise


# ---------------------------------------------------------------- recipes and layers


def test_records_take_the_stated_bytes() -> None:
    large = Shapes(16, 64, 197, 1, (14, 14))
    cases: dict[str, dict[str, Any]] = {
        "dither": {"kind": "features"},
        "1 bit": {"kind": "features", "bits": 1},
        "int8": {"kind": "features", "name": "int8"},
        "pq": {"kind": "features", "name": "pq"},
        "cls": {"kind": "cls"},
        "cls int8": {"kind": "cls", "name": "int8"},
    }
    sizes = {name: sum(spec.size_bytes for spec in made(fields).specs(large)) for name, fields in cases.items()}
    assert sizes == {"dither": 4224, "1 bit": 2176, "int8": 202272, "pq": 1568, "cls": 264, "cls int8": 1032}


@pytest.mark.parametrize("fields", [{"name": "int8", "bits": 2}, {"bits": 8}])
def test_bits_that_a_codec_does_not_have_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="bits: dither takes 1 or 2"):
        codec_config(kind="features", **fields)


def section(fields: dict[str, Any]) -> dict[str, Any]:
    kind = made(fields)
    parameters = codec_config(**fields).model_dump(mode="json")
    taps = [str(tap) for tap in kind.taps]
    return {"name": kind.name, "version": kind.version, "taps": taps, "parameters": parameters}


def test_a_layer_names_its_kind_and_whole_ones_serve_audits() -> None:
    whole, training = {"kind": "features", "name": "int8"}, made({"kind": "features"}, loss="cosine")
    assert stored_kind(section(whole)) == made(whole)
    audit = audit_kind(section(whole), training, SHAPES, None)
    tapped, keys = teacher(2), torch.tensor([1, 2])
    target = audit.decode(audit.encode(tapped, keys), keys, SHAPES)
    answers = (torch.randn(2, 16, WIDTH),)
    ours, exact = (
        each["features"].mean()
        for each in (audit.losses(answers, target), training.losses(answers, training.exact(tapped)))
    )
    torch.testing.assert_close(ours, exact, rtol=0, atol=2e-3)
    for other in ({"kind": "features"}, whole | {"at": "final"}, whole | {"target": "raw"}, {"name": "dense"}):
        with pytest.raises(CacheMismatch, match=r"no whole targets|another target"):
            audit_kind(section(other) | ({"taps": ["qkv@2"]} if "kind" not in other else {}), training, SHAPES, None)
