"""The probe's gradients are autograd's own, and the reference student is one that fits."""

import math

import pytest
import torch
from torch import Tensor

from tinymim.configs.codecs import codec_config
from tinymim.configs.sections import ModelConfig
from tinymim.models import backbone
from tinymim.models.taps import StudentWithTap, split_qkv
from tinymim.models.vit import Normalise, build_vit
from tinymim.stages.units.gradients import COORDINATES_PER_TENSOR, GradientProbe, reference_student, target_of
from tinymim.targets.kinds import make_codec
from tinymim.targets.relations.fidelity import exact_target
from tinymim.targets.relations.losses import relation_loss
from tinymim.targets.relations.qkv import QKV

CONFIG = ModelConfig(img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=2)
HEADS = 3
PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def student() -> StudentWithTap:
    torch.manual_seed(0)
    return StudentWithTap(build_vit(CONFIG))


def teacher() -> QKV:
    torch.manual_seed(1)
    return QKV(*(torch.randn(2, HEADS, 17, 5) for _ in range(3)))


def test_gradients_are_those_of_a_backward_pass() -> None:
    made = student()
    exact = exact_target(teacher(), ("qk", "vv"))
    [found] = GradientProbe(made, HEADS)(PIXELS[1:], [target_of(exact, 1)])

    tapped = QKV(*split_qkv(made.tap(made.vit.forward_features(Normalise()(PIXELS[1:]))), 2)).resplit(HEADS)
    losses = relation_loss(tapped, target_of(exact, 1))
    trained = [p for p in made.parameters() if p.requires_grad]
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(
        torch.stack(list(losses.values())).sum(), trained, retain_graph=True, allow_unused=True
    )
    square = sum(float(g.square().sum()) for g in grads if g is not None)
    assert max(p.numel() for p in trained) <= COORDINATES_PER_TENSOR  # so that nothing is left out here
    assert float(found.gradients["all"].square().sum()) == pytest.approx(square, rel=1e-4)

    # A head's own part of the tap's weight: its rows in q and k (or v), all columns.
    for relation, sides in (("qk", (0, 1)), ("vv", (2,))):
        [weight] = torch.autograd.grad(losses[relation], [made.tap.weight], retain_graph=True)
        by_head = weight.reshape(3, HEADS, 4, 12)[list(sides)]  # side, head, channel, input
        for head in range(HEADS):
            ours = found.gradients[relation][head].reshape(12, len(sides), 4)
            torch.testing.assert_close(ours.permute(1, 2, 0), by_head[:, head], rtol=1e-4, atol=1e-8)


def test_large_tensors_are_sampled_without_changing_the_norm() -> None:
    torch.manual_seed(0)
    made = StudentWithTap(build_vit(ModelConfig(img_size=32, patch_size=8, embed_dim=96, depth=1, num_heads=2)))
    exact = exact_target(teacher(), ("qk",))
    [found] = GradientProbe(made, HEADS)(PIXELS[:1], [target_of(exact, 0)])
    tapped = QKV(*made(Normalise()(PIXELS[:1]))).resplit(HEADS)
    trained = [p for p in made.parameters() if p.requires_grad]
    loss = relation_loss(tapped, target_of(exact, 0))["qk"]
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(loss, trained, allow_unused=True)
    square = sum(float(g.square().sum()) for g in grads if g is not None)
    assert found.gradients["all"].numel() < sum(p.numel() for p in trained)
    assert float(found.gradients["all"].norm()) == pytest.approx(math.sqrt(square), rel=0.1)


def test_a_batch_splits_into_its_views() -> None:
    keys = torch.tensor([5, 6])
    for fields in ({"rows": 4}, {"name": "dense"}):
        codec = make_codec(codec_config(**fields))
        whole = codec.decode(codec.encode(teacher(), keys), keys, 17)
        for row in range(2):
            block = teacher().pick(torch.tensor([row]))
            alone = codec.decode(codec.encode(block, keys[row : row + 1]), keys[row : row + 1], 17)
            for relation, rows in target_of(whole, row).items():
                assert torch.equal(rows.dense(), alone[relation].dense())
                assert torch.equal(rows.entropy, alone[relation].entropy)


@pytest.mark.parametrize(("heads", "width"), [(16, 192), (6, 192), (5, 240), (12, 192)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_reference_student_has_the_teachers_tokens(heads: int, width: int, prefix: int) -> None:
    state = torch.random.get_rng_state()
    made = reference_student(ModelConfig(img_size=32), (4, 4), prefix, heads)
    assert torch.equal(state, torch.random.get_rng_state())
    assert (backbone.grid(made.vit), backbone.prefix_tokens(made.vit)) == ((4, 4), prefix)
    assert made.vit.embed_dim == width and width % heads == 0
    q, _, _ = made(torch.zeros(1, 3, 32, 32))
    assert q.shape[2] == 16 + prefix
    again = reference_student(ModelConfig(img_size=32), (4, 4), prefix, heads)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))
