"""The distillation loss: KL of teacher rows against student rows, for sparse and dense targets alike.

Source: the relation loss of Ren et al., "TinyMIM", CVPR 2023. Written as cross entropy minus the teacher's
entropy it is linear in the teacher's row: an unbiased sketch of rows gives unbiased loss and gradients (I4).

Shapes: B view, H head, Q query row, T token.
"""

from jaxtyping import Float
from torch import Tensor

from tinymim.targets.relations import QKV, relation_logits
from tinymim.targets.target import Target


def relation_loss(student: QKV, target: Target) -> dict[str, Float[Tensor, ""]]:
    """KL(teacher row || student row) in nats per relation, mean over views, heads and the target's rows.

    Only the target's rows are computed, [B, H, Q, T], in fp32 even under autocast (fp64 for fp64 inputs).

    Args:
        student: float [B, H, T, D] each, already resplit to the teacher's heads (`QKV.resplit`).
        target: from `Codec.decode`.

    Returns:
        relation name to scalar; the training loss is their sum. With a sketch a value is an unbiased estimate
        and may be slightly negative.
    """
    losses: dict[str, Tensor] = {}
    for relation, teacher in target.items():
        logits = relation_logits(student, relation, teacher.rows)
        # gather would accept a student with more views, heads or tokens
        assert logits.shape == teacher.shape, f"student {logits.shape}, teacher {teacher.shape}"
        cross_entropy = -teacher.expect(logits.log_softmax(dim=-1)).mean()
        losses[relation] = cross_entropy - teacher.entropy.mean()
    return losses
