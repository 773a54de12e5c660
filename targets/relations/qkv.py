"""Token relations of one attention block: who looks like whom, per head.

Source: Ren et al., "TinyMIM: An Empirical Study of Distilling MIM Pre-trained Models", CVPR 2023 (Q-K and V-V
relations); after MiniLMv2 (Wang et al., ACL Findings 2021), which also re-splits the heads.

Shapes: B view, H head, Q query row, T token, D head width.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tinymim.configs.codecs.relations import Relation


@dataclass(frozen=True)
class QKV:
    """Queries, keys and values of one block, each float [B, H, T, D]; a teacher's also have their input x.

    A "qkv" tap gives the four tensors in this order.
    """

    q: Float[Tensor, "B H T D"]
    k: Float[Tensor, "B H T D"]
    v: Float[Tensor, "B H T D"]
    x: Float[Tensor, "B T C"] | None = None  # input of the qkv projection, after the block's first norm

    @classmethod
    def split(cls, projected: Float[Tensor, "B T W"], heads: int) -> "QKV":
        """The sides of a projection to W = 3 x H x D channels, in the layout of timm and MAE."""
        batch, tokens, width = projected.shape
        q, k, v = projected.reshape(batch, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
        return cls(q, k, v)

    def resplit(self, heads: int) -> "QKV":
        """The same channels in another number of heads, which divides the width H x D; see `resplit`."""
        if heads == self.q.shape[1]:
            return self
        return QKV(resplit(self.q, heads), resplit(self.k, heads), resplit(self.v, heads), self.x)

    def pair(self, relation: Relation) -> tuple[Tensor, Tensor]:
        """The (rows, columns) sides of a relation: "qk" is (q, k), "vv" is (v, v), ..."""
        sides = {"q": self.q, "k": self.k, "v": self.v}
        return sides[relation[0]], sides[relation[1]]


def relation_logits(
    qkv: QKV, relation: Relation, rows: Int64[Tensor, "B H Q"] | None = None
) -> Float[Tensor, "B H Q T"]:
    """The logits a b^T / sqrt(D) of some query rows.

    Computed in fp32 even under autocast (in fp64 for fp64 inputs): half-precision logits would cost more
    accuracy than the codecs do.

    Args:
        qkv: the block's projections.
        relation: the sides a and b.
        rows: int64 [B, H, Q] query rows; None for all T in order.

    Returns:
        float32 or float64 [B, H, Q, T]; no [B, H, T, T] is formed unless `rows` is None.
    """
    a, b = qkv.pair(relation)
    if rows is not None:
        a = a.gather(2, rows[..., None].expand(-1, -1, -1, a.shape[-1]))
    dtype = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        scaled = a.to(dtype) / math.sqrt(a.shape[-1])
        return scaled @ b.to(dtype).transpose(-2, -1)


def relation_probs(
    qkv: QKV, relation: Relation, rows: Int64[Tensor, "B H Q"] | None = None
) -> Float[Tensor, "B H Q T"]:
    """Softmax of `relation_logits` over the tokens: float32 (float64 for float64 inputs) [B, H, Q, T]."""
    return relation_logits(qkv, relation, rows).softmax(dim=-1)


def resplit(x: Float[Tensor, "B H T D"], heads: int) -> Tensor:
    """[B, H, T, D] to [B, heads, T, H x D / heads]."""
    batch, old_heads, tokens, head_dim = x.shape
    assert old_heads * head_dim % heads == 0, f"{old_heads} heads x {head_dim} into {heads}: specs and head refuse it"
    return x.transpose(1, 2).reshape(batch, tokens, heads, -1).transpose(1, 2)
