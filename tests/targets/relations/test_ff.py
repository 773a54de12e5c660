"""The relation ff: the contract, its rows by definition, gradcheck, refusals."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tinymim.configs.codecs.kinds import codec_config
from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets.contract import Tapped
from tinymim.targets.fidelity import GradientMoments
from tinymim.targets.kinds import audit_kind, make_kind, stored_kind
from tinymim.targets.relations.ff import FF
from tinymim.targets.relations.rows import Rows
from tinymim.tests.targets.contract import TargetKindContract

BLOCK, TOKENS, PREFIX, WIDTH = 2, 18, 2, 24
SHAPES = Shapes(4, 6, TOKENS, PREFIX, (4, 4))
STUDENT = Shapes(3, 4, 17, 1, (4, 4))
TAP = Tap("tokens")


def teacher(views: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tapped:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(views, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return dict.fromkeys((TAP, Tap("tokens", BLOCK), Tap("normed", BLOCK)), (tokens, tokens[:, :PREFIX]))


def made(**fields: Any) -> FF:
    targets = TargetsConfig(**fields.pop("targets", {}))
    kind = make_kind(codec_config(kind="ff", **fields), BLOCK, targets)
    assert isinstance(kind, FF)
    return kind


class TestFF(TargetKindContract):
    shapes: ClassVar[Shapes] = SHAPES
    student: ClassVar[Shapes] = STUDENT
    cases: ClassVar[Mapping[str, Any]] = {
        "sketch": {"rows": 5, "tail_k": 4, "tau": 0.2},
        "sketch, all rows, mlp": {"rows": 99, "head_k": 2, "tail_k": 3, "targets": {"projector": "mlp"}},
        "topk": {"name": "topk", "rows": 5, "head_k": 2, "at": "block", "tau": 0.5},
        "topk, ghost": {"name": "topk", "rows": 99, "head_k": 3, "tail": "ghost", "tau": 0.2},
        "dense": {"name": "dense", "at": "normed"},
    }
    golden: ClassVar[Mapping[str, str]] = {
        "sketch": "d12e050b1117aba7",
        "sketch, all rows, mlp": "4cc23132ee313678",
        "topk": "bd4b771c196527d0",
        "topk, ghost": "9907198b2c240407",
        "dense": "8ed2e3e631f12332",
    }
    refusals: ClassVar[Mapping[str, tuple[Callable[[], object], str]]] = {
        "head_k": (lambda: made(head_k=16).specs(SHAPES), r"codec\.head_k is too large"),
        "loss": (lambda: made(targets={"loss": "mse"}), r"targets\.loss is for another kind"),
        "grid": (lambda: made().head(Shapes(3, 4, 10, 1, (3, 3)), SHAPES), r"student\.img_size"),
    }

    def make(self, case: Any) -> FF:
        return made(**case)

    def tapped(self, views: int, seed: int = 0) -> Tapped:
        return teacher(views, seed)


def plain_rows(tokens: Tensor, tau: float) -> Tensor:
    """softmax of cosines / tau, [B, N, N]."""
    cosines = torch.nn.functional.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)
    return (cosines / tau).softmax(-1)


def test_rows_are_their_definition() -> None:
    tapped = teacher(2, dtype=torch.float64)
    [rows] = made().exact(tapped).values()
    torch.testing.assert_close(rows.dense()[:, 0], plain_rows(tapped[TAP][0][:, PREFIX:], 0.07))


@pytest.mark.parametrize("fields", [{"rows": 5}, {"name": "topk", "rows": 5}, {"name": "dense"}])
def test_the_loss_is_the_kl_of_its_definition_and_passes_gradcheck(fields: dict[str, Any]) -> None:
    kind, tapped = made(**fields, tau=0.3), teacher(2, dtype=torch.float64)
    answer = torch.randn(2, 16, 7, dtype=torch.float64, requires_grad=True)
    exact = kind.losses((answer,), kind.exact(tapped))["ff"]
    teachers, students = plain_rows(tapped[TAP][0][:, PREFIX:], 0.3), plain_rows(answer, 0.3)
    expected = (teachers * (teachers.log() - students.log())).sum(-1).mean(1)
    torch.testing.assert_close(exact.per_part()[:, 0], expected)
    keys = torch.tensor([1, 2])
    target = kind.decode(kind.encode(tapped, keys), keys, SHAPES)
    assert torch.autograd.gradcheck(lambda x: kind.losses((x,), target)["ff"].parts, (answer,))


def test_a_record_takes_the_stated_bytes() -> None:
    large = Shapes(16, 64, 197, 1, (14, 14))
    assert sum(spec.size_bytes for spec in made().specs(large)) == 516
    assert [spec.name for spec in made(head_k=1).specs(large)] == [
        f"ff_{name}" for name in ("head_gap", "head_code", "tail_gap", "entropy")
    ]


def test_draws_are_not_those_of_a_relation_layer() -> None:
    kind, keys = made(rows=5), torch.tensor([7])
    [rows] = kind.decode(kind.encode(teacher(1), keys), keys, SHAPES).values()
    [others] = kind._rows.decode(kind._rows.encode(kind._tapped(teacher(1)), keys), keys, kind._shapes(SHAPES)).values()
    assert rows.rows is not None and others.rows is not None and not torch.equal(rows.rows, others.rows)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tail_k": 0}, "tail_k: sketch"),
        ({"name": "topk", "tail_k": 1}, "tail_k"),
        ({"name": "topk", "head_k": 0}, "head_k"),
    ],
)
def test_what_a_record_cannot_hold_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        made(**fields)


def test_a_layer_names_its_kind_and_dense_ones_serve_audits() -> None:
    def section(kind: FF) -> dict[str, Any]:
        parameters = kind.config.model_dump(mode="json")
        return {"name": kind.name, "version": 1, "taps": ["tokens@0"], "parameters": parameters}

    stored = stored_kind(section(made()))
    assert isinstance(stored, FF) and (stored.config, stored.taps) == (made().config, made().taps)
    audit = audit_kind(section(made(name="dense")), made(), SHAPES, None)
    assert audit.whole and audit.meaning == made().meaning


@pytest.mark.parametrize(("fields", "biased"), [({"rows": 8}, 0.0), ({"name": "topk", "rows": 8, "head_k": 2}, 1.0)])
def test_fidelity_finds_the_bias_that_a_codec_has(fields: dict[str, Any], biased: float) -> None:
    kind, views = made(**fields, tau=0.3), 64
    moments, common = GradientMoments(views), torch.randn(1, TOKENS, WIDTH)
    student = torch.randn(1, 16, WIDTH)
    for view in range(views):
        tokens = teacher(1, seed=view)[TAP][0] + common  # a bias shows in what views share
        tapped = {TAP: (tokens, tokens[:, :PREFIX])}
        answer = student.clone().requires_grad_()

        def gradient(target: Rows, answer: Tensor = answer) -> Tensor:
            return torch.autograd.grad(kind.losses((answer,), target)["ff"].parts.mean(), answer)[0].flatten(1)

        keys = torch.tensor([2 * view, 2 * view + 1])
        drawn = [gradient(kind.decode(kind.encode(tapped, key), key, SHAPES)) for key in (keys[:1], keys[1:])]
        moments.add({"ff": gradient(kind.exact(tapped))}, [{"ff": each} for each in drawn])
    assert moments.summary()["ff"]["biased"] == [biased]
