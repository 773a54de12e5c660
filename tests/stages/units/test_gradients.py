"""The probe's gradients are autograd's own, and the reference student is one that fits."""

import math

import pytest
import torch
from torch import Tensor

from tinymim.configs.codecs.kinds import codec_config
from tinymim.configs.sections.models import ModelConfig
from tinymim.configs.taps import Shapes
from tinymim.models import backbone
from tinymim.models.student import StudentModel, shapes_of
from tinymim.models.vit import Normalise, build_vit
from tinymim.stages.units.gradients import COORDINATES_PER_TENSOR, GradientProbe, reference_student
from tinymim.targets.kinds import make_kind
from tinymim.targets.relations.head import RelationHead
from tinymim.targets.relations.kind import exact_rows
from tinymim.targets.relations.qkv import QKV
from tinymim.targets.relations.rows import Rows
from tinymim.tests.targets.relations.plain import relation_loss, shapes

CONFIG = ModelConfig(img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=2)
HEADS = 3
PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


KIND = make_kind(codec_config(relation_heads=HEADS), 1)
SHAPES = shapes(HEADS, 17, 5)


def student(config: ModelConfig = CONFIG) -> StudentModel:
    torch.manual_seed(0)
    vit = build_vit(config)
    return StudentModel(vit, KIND.head(shapes_of(vit), SHAPES))


def teacher() -> QKV:
    torch.manual_seed(1)
    return QKV(*(torch.randn(2, HEADS, 17, 5) for _ in range(3)))


def one(target: Rows, row: int) -> Rows:
    picked: Rows = KIND.pick(target, slice(row, row + 1))
    return picked


def test_gradients_are_those_of_a_backward_pass() -> None:
    made = student()
    exact = exact_rows(teacher(), ("qk", "vv"))
    [found] = GradientProbe(KIND, made, SHAPES)(PIXELS[1:], [one(exact, 1)])

    tapped = QKV(*made(Normalise()(PIXELS[1:]))).resplit(HEADS)
    losses = relation_loss(tapped, one(exact, 1))
    trained = [p for p in made.parameters() if p.requires_grad]
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(
        torch.stack(list(losses.values())).sum(), trained, retain_graph=True, allow_unused=True
    )
    square = sum(float(g.square().sum()) for g in grads if g is not None)
    assert max(p.numel() for p in trained) <= COORDINATES_PER_TENSOR  # so that nothing is left out here
    assert float(found.gradients["all"].square().sum()) == pytest.approx(square, rel=1e-4)

    # A relation head's own part of the student head's weight: its rows in q and k (or v), all columns.
    assert isinstance(made.head, RelationHead)
    for relation, sides in (("qk", (0, 1)), ("vv", (2,))):
        assert float(found.losses[relation].mean()) == pytest.approx(losses[relation].item(), rel=1e-5)
        [weight] = torch.autograd.grad(
            losses[relation], [made.head.projection.get_parameter("weight")], retain_graph=True
        )
        by_head = weight.reshape(3, HEADS, 4, 12)[list(sides)]  # side, head, channel, input
        for head in range(HEADS):
            ours = found.gradients[relation][head].reshape(12, len(sides), 4)
            torch.testing.assert_close(ours.permute(1, 2, 0), by_head[:, head], rtol=1e-4, atol=1e-8)


def test_large_tensors_are_sampled_without_changing_the_norm() -> None:
    made = student(ModelConfig(img_size=32, patch_size=8, embed_dim=96, depth=1, num_heads=2))
    exact = exact_rows(teacher(), ("qk",))
    [found] = GradientProbe(KIND, made, SHAPES)(PIXELS[:1], [one(exact, 0)])
    tapped = QKV(*made(Normalise()(PIXELS[:1]))).resplit(HEADS)
    trained = [p for p in made.parameters() if p.requires_grad]
    loss = relation_loss(tapped, one(exact, 0))["qk"]
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(loss, trained, allow_unused=True)
    square = sum(float(g.square().sum()) for g in grads if g is not None)
    assert found.gradients["all"].numel() < sum(p.numel() for p in trained)
    assert float(found.gradients["all"].norm()) == pytest.approx(math.sqrt(square), rel=0.1)


@pytest.mark.parametrize(("heads", "width"), [(16, 192), (6, 192), (5, 240), (12, 192)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_reference_student_has_the_teachers_tokens(heads: int, width: int, prefix: int) -> None:
    state = torch.random.get_rng_state()
    kind, sizes = make_kind(codec_config(), 1), Shapes(heads, 8, 16 + prefix, prefix, (4, 4))
    made = reference_student(kind, 32, sizes)
    assert torch.equal(state, torch.random.get_rng_state())
    assert (backbone.grid(made.vit), backbone.prefix_tokens(made.vit)) == ((4, 4), prefix)
    assert made.vit.embed_dim == width and width % heads == 0
    q, _, _ = made(torch.zeros(1, 3, 32, 32))
    assert q.shape[2] == 16 + prefix
    again = reference_student(kind, 32, sizes)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))
