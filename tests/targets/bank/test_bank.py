"""The bank of anchors: the contract, loss and gradient against float64, bytes, anchors."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tinymim.configs.codecs.kinds import codec_config
from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets.bank.kind import Bank
from tinymim.targets.contract import Tapped
from tinymim.targets.counter import uniforms
from tinymim.targets.kinds import audit_kind, make_kind
from tinymim.tests.targets.contract import TargetKindContract

TAP, ANCHORS, WIDTH = Tap("cls"), 300, 24
SHAPES = Shapes(4, 6, 17, 1, (4, 4))
STUDENT = Shapes(3, 4, 17, 1, (4, 4))
# Where calibrated anchors would have other last bits in other builds.
VECTORS = uniforms(torch.tensor([1]), 0, (ANCHORS, WIDTH))[0] - 0.5
CONSTANTS = {"anchors": (VECTORS / VECTORS.norm(dim=-1, keepdim=True)).float()}


def teacher(views: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tapped:
    vectors = torch.randn(views, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return {tap: (vectors,) for tap in (TAP, Tap("cls", 2), Tap("pooled"))}


def made(targets: TargetsConfig | None = None, **fields: Any) -> Bank:
    config = codec_config(kind="bank", **({"anchors": ANCHORS} | fields))
    kind = make_kind(config, 2, targets or TargetsConfig(), CONSTANTS)
    assert isinstance(kind, Bank)
    return kind


class TestBank(TargetKindContract):
    shapes: ClassVar[Shapes] = SHAPES
    student: ClassVar[Shapes] = STUDENT
    cases: ClassVar[Mapping[str, Any]] = {
        "draws": {},
        "draws, of a block": {"tail_k": 9, "at": "block", "tau": 0.3},
        "draws, exact head": {"head_k": 4, "tail_k": 10},
        "draws, fp16, pooled": {"values": "float16", "head_k": 2, "tail_k": 3, "at": "pooled"},
        "dense": {"name": "dense"},
    }
    golden: ClassVar[Mapping[str, str]] = {
        "draws": "1ca278b84d1a8fc3",
        "draws, of a block": "9df320a430eee801",
        "draws, exact head": "c62f8be10d6c69c9",
        "draws, fp16, pooled": "c183950074ad864b",
        "dense": "0275c3b39e8000ef",
    }
    refusals: ClassVar[Mapping[str, tuple[Callable[[], object], str]]] = {
        "loss": (lambda: made(TargetsConfig(loss="mse")), r"targets\.loss is for another kind"),
    }

    def make(self, case: Any) -> Bank:
        return made(**case)

    def tapped(self, views: int, seed: int = 0) -> Tapped:
        return teacher(views, seed)


def test_the_loss_is_that_of_the_softmax_over_the_anchors_and_passes_gradcheck() -> None:
    kind, tapped, keys = made(tau=0.3), teacher(2, dtype=torch.float64), torch.tensor([5, 6])
    s = torch.randn(2, 1, WIDTH, dtype=torch.float64, requires_grad=True)
    anchors = CONSTANTS["anchors"].double()

    def cosines(vectors: Tensor) -> Tensor:
        return cosine_similarity(vectors[:, None], anchors[None], dim=-1) / 0.3

    wanted = cosines(tapped[TAP][0]).softmax(-1)
    kl = (wanted * (wanted.log() - cosines(s[:, 0]).log_softmax(-1))).sum(-1)
    torch.testing.assert_close(kind.losses((s,), kind.exact(tapped))["bank"].per_part()[:, 0], kl)
    target = kind.decode(kind.encode(tapped, keys), keys, SHAPES)
    assert torch.autograd.gradcheck(lambda x: kind.losses((x,), target)["bank"].parts, (s,))


def test_a_record_takes_the_stated_bytes() -> None:
    assert sum(spec.size_bytes for spec in made(anchors=1024).specs(SHAPES)) == 26


def test_anchors_are_unit_vectors_of_the_calibration_views_and_repeat_where_there_are_few() -> None:
    kind = made(anchors=5)
    batches = [teacher(2, seed=1), teacher(1, seed=2)]
    found = kind.calibrate(batches, lambda _tap: (torch.zeros(0), None))["anchors"]
    vectors = torch.cat([batch[TAP][0] for batch in batches])
    torch.testing.assert_close(found, (vectors / vectors.norm(dim=-1, keepdim=True))[[0, 1, 2, 0, 1]])
    assert kind.calibration_views == 5


def test_draws_are_not_those_of_a_layer_of_logits() -> None:
    kind, key, tapped = made(tail_k=5), torch.tensor([7]), teacher(1)
    own, others = kind.encode(tapped, key), kind._logits.encode(kind._tapped(tapped), key)
    assert not torch.equal(own["low"], others["low"])


def test_dense_layers_serve_audits() -> None:
    parameters = codec_config(kind="bank", name="dense", anchors=ANCHORS).model_dump(mode="json")
    section = {"name": "dense", "version": 1, "taps": ["cls@0"], "parameters": parameters}
    audit = audit_kind(section, made(), SHAPES, CONSTANTS)
    assert audit.whole and audit.meaning == made().meaning


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"tail_k": 0}, "tail_k: draws"), ({"name": "dense", "tail_k": 2}, "tail_k: draws"), ({"head_k": 300}, "head_k")],
)
def test_what_a_record_cannot_hold_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        made(**fields)
