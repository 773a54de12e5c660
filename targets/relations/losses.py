"""The distillation loss: KL of teacher rows against student rows, for sparse and dense targets.

Source: the relation loss of Ren et al., "TinyMIM", CVPR 2023. As cross entropy minus the teacher's entropy it is
linear in the teacher's row, so an unbiased sketch of rows gives unbiased loss and gradients (I4).

Shapes: B view, H head, Q query row, K kept entry, T token.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tinymim.targets.relations.kernels.loss import cross_entropy
from tinymim.targets.relations.qkv import QKV, relation_logits
from tinymim.targets.relations.rows import DenseRows, Rows, RowTarget


def cross_entropy_per_head(student: QKV, target: Rows) -> dict[str, Float[Tensor, "B H"]]:
    """Cross entropy of the target's rows with the student's, in nats per relation, view and head: mean over rows.

    Only the target's rows are computed, in fp32 even under autocast (fp64 for fp64 inputs). For a sparse target, their
    logits are never all in memory (`kernels/loss.py`). The KL is this minus the teacher's entropy. With a sketch the
    KL is an unbiased estimate and may be slightly negative.

    Args:
        student: the student's q, k and v, float [B, H, T, D], resplit to the target's heads (`QKV.resplit`).
        target: the rows of B views.
    """
    found: dict[str, Tensor] = {}
    for relation, teacher in target.items():
        if isinstance(teacher, DenseRows):
            logits = relation_logits(student, relation, teacher.rows)
            # gather would accept a student with more views, heads or tokens
            assert logits.shape == teacher.shape, f"student {logits.shape}, teacher {teacher.shape}"
            found[relation] = reference_cross_entropy(logits, teacher).mean(-1)
        else:
            found[relation] = cross_entropy(*student.pair(relation), teacher)
    return found


def reference_cross_entropy(logits: Float[Tensor, "B H Q T"], teacher: RowTarget) -> Float[Tensor, "B H Q"]:
    """-sum over tokens of teacher x log student for each row, from all student logits.

    The tokens outside a ghost tail's kept ones are one bucket on both sides.
    """
    log_probs = logits.log_softmax(dim=-1)
    if isinstance(teacher, DenseRows):
        return -(log_probs * teacher.probs.to(logits.dtype)).sum(-1)
    weight = teacher.weight.to(logits.dtype)
    cross_entropy = -(log_probs.gather(-1, teacher.index) * weight).sum(-1)
    if teacher.tail == "none":
        return cross_entropy
    left = 1.0 - weight.sum(-1)
    others = log_probs.scatter(-1, teacher.index, -torch.inf)
    if teacher.tail == "ghost":
        return cross_entropy - left * others.logsumexp(-1)
    share = left / (teacher.tokens - teacher.index.shape[-1])
    return cross_entropy - share * others.masked_fill(others == -torch.inf, 0.0).sum(-1)
