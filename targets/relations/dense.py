"""Every probability of every row in fp16: for audits.

Shapes: B view, H head, Q query row, T token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int64
from torch import Tensor

from tinymim.configs.codecs import DenseCodec
from tinymim.targets.counter import sample_rows
from tinymim.targets.record import ArraySpec, mean_entropy, specs_of, stored
from tinymim.targets.relations.qkv import QKV, relation_probs
from tinymim.targets.relations.rows import DenseRows, Target


@dataclass(frozen=True)
class Dense:
    """The relation maps themselves.

    Attributes:
        config: what is stored.
        rows: query rows a decoded target has; None: all.
    """

    config: DenseCodec
    rows: int | None = None
    name: ClassVar[str] = "dense"
    version: ClassVar[int] = 1

    def arrays(self, heads: int, tokens: int) -> tuple[ArraySpec, ...]:
        """See `Codec`."""
        shape = (self.relation_heads(heads), tokens, tokens)
        return specs_of(self.config.relations, {"probs": ("float16", shape), "entropy": ("float32", ())})

    def relation_heads(self, heads: int) -> int:
        """See `Codec`."""
        return self.config.relation_heads or heads

    @torch.no_grad()
    def encode(self, qkv: QKV, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """See `Codec`."""
        fields: dict[str, Tensor] = {}
        specs = self.arrays(*qkv.q.shape[1:3])
        qkv = qkv.resplit(self.relation_heads(qkv.q.shape[1]))
        for relation in self.config.relations:
            probs = relation_probs(qkv, relation)
            fields |= {f"{relation}_probs": probs, f"{relation}_entropy": mean_entropy(probs, relation)}
        return stored(fields, specs)

    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], tokens: int) -> Target:
        """See `Codec`; every relation is a `DenseRows` with the stored values in float32."""
        target: Target = {}
        for relation in self.config.relations:
            probs, entropy = arrays[f"{relation}_probs"].float(), arrays[f"{relation}_entropy"]
            rows = None
            if self.rows is not None and self.rows < tokens:
                rows = sample_rows(view_keys, relation, probs.shape[1], tokens, self.rows)
                probs = probs.gather(2, rows[..., None].expand(-1, -1, -1, tokens))
                entropy = torch.special.entr(probs).sum(-1).mean((1, 2))
            target[relation] = DenseRows(rows, probs, entropy)
        return target
