"""The loss against TinyMIM's formula in float64, its gradient, and the unbiasedness of the sketch (I4)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tinymim.configs.codecs.kinds import codec_config
from tinymim.configs.codecs.relations import Relation
from tinymim.targets.relations.losses import cross_entropy_per_head
from tinymim.targets.relations.qkv import QKV, relation_probs
from tinymim.targets.relations.rows import DenseRows, Rows, SparseRows
from tinymim.tests.targets.relations.plain import make_codec, relation_loss

MakeQKV = Callable[..., QKV]
SIDES = {"qk": ("q", "k"), "vv": ("v", "v"), "qq": ("q", "q"), "kk": ("k", "k")}
BOTH: tuple[Relation, ...] = ("qk", "vv")


def tinymim_loss(student: QKV, teacher: QKV, relation: Relation) -> Tensor:
    """TinyMIM's relation loss as published: KL(softmax(A B^T / sqrt d) of the teacher || the student's)."""

    def log_map(x: QKV) -> Tensor:
        a, b = (getattr(x, side) for side in SIDES[relation])
        return torch.log_softmax(a @ b.mT / a.shape[-1] ** 0.5, dim=-1)

    log_s, log_t = log_map(student), log_map(teacher)
    return torch.nn.functional.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1).mean()


def exact_target(teacher: QKV, relations: tuple[Relation, ...] = BOTH) -> Rows:
    """The dense rows without a codec, in the teacher's dtype."""
    probs = {relation: relation_probs(teacher, relation) for relation in relations}
    return {r: DenseRows(None, p, torch.special.entr(p).sum(-1).mean((1, 2))) for r, p in probs.items()}


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


# ---------------------------------------------------------------- the formula


def test_dense_loss_is_tinymims(make_qkv: MakeQKV) -> None:
    teacher, student = make_qkv(3, 4, 11, 6), make_qkv(3, 3, 11, 8, seed=1).resplit(4)
    relations: tuple[Relation, ...] = ("qk", "vv", "qq", "kk")
    losses = relation_loss(student, exact_target(teacher, relations))
    assert tuple(losses) == relations
    for relation in relations:
        expected = tinymim_loss(student, teacher, relation)
        torch.testing.assert_close(losses[relation], expected, rtol=0, atol=1e-12)


def test_dense_codec_is_tinymims_to_fp16(make_qkv: MakeQKV) -> None:
    teacher, student, keys = make_qkv(3, 4, 11, 6), make_qkv(3, 4, 11, 6, seed=1), torch.arange(3)
    codec = make_codec(codec_config(name="dense"))
    losses = relation_loss(student, codec.decode(codec.encode(teacher, keys), keys, 11))
    for relation in BOTH:
        expected = tinymim_loss(student, teacher, relation)
        assert losses[relation].item() == pytest.approx(expected.item(), abs=2e-3)


def test_a_perfect_student_has_no_loss_and_no_gradient(make_qkv: MakeQKV) -> None:
    teacher = make_qkv(2, 2, 11, 6)
    student = QKV(*(x.clone().requires_grad_() for x in (teacher.q, teacher.k, teacher.v)))
    loss = total(relation_loss(student, exact_target(teacher)))
    assert abs(loss.item()) < 1e-12
    for gradient in torch.autograd.grad(loss, (student.q, student.k, student.v)):
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("sampled", [99, 4])
def test_sparse_loss_is_the_dense_loss_of_its_rows_written_out(sampled: int, make_qkv: MakeQKV) -> None:
    teacher, student, keys = make_qkv(2, 2, 11, 6), make_qkv(2, 2, 11, 6, seed=1), torch.arange(2)
    codec = make_codec(codec_config(rows=sampled, head_k=2, tail_k=3))
    target = codec.decode(codec.encode(teacher, keys), keys, 11)
    dense: Rows = {relation: DenseRows(rows.rows, rows.dense(), rows.entropy) for relation, rows in target.items()}
    for name, loss in relation_loss(student, target).items():
        torch.testing.assert_close(loss, relation_loss(student, dense)[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("fields", [{"rows": 3, "head_k": 1, "tail_k": 2}, {"name": "dense"}])
def test_gradcheck(fields: dict[str, Any], make_qkv: MakeQKV) -> None:
    teacher, student, keys = make_qkv(2, 2, 5, 3), make_qkv(2, 2, 5, 3, seed=1), torch.arange(2)
    codec = make_codec(codec_config(**fields, relations=("qk", "vv", "qq", "kk")))
    target = codec.decode(codec.encode(teacher, keys), keys, 5)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return total(relation_loss(QKV(q, k, v), target))

    inputs = tuple(x.requires_grad_() for x in (student.q, student.k, student.v))
    assert torch.autograd.gradcheck(loss, inputs)


def test_cross_entropy_per_head_averages_to_the_loss(make_qkv: MakeQKV) -> None:
    teacher, student, keys = make_qkv(3, 2, 11, 6), make_qkv(3, 2, 11, 6, seed=1), torch.arange(3)
    for fields in ({"rows": 4, "tail_k": 3}, {"name": "dense"}):
        codec = make_codec(codec_config(**fields))
        target = codec.decode(codec.encode(teacher, keys), keys, 11)
        losses, per_head = relation_loss(student, target), cross_entropy_per_head(student, target)
        for relation, rows in target.items():
            assert per_head[relation].shape == (3, 2)
            torch.testing.assert_close(per_head[relation].mean() - rows.entropy.mean(), losses[relation])


def test_half_precision_students_are_compared_in_fp32(make_qkv: MakeQKV) -> None:
    teacher, student = make_qkv(2, 2, 11, 6), make_qkv(2, 2, 11, 6, seed=1, dtype=torch.bfloat16)
    full = QKV(student.q.double(), student.k.double(), student.v.double())
    with torch.autocast("cpu", torch.bfloat16):
        losses = relation_loss(student, exact_target(teacher))
    for relation in BOTH:
        assert losses[relation].dtype.itemsize >= 4
        assert losses[relation].item() == pytest.approx(tinymim_loss(full, teacher, relation).item(), abs=1e-5)


def test_a_student_of_another_shape_is_caught(make_qkv: MakeQKV) -> None:
    keys, codec = torch.arange(2), make_codec(codec_config(rows=4))
    target = codec.decode(codec.encode(make_qkv(2, 2, 11, 6), keys), keys, 11)
    for shape in [(2, 3, 11, 6), (2, 2, 12, 6), (3, 2, 11, 6)]:
        with pytest.raises((AssertionError, RuntimeError)):
            relation_loss(make_qkv(*shape), target)


# ---------------------------------------------------------------- unbiasedness

VIEWS, HEADS, TOKENS, WIDTH = 4000, 2, 17, 4


def z_scores(samples: Tensor, exact: Tensor) -> Tensor:
    """(mean - exact) / standard error, over the first axis; an entry without spread must be exact to fp32."""
    samples, exact = samples.double(), exact.double()
    standard_error: Tensor = samples.std(0) / len(samples) ** 0.5
    return (samples.mean(0) - exact).abs() / (standard_error + 1e-8)


def largest_z(make_qkv: MakeQKV, **fields: Any) -> dict[str, float]:
    """One view encoded under VIEWS keys: the largest |z| of rows, loss and gradient against dense ones."""
    # Rows mild enough that every entry is drawn often: the law of the means is then normal.
    teacher = make_qkv(1, HEADS, TOKENS, WIDTH, scale=0.7)
    student = make_qkv(1, HEADS, TOKENS, WIDTH, seed=1)
    keys, codec = torch.arange(VIEWS) - VIEWS // 2, make_codec(codec_config(**fields))

    def repeat(x: QKV) -> QKV:
        return QKV(*(side.repeat(VIEWS, 1, 1, 1) for side in (x.q, x.k, x.v)))

    target = codec.decode(codec.encode(repeat(teacher), keys), keys, TOKENS)

    # Losses are means over views, so VIEWS x gradient is one gradient a view.
    many = QKV(*(side.requires_grad_() for side in (lambda x: (x.q, x.k, x.v))(repeat(student))))
    one = QKV(*(side.clone().requires_grad_() for side in (student.q, student.k, student.v)))
    gradients = torch.autograd.grad(total(relation_loss(many, target)), (many.q, many.k, many.v))
    exact_loss = total(relation_loss(one, exact_target(teacher)))
    exact_gradients = torch.autograd.grad(exact_loss, (one.q, one.k, one.v))
    gradient_z = [z_scores(VIEWS * g, e[0]).max().item() for g, e in zip(gradients, exact_gradients, strict=True)]

    losses = torch.zeros(VIEWS, dtype=torch.float64)
    row_z = []
    for relation, rows in target.items():
        probs = relation_probs(teacher, relation)
        assert isinstance(rows, SparseRows)
        log_probs = relation_probs(many, relation, rows.rows).detach().log()
        losses += -(rows.dense() * log_probs).sum(-1).mean((1, 2)) - rows.entropy
        # Rows that a view did not draw count as zero, so the mean over keys is Q/T of the dense row.
        drawn = rows.dense().double()
        if rows.rows is not None:
            place = rows.rows[..., None].expand(-1, -1, -1, TOKENS)
            drawn = drawn.new_zeros(VIEWS, HEADS, TOKENS, TOKENS).scatter(2, place, drawn)
        row_z.append(z_scores(drawn, probs[0] * rows.shape[2] / TOKENS).max().item())
    return {
        "rows": max(row_z),
        "loss": z_scores(losses, exact_loss.detach()).item(),
        "gradient": max(gradient_z),
    }


def assert_unbiased(make_qkv: MakeQKV, **fields: Any) -> None:
    """Fails if any entry of rows, loss or gradient is more than 5 standard errors off.

    2 x 578 entries of rows, 408 of the gradient and one loss: a correct codec exceeds 5 somewhere with
    probability 1565 x 5.7e-7 = 9e-4 (and, keys and inputs being fixed, either always or never).
    """
    largest = largest_z(make_qkv, **fields)
    assert max(largest.values()) < 5, largest


@pytest.mark.parametrize(
    "fields",
    [
        {"rows": 999, "head_k": 2, "tail_k": 4},
        {"rows": 6, "head_k": 2, "tail_k": 4},
        {"rows": 6, "head_k": 0, "tail_k": 2},
        {"rows": 6, "head_k": 8, "tail_k": 1},
        {"rows": 6, "head_k": 16, "tail_k": 1},
    ],
)
def test_the_sketch_is_unbiased(fields: dict[str, int], make_qkv: MakeQKV) -> None:
    assert_unbiased(make_qkv, **fields)


@pytest.mark.parametrize("rows", [999, 6])
def test_the_same_test_fails_for_renormalised_top_k(rows: int, make_qkv: MakeQKV) -> None:
    with pytest.raises(AssertionError, match="rows"):
        assert_unbiased(make_qkv, rows=rows, head_k=8, tail="renormalise")
    largest = largest_z(make_qkv, rows=rows, head_k=8, tail="renormalise")
    assert min(largest["rows"], largest["gradient"]) > 20, largest
