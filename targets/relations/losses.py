"""The distillation loss: KL of teacher rows against student rows, for sparse and dense targets alike.

Source: the relation loss of Ren et al., "TinyMIM", CVPR 2023. Written as cross entropy minus the teacher's
entropy it is linear in the teacher's row: an unbiased sketch of rows gives unbiased loss and gradients (I4).

Shapes: B view, H head, Q query row, K kept entry, T token.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tinymim.configs.codecs import Relation
from tinymim.targets.relations.kernels.loss import cross_entropy
from tinymim.targets.relations.qkv import QKV, relation_logits
from tinymim.targets.relations.rows import DenseRows, RowTarget, Target


def relation_loss(student: QKV, target: Target) -> dict[str, Float[Tensor, ""]]:
    """KL(teacher row || student row) in nats per relation, mean over views, heads and the target's rows.

    Only the target's rows are computed, in fp32 even under autocast (fp64 for fp64 inputs); of a sparse target
    without ever holding all their logits (`tinymim.targets.relations.kernels.loss`).

    Args:
        student: float [B, H, T, D] each, already resplit to the teacher's heads (`QKV.resplit`).
        target: from `Codec.decode`.

    Returns:
        relation name to scalar; the training loss is their sum. With a sketch a value is an unbiased estimate
        and may be slightly negative.
    """
    losses = cross_entropy_per_head(student, target)
    return {relation: losses[relation].mean() - teacher.entropy.mean() for relation, teacher in target.items()}


def cross_entropy_per_head(student: QKV, target: Target) -> dict[str, Float[Tensor, "B H"]]:
    """Cross entropy of the target's rows with the student's, in nats per relation, view and head: mean over rows.

    Args and dtypes as `relation_loss`, whose value is the mean of these minus the teacher's mean entropy.
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


def dense_kl(student: QKV, relation: Relation, teacher: DenseRows) -> Float[Tensor, "B H"]:
    """KL(teacher row || student row) in nats per view and head, mean over rows: exact, for audits; dtypes as above."""
    logits = relation_logits(student, relation, teacher.rows)
    assert logits.shape == teacher.shape, f"student {logits.shape}, teacher {teacher.shape}"
    entropy: Tensor = torch.special.entr(teacher.probs).sum(-1)
    return (reference_cross_entropy(logits, teacher) - entropy).mean(-1)


def reference_cross_entropy(logits: Float[Tensor, "B H Q T"], teacher: RowTarget) -> Float[Tensor, "B H Q"]:
    """-sum over tokens of teacher x log student, per row, by the textbook from student logits.

    With a ghost tail the tokens that were not kept are one bucket on both sides.
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
