"""Class logits: the contract, the sparse loss against a dense float64 one, bytes, classes that do not fit."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tinymim.configs.codecs import codec_config
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets.contract import Tapped
from tinymim.targets.fidelity import GradientMoments
from tinymim.targets.kinds import audit_kind, make_kind, stored_kind
from tinymim.targets.logits.kind import Logits, LogitTarget
from tinymim.tests.targets.contract import TargetKindContract

TAP, CLASSES = Tap("logits"), 300
SHAPES = Shapes(4, 6, 17, 1, (4, 4))
STUDENT = Shapes(3, 4, 17, 1, (4, 4))


def teacher(views: int, seed: int = 0, classes: int = CLASSES) -> Tapped:
    return {TAP: (2 * torch.randn(views, classes, generator=torch.Generator().manual_seed(seed)),)}


def made(**fields: Any) -> Logits:
    kind = make_kind(codec_config(kind="logits", **({"classes": CLASSES} | fields)), 1)
    assert isinstance(kind, Logits)
    return kind


class TestLogits(TargetKindContract):
    shapes: ClassVar[Shapes] = SHAPES
    student: ClassVar[Shapes] = STUDENT
    cases: ClassVar[Mapping[str, Any]] = {
        "draws": {},
        "draws, no head, T 2": {"head_k": 0, "temperature": 2},
        "draws, fp16": {"values": "float16", "head_k": 2, "tail_k": 3},
        "topk": {"name": "topk"},
        "topk, fp16": {"name": "topk", "values": "float16", "head_k": 3},
        "dense": {"name": "dense"},
    }
    golden: ClassVar[Mapping[str, str]] = {
        "draws": "542b3ad341e5fe63",
        "draws, no head, T 2": "3faa22284fde49c7",
        "draws, fp16": "5128252e941908b4",
        "topk": "6a71c2935041f2a8",
        "topk, fp16": "d611542f0503e75d",
        "dense": "2f38f20a079d8210",
    }
    refusals: ClassVar[Mapping[str, tuple[Callable[[], object], str]]] = {
        "classes": (
            lambda: made(classes=299).encode(teacher(1), torch.tensor([1])),
            r"another number of classes\n  got: codec\.classes 299",
        ),
    }

    def make(self, case: Any) -> Logits:
        return made(**case)

    def tapped(self, views: int, seed: int = 0) -> Tapped:
        return teacher(views, seed)


# ---------------------------------------------------------------- loss


def dense_loss(z: Tensor, target: LogitTarget, temperature: float) -> Tensor:
    """The published loss: the target written out, [B]."""
    return -(target.dense(z.shape[-1]) * (z / temperature).log_softmax(-1)).sum(-1) * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", ["draws", "topk", "dense"])
def test_the_sparse_loss_is_the_dense_one_and_passes_gradcheck(name: Any, temperature: float) -> None:
    kind, keys = made(name=name, classes=21, temperature=temperature), torch.tensor([5, 6])
    target = kind.decode(kind.encode(teacher(2, classes=21), keys), keys, SHAPES)
    z = torch.randn(2, 21, dtype=torch.float64, requires_grad=True)
    found = kind.losses((z,), target)["logits"]
    torch.testing.assert_close(found.parts[:, 0], dense_loss(z, target, temperature), check_dtype=False)
    assert torch.autograd.gradcheck(lambda x: kind.losses((x,), target)["logits"].parts, (z,))


def test_kept_mass_that_fp16_rounds_above_one_leaves_no_negative_share() -> None:
    kind, keys = made(name="topk", values="float16", head_k=9, classes=11), torch.tensor([1])
    logits = torch.zeros(1, 11)
    logits[:, 9:] = -40.0
    for shift in torch.linspace(0, 2, 50):
        logits[:, 0] = shift
        target = kind.decode(kind.encode({TAP: (logits,)}, keys), keys, SHAPES)
        assert (target.share >= 0).all() and target.entropy.isfinite().all()


def test_a_perfect_student_has_no_loss() -> None:
    kind, tapped = made(temperature=2.0), teacher(3)
    torch.testing.assert_close(kind.losses(tapped[TAP], kind.exact(tapped))["logits"].per_part(), torch.zeros(3, 1))


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("classes", [12, 256, 257, 1000, 21841, 65536])
@pytest.mark.parametrize("name", ["draws", "topk"])
def test_class_numbers_come_back(name: Any, classes: int) -> None:
    kind, keys, tapped = made(name=name, classes=classes), torch.arange(4), teacher(4, classes=classes)
    target = kind.decode(kind.encode(tapped, keys), keys, SHAPES)
    assert target.index is not None
    largest = tapped[TAP][0].topk(kind.config.head_k).indices.sort(-1).values
    assert torch.equal(target.index[:, : kind.config.head_k], largest)
    assert int(target.index.max()) < classes
    torch.testing.assert_close(target.dense(classes).sum(-1), torch.ones(4), rtol=0, atol=1e-5)


def test_a_record_of_ten_classes_leaves_room_for_the_digest_in_32_bytes() -> None:
    sizes = {
        name: sum(spec.size_bytes for spec in made(name=name, classes=1000).specs(SHAPES)) for name in ("draws", "topk")
    }
    assert sizes == {"draws": 21, "topk": 23}
    assert max(sizes.values()) + 4 < 32  # TinyViT's: 44 and the keys
    large = made(name="topk", classes=21841, head_k=100)
    assert sum(spec.size_bytes for spec in large.specs(SHAPES)) == 288  # TinyViT's: 404


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_k": 300}, "head_k must leave a class"),
        ({"name": "topk", "head_k": 300}, "head_k must leave a class"),
        ({"tail_k": 0}, "tail_k: draws needs"),
        ({"name": "topk", "tail_k": 2}, "tail_k: draws needs"),
        ({"name": "topk", "head_k": 0}, "head_k: topk needs"),
        ({"classes": 70000}, "classes"),
    ],
)
def test_what_a_record_cannot_hold_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        made(**fields)


def test_a_layer_names_its_kind_and_dense_ones_serve_audits() -> None:
    def section(kind: Logits) -> dict[str, Any]:
        parameters = kind.config.model_dump(mode="json")
        return {"name": kind.name, "version": 1, "taps": ["logits@0"], "parameters": parameters}

    kind = made()
    assert stored_kind(section(kind)) == kind
    dense = made(name="dense")
    assert audit_kind(section(dense), kind, SHAPES, None) == dense


# ---------------------------------------------------------------- fidelity


@pytest.mark.parametrize(("fields", "biased"), [({}, 0.0), ({"name": "topk"}, 1.0), ({"name": "dense"}, 0.0)])
def test_fidelity_finds_the_bias_that_a_codec_has(fields: dict[str, Any], biased: float) -> None:
    kind, views = made(**fields), 64
    torch.manual_seed(0)
    head = kind.head(STUDENT, SHAPES)
    moments = GradientMoments(views)
    common = teacher(1, seed=99)[TAP][0]
    for view in range(views):
        tapped = {TAP: (teacher(1, seed=view)[TAP][0] + common,)}  # a bias shows in what views share
        answers = tuple(answer.detach().requires_grad_() for answer in head(torch.randn(1, 17, 12)))

        def gradient(target: LogitTarget, answers: tuple[Tensor, ...] = answers) -> Tensor:
            parts = kind.losses(answers, target)["logits"].parts
            return torch.autograd.grad(parts.mean(), answers)[0]

        keys = torch.tensor([2 * view, 2 * view + 1])
        drawn = [gradient(kind.decode(kind.encode(tapped, key), key, SHAPES)) for key in (keys[:1], keys[1:])]
        moments.add({"logits": gradient(kind.exact(tapped))}, [{"logits": each} for each in drawn])
    assert moments.summary()["logits"]["biased"] == [biased]
