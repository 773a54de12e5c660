"""Cross entropy of sparse teacher rows against one relation of the student: loss and gradients in one sweep.

With the logits x_j = a_r . b_j / sqrt(D) of a row r, their softmax s, and the teacher's row t of total mass W,

    ce = W logsumexp(x) - sum_j t_j x_j,        d ce / d x_j = W s_j - t_j,

so the gradients need the same terms as the loss. As in fused linear cross entropy (Hsu et al., "Liger Kernel", 2024)
they are computed in the forward pass, for a unit upstream gradient, and the backward pass scales them.
`targets/relations/rows.py` defines the tails of a row; a ghost tail of mass m is one bucket on both sides,

    ce = -sum over kept t_j log s_j - m log(1 - sum over kept s_j),

and outside the kept tokens d ce / d x_j = s_j - m softmax_j(x outside).

The operator `tinymim::relation_cross_entropy` has two implementations: Triton on CUDA (`loss_triton`), and elsewhere
torch in chunks that fit into a CPU's cache. Neither ever holds [B, H, T, T].

Shapes: B view, H head, Q query row, K kept entry, T token, D head width.
"""

import math
import os
from typing import Any, Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tinymim.targets.relations.kernels.triton_works import triton_works
from tinymim.targets.relations.rows import SparseRows, Tail

# Logits in memory at once. On a CPU a chunk fits into a core's second-level cache; elsewhere launches are few.
CPU_CHUNK_BYTES: Final = 1 << 20
CHUNK_BYTES: Final = 1 << 26


def cross_entropy(
    a: Float[Tensor, "B H T D"], b: Float[Tensor, "B H T D"], teacher: SparseRows
) -> Float[Tensor, "B H"]:
    """-sum over tokens of teacher x log softmax(a b^T / sqrt(D)), mean over the teacher's rows; differentiable once.

    Args:
        a: rows' side of the relation, bf16, fp16, fp32 or fp64, of any strides.
        b: columns' side of the relation, likewise.
        teacher: the target; its rows are distinct within a view and head.

    Returns:
        float32 [B, H] (float64 where a or b is), also under autocast; gradients have the dtypes of a and b.
    """
    shape = (*a.shape[:2], a.shape[2] if teacher.rows is None else teacher.rows.shape[2], b.shape[2])
    # gather would accept a student with more views, heads or tokens
    assert shape == teacher.shape and a.shape == b.shape, f"student {shape}, teacher {teacher.shape}"
    assert teacher.tail == "none" or teacher.index.shape[-1] < teacher.tokens, "no token is left for the tail"
    with_grad = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    outputs: tuple[Tensor, Tensor, Tensor] = relation_cross_entropy(
        a, b, teacher.rows, teacher.index, teacher.weight, teacher.tail, with_grad
    )
    return outputs[0]


@torch.library.custom_op(
    "tinymim::relation_cross_entropy",
    mutates_args=(),
    schema="(Tensor a, Tensor b, Tensor? rows, Tensor index, Tensor weight, str tail, bool with_grad)"
    " -> (Tensor, Tensor, Tensor)",
)
def relation_cross_entropy(
    a: Tensor, b: Tensor, rows: Tensor | None, index: Tensor, weight: Tensor, tail: Tail, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator behind `cross_entropy`: fp32 arithmetic (fp64 for fp64), also under autocast.

    Args:
        a, b: float [B, H, T, D].
        rows: int64 [B, H, Q], distinct; None for all T rows in order.
        index, weight, tail: as in `SparseRows`.
        with_grad: whether to compute da and db.

    Returns:
        ce [B, H]; da and db [B, H, T, D], the gradients of each ce[b, h] with respect to a[b, h] and b[b, h] (of
        shape [0] without `with_grad`). All are float32, or float64 for fp64 inputs.
    """
    if _use_triton(a, b):
        # Imported here, because triton is optional and slow to import.
        from tinymim.targets.relations.kernels.loss_triton import relation_cross_entropy_triton

        return relation_cross_entropy_triton(a, b, rows, index, weight, tail, with_grad)
    return relation_cross_entropy_chunked(a, b, rows, index, weight, tail, with_grad)


@relation_cross_entropy.register_fake
def _fake(
    a: Tensor, b: Tensor, rows: Tensor | None, index: Tensor, weight: Tensor, tail: Tail, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _accumulator(a, b)
    shape = a.shape if with_grad else (0,)
    return tuple(a.new_empty(size, dtype=dtype) for size in (a.shape[:2], shape, shape))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, *_, with_grad = inputs
    _, da, db = output
    ctx.dtypes = (a.dtype, b.dtype)
    ctx.with_grad = with_grad
    ctx.mark_non_differentiable(da, db)
    ctx.save_for_backward(da, db)


def _backward(ctx: Any, grad_ce: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    assert ctx.with_grad, "relation_cross_entropy was called without with_grad"
    upstream = grad_ce[..., None, None]
    # Scaled before the cast: under loss scaling, the fp16 gradient is the scaled one.
    grads = [(grad * upstream).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
    return *grads, None, None, None, None, None


relation_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def relation_cross_entropy_chunked(
    a: Tensor, b: Tensor, rows: Tensor | None, index: Tensor, weight: Tensor, tail: Tail, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`relation_cross_entropy` in plain torch on some views or heads at a time, on any device."""
    B, H, T, D = a.shape
    Q, dtype = index.shape[2], _accumulator(a, b)
    ce = a.new_empty((B, H), dtype=dtype)
    shape = a.shape if with_grad else (0,)
    da = a.new_zeros(shape, dtype=dtype)  # rows that are not in the sample have no gradient
    db = a.new_empty(shape, dtype=dtype)
    head_bytes = max(Q * T * dtype.itemsize, 1)
    heads = max((CPU_CHUNK_BYTES if a.device.type == "cpu" else CHUNK_BYTES) // head_bytes, 1)
    views, heads = max(heads // max(H, 1), 1), max(min(heads, H), 1)
    with torch.autocast(a.device.type, enabled=False):
        for view in range(0, B, views):
            for head in range(0, H, heads):
                at = slice(view, view + views), slice(head, head + heads)
                a_rows = a[at]
                if rows is not None:
                    place = rows[at][..., None].expand(-1, -1, -1, D)
                    a_rows = a_rows.gather(2, place)
                a_rows = a_rows.to(dtype).flatten(0, 1) / math.sqrt(D)
                columns = b[at].to(dtype).flatten(0, 1)
                logits = torch.bmm(a_rows, columns.mT)
                ce_rows = _rows_in_place(
                    logits, index[at].flatten(0, 1), weight[at].flatten(0, 1).to(dtype), tail, with_grad
                )
                chunk = ce[at]
                chunk.copy_(ce_rows.mean(-1).view_as(chunk))
                if not with_grad:
                    continue
                db[at] = torch.bmm(logits.mT, a_rows).view(*chunk.shape, T, D)
                da_rows = torch.bmm(logits, columns).div_(math.sqrt(D)).view(*chunk.shape, Q, D)
                if rows is None:
                    da[at] = da_rows
                else:
                    da[at].scatter_(2, place, da_rows)
    return ce, da, db


def _rows_in_place(
    x: Float[Tensor, "N Q T"],
    index: Int64[Tensor, "N Q K"],
    weight: Float[Tensor, "N Q K"],
    tail: Tail,
    with_grad: bool,
) -> Float[Tensor, "N Q"]:
    """Cross entropy of each row. Overwrites the logits `x` by the gradient of the rows' mean (or by junk)."""
    # After a shift by the maximum, exp cannot overflow, and the log-sum-exp of a peaked row loses no digits.
    x.sub_(x.amax(-1, keepdim=True))
    kept = x.gather(-1, index)
    mass = weight.sum(-1, keepdim=True)
    ce = -(weight * kept).sum(-1, keepdim=True)
    Q, left = x.shape[1], 1.0 - mass
    if tail == "ghost":
        x.scatter_(-1, index, -torch.inf)
        # A second shift, by the maximum of the other tokens, which may lie far below the first.
        top = x.amax(-1, keepdim=True)
        total = x.sub_(top).exp_().sum(-1, keepdim=True)
        log_others = top + total.log()
        log_all = torch.logaddexp(log_others, kept.logsumexp(-1, keepdim=True))
        ce += log_all - left * log_others
        if with_grad:
            x.mul_(((log_others - log_all).exp() - left) / (Q * total))
            x.scatter_(-1, index, ((kept - log_all).exp() - weight) / Q)
        return ce.squeeze(-1)
    if tail == "uniform":
        share = left / (x.shape[-1] - index.shape[-1])
        ce -= share * (x.sum(-1, keepdim=True) - kept.sum(-1, keepdim=True))
        weight, mass = weight - share, torch.ones_like(mass)
    total = x.exp_().sum(-1, keepdim=True)
    ce += mass * total.log()
    if with_grad:
        x.mul_(mass / (Q * total))
        if tail == "uniform":
            x.sub_(share / Q)
        x.scatter_add_(-1, index, weight / -Q)
    return ce.squeeze(-1)


def _accumulator(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def _use_triton(a: Tensor, b: Tensor) -> bool:
    """On CUDA, and under Triton's interpreter; not in fp64, which is for checks."""
    wanted = a.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return wanted and _accumulator(a, b) == torch.float32 and triton_works()
