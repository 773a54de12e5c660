"""Distances of relations: against their definitions in float64, gradcheck, and audits by the same distance."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tinymim.configs.codecs.kinds import codec_config
from tinymim.configs.errors import RecipeError
from tinymim.configs.taps import Shapes
from tinymim.targets.fidelity import GradientMoments
from tinymim.targets.kinds import audit_kind
from tinymim.targets.relations.distances import RelationDistance
from tinymim.tests.targets.relations.test_contract import HEADS, TAP, TOKENS, WIDTH, made, teacher

SHAPES = Shapes(HEADS, WIDTH // HEADS, TOKENS, 1, (4, 4))


def plain(loss: str, logits: bool, s: Tensor, t: Tensor) -> Tensor:
    """By the definitions, from logits [B, H, Q, T]: [B, H]."""
    if not logits:
        s, t = s.softmax(-1), t.softmax(-1)
    if loss == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(s, t, dim=-1).mean(-1)
    error = (s - t).abs() if loss == "l1" else (s - t).square()
    return (error.mean(-1) if logits else error.sum(-1)).mean(-1)


@pytest.mark.parametrize("logits", [False, True], ids=["softmaxed", "before the softmax"])
@pytest.mark.parametrize("loss", ["mse", "l1", "cosine"])
def test_distances_are_their_definitions_in_float64_and_pass_gradcheck(loss: str, logits: bool) -> None:
    kind = made({"name": "hidden"}, loss=loss, before_softmax=logits, relations=("qk", "vv"))
    assert isinstance(kind, RelationDistance) and kind.measure == "distance"
    generator = torch.Generator().manual_seed(1)
    theirs = 2 * torch.randn(3, 2, HEADS, 5, 6, generator=generator, dtype=torch.float64)
    ours = (2 * torch.randn(3, 2, HEADS, 5, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    x = torch.zeros(2, 5, WIDTH, dtype=torch.float64)
    target = kind.exact({TAP: (*theirs, x)})
    found = kind.losses(tuple(ours), target)
    for name, (a, b) in {"qk": (0, 1), "vv": (2, 2)}.items():
        s, t = ours[a] @ ours[b].mT / 3**0.5, theirs[a] @ theirs[b].mT / 6**0.5
        torch.testing.assert_close(found[name].per_part(), plain(loss, logits, s, t))

    def parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack([each.parts for each in kind.losses((q, k, v), target).values()])

    assert torch.autograd.gradcheck(parts, tuple(side.detach().requires_grad_() for side in ours))


@pytest.mark.parametrize("loss", ["mse", "l1", "cosine"])
def test_a_student_like_its_teacher_has_no_distance(loss: str) -> None:
    tapped = teacher(2)
    for fields in ({"name": "dense"}, {"name": "hidden", "targets": {"before_softmax": True}}):
        kind = made(fields, loss=loss)
        for found in kind.losses(tapped[TAP][:3], kind.exact(tapped)).values():
            torch.testing.assert_close(found.per_part(), torch.zeros(2, HEADS), rtol=0, atol=1e-5)


def test_decoded_logits_are_those_of_the_codecs_softmax_and_near_the_teachers() -> None:
    kind, tapped, keys = made({"name": "hidden"}, before_softmax=True, rows=7), teacher(2), torch.tensor([1, 2])
    arrays, exact = kind.encode(tapped, keys), kind.exact(tapped)
    target, softmaxed = (each.decode(arrays, keys, SHAPES) for each in (kind, made({"name": "hidden"}, rows=7)))
    for name, held in target.items():
        assert torch.equal(held.value.softmax(-1), softmaxed[name].probs)
        wanted = exact[name].value.gather(2, held.rows[..., None].expand(-1, -1, -1, TOKENS))
        found = kind.statistics(tapped, target)[name]["relative_error"].mean().sqrt()
        error = float((held.value - wanted).norm() / wanted.norm())
        assert 0 < error < 0.1 and float(found) == pytest.approx(error, rel=0.5)


def test_audits_compare_by_the_distance_of_training_and_refuse_what_they_do_not_hold() -> None:
    dense = {"name": "dense", "version": 1, "taps": ["qkv@2"], "parameters": codec_config(name="dense").model_dump()}
    audit = audit_kind(dense, made({"name": "hidden"}, loss="l1"), SHAPES, None)
    assert isinstance(audit, RelationDistance) and (audit.loss, audit.before_softmax) == ("l1", False)
    with pytest.raises(RecipeError, match="before their softmax"):
        audit_kind(dense, made({"name": "hidden"}, before_softmax=True), SHAPES, None)


@pytest.mark.parametrize("loss", ["mse", "l1", "cosine"])
def test_fidelity_finds_no_bias_in_sampled_rows(loss: Any) -> None:
    kind, views = made({"name": "dense"}, loss=loss, rows=5), 48
    torch.manual_seed(0)
    head = kind.head(Shapes(3, 4, TOKENS, 1, (4, 4)), SHAPES)
    moments = GradientMoments(views)
    for view in range(views):
        tapped, tokens = teacher(1, seed=view), torch.randn(1, TOKENS, 12)

        def gradient(target: Any, tokens: Tensor = tokens) -> Tensor:
            answers = tuple(answer.detach().requires_grad_() for answer in head(tokens))
            mean = torch.stack([each.parts.mean() for each in kind.losses(answers, target).values()]).sum()
            return head.by_part(tokens, torch.autograd.grad(mean, answers), HEADS)

        keys = torch.tensor([2 * view, 2 * view + 1])
        drawn = [gradient(kind.decode(kind.encode(tapped, key), key, SHAPES)) for key in (keys[:1], keys[1:])]
        moments.add({"all": gradient(kind.exact(tapped))}, [{"all": each} for each in drawn])
    [found] = moments.summary().values()
    assert sum(found["biased"]) == 0.0
