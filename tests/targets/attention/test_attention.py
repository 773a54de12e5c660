"""Attention logits: the contract, loss and gradient against float64, refusals."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tinymim.configs.codecs.kinds import codec_config
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets.attention.kind import Attention, AttentionTarget
from tinymim.targets.contract import Tapped
from tinymim.targets.fidelity import GradientMoments
from tinymim.targets.kinds import audit_kind, make_kind, stored_kind
from tinymim.tests.targets.contract import TargetKindContract

BLOCK, HEADS, TOKENS, PREFIX, HEAD_DIM = 2, 4, 18, 2, 6
SHAPES = Shapes(HEADS, HEAD_DIM, TOKENS, PREFIX, (4, 4))
STUDENT = Shapes(3, 4, TOKENS, PREFIX, (4, 4))
TAP = Tap("attention", BLOCK)


def given(q: Tensor, k: Tensor) -> Tapped:
    return {TAP: (q, k, q[:, :, :PREFIX])}


def teacher(views: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tapped:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, views, HEADS, TOKENS, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)
    return given(q, k)


def made(**fields: Any) -> Attention:
    kind = make_kind(codec_config(kind="attention", **fields), BLOCK)
    assert isinstance(kind, Attention)
    return kind


class TestAttention(TargetKindContract):
    shapes: ClassVar[Shapes] = SHAPES
    student: ClassVar[Shapes] = STUDENT
    largest: ClassVar[float] = 155.0  # of q and k: logits of 6e4
    cases: ClassVar[Mapping[str, Any]] = {
        "rows": {"rows": 5},
        "all rows": {"rows": 99},
        "rows of patches": {"rows": 5, "prefix": False},
        "dense": {"name": "dense"},
        "dense, patches": {"name": "dense", "prefix": False},
    }
    golden: ClassVar[Mapping[str, str]] = {
        "rows": "698ca59ff47a2707",
        "all rows": "9182ef482630cb4a",
        "rows of patches": "99a2a97fadfd573d",
        "dense": "9eaad55af6d701ff",
        "dense, patches": "ec9bdf8cf7963ddd",
    }
    refusals: ClassVar[Mapping[str, tuple[Callable[[], object], str]]] = {
        "grid": (lambda: made().head(Shapes(3, 4, 11, 2, (3, 3)), SHAPES), r"student\.img_size"),
        "prefix": (lambda: made().head(Shapes(3, 4, 17, 1, (4, 4)), SHAPES), r"got: codec\.prefix true"),
    }

    def make(self, case: Any) -> Attention:
        return made(**case)

    def tapped(self, views: int, seed: int = 0) -> Tapped:
        return teacher(views, seed)


@pytest.mark.parametrize("prefix", [True, False])
def test_the_target_is_the_scaled_product(prefix: bool) -> None:
    tapped = teacher(2, dtype=torch.float64)
    q, k, _ = (side[:, :, 0 if prefix else PREFIX :] for side in tapped[TAP])
    exact = made(prefix=prefix).exact(tapped)
    torch.testing.assert_close(exact.logits, torch.einsum("bhqd,bhkd->bhqk", q, k) / HEAD_DIM**0.5)


def test_the_loss_is_the_squared_error_behind_a_1x1_convolution_and_passes_gradcheck() -> None:
    kind, tapped = made(), teacher(2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 2, 3, TOKENS, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(HEADS, 3, generator=generator, dtype=torch.float64).requires_grad_()
    exact = kind.exact(tapped)
    mixed = torch.nn.functional.conv2d(q @ k.mT / 2, weight[:, :, None, None])
    answers = (q, k, weight.expand(2, -1, -1))
    found = kind.losses(answers, exact)["attention"].per_part()[:, 0]
    torch.testing.assert_close(found, (mixed - exact.logits).square().mean((1, 2, 3)))
    keys = torch.tensor([1, 2])
    target = kind.decode(kind.encode(tapped, keys), keys, SHAPES)

    def loss(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
        return kind.losses((q, k, weight.expand(2, -1, -1)), target)["attention"].parts

    leaves = tuple(each.detach().requires_grad_() for each in (q, k, weight))
    assert torch.autograd.gradcheck(loss, leaves)


def test_a_decoded_row_is_within_a_step_of_the_teachers() -> None:
    kind, tapped, keys = made(rows=5), teacher(3), torch.tensor([4, 5, 6])
    arrays = kind.encode(tapped, keys)
    target, exact = kind.decode(arrays, keys, SHAPES), kind.exact(tapped).logits
    assert target.rows is not None and target.rows.shape == (3, 5)
    rows = exact.gather(2, target.rows[:, None, :, None].expand(-1, HEADS, -1, TOKENS))
    assert ((target.logits - rows).abs() <= arrays["step"][..., None] * 1.001).all()
    torch.testing.assert_close(target.square, rows.square().mean((1, 2, 3)))
    assert float(kind.statistics(tapped, target)["attention"]["relative_error"].max()) < 1e-4


def test_heads_without_an_equal_number_and_with_one_have_an_adapter() -> None:
    for heads in (3, HEADS):
        head = made().head(Shapes(heads, 4, TOKENS, PREFIX, (4, 4)), SHAPES)
        shapes = {name: tuple(each.shape) for name, each in head.named_parameters()}
        assert shapes["adapter"] == (HEADS, heads) and len(shapes) == 3  # no bias of its own


def test_records_take_the_stated_bytes() -> None:
    large = Shapes(16, 64, 197, 1, (14, 14))
    sizes = [sum(spec.size_bytes for spec in made(**each).specs(large)) for each in ({}, {"name": "dense"})]
    assert sizes == [52484, 2483780]


def test_a_layer_names_its_kind_and_dense_ones_serve_audits() -> None:
    def section(kind: Attention) -> dict[str, Any]:
        parameters = kind.config.model_dump(mode="json")
        return {"name": kind.name, "version": 1, "taps": ["attention@2"], "parameters": parameters}

    assert stored_kind(section(made())) == made()
    assert audit_kind(section(made(name="dense")), made(), SHAPES, None) == made(name="dense")


def test_fidelity_finds_no_bias() -> None:
    kind, views = made(rows=5), 64
    torch.manual_seed(0)
    head, moments = made().head(STUDENT, SHAPES), GradientMoments(views)
    for view in range(views):
        tapped, tokens = teacher(1, seed=view), torch.randn(1, TOKENS, 12)

        def gradient(target: AttentionTarget, tokens: Tensor = tokens) -> Tensor:
            answers = tuple(answer.detach().requires_grad_() for answer in head(tokens))
            parts = kind.losses(answers, target)["attention"].parts
            return head.by_part(tokens, torch.autograd.grad(parts.mean(), answers), 1)

        keys = torch.tensor([2 * view, 2 * view + 1])
        drawn = [gradient(kind.decode(kind.encode(tapped, key), key, SHAPES)) for key in (keys[:1], keys[1:])]
        moments.add({"attention": gradient(kind.exact(tapped))}, [{"attention": each} for each in drawn])
    [found] = moments.summary().values()
    assert found["biased"] == [0.0] and found["noise_ratio"][0] < 3
