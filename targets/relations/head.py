"""The student's head for relations: the qkv projection of one more block, on the student's final norm.

Shapes: B view, T token, C student width, H head, D = C / H, P part.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tinymim.targets.contract import Answers, TargetHead
from tinymim.targets.relations.qkv import QKV, resplit


class RelationHead(TargetHead):
    """Final tokens [B, T, C] to q, k and v in the student's own heads, each [B, H, T, D].

    Its input comes from the final norm of the exported model, so the loss trains all blocks and that norm
    (docs/decisions/002-thirteenth-tap.md).

    At an inner block, q, k and v are that block's own, joined to [B, T, 3C] (`TargetHead.inner`).

    Args:
        width: C.
        heads: H.
    """

    inner = "qkv"

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projection = nn.Linear(width, 3 * width)
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, tokens: Float[Tensor, "B T C"]) -> Answers:
        """See `TargetHead`."""
        answers = QKV.split(self.projection(tokens), self.heads)
        return answers.q, answers.k, answers.v

    def by_part(
        self, tokens: Float[Tensor, "1 T C"], gradients: Sequence[Tensor | None], parts: int
    ) -> Float[Tensor, "P N"]:
        """See `TargetHead`: for the C x D weights of each relation head, the sum over tokens of token x gradient."""
        used = [resplit(gradient, parts)[0] for gradient in gradients if gradient is not None]
        return torch.cat([torch.einsum("tc,htd->hcd", tokens[0], each) for each in used], dim=-1).flatten(1)
