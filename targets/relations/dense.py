"""Every probability of every row in fp16: for audits.

Shapes: B view, H head, Q query row, T token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int64
from torch import Tensor

from tinymim.configs.codecs import DenseCodec, Relation
from tinymim.configs.taps import Shapes
from tinymim.targets.contract import ArraySpec, Tapped
from tinymim.targets.record import specs_of, stored
from tinymim.targets.relations.draws import sample_rows
from tinymim.targets.relations.kind import RelationKind, mean_entropy
from tinymim.targets.relations.qkv import relation_probs
from tinymim.targets.relations.rows import DenseRows, Rows


@dataclass(frozen=True)
class Dense(RelationKind):
    """The relation maps themselves.

    Attributes:
        config: what is stored.
        block: the tapped block of the teacher.
        rows: query rows a decoded target has; None: all.
        entropy_by_head: a decoded target's entropy is [B, H], of its own rows, as audits of students want it.
    """

    config: DenseCodec
    block: int = 1
    rows: int | None = None
    entropy_by_head: bool = False
    name: ClassVar[str] = "dense"
    version: ClassVar[int] = 1
    whole: ClassVar[bool] = True

    @property
    def relations(self) -> tuple[Relation, ...]:
        """See `RelationKind`."""
        return self.config.relations

    def relation_heads(self, heads: int) -> int:
        """See `RelationKind`."""
        return self.config.relation_heads or heads

    def draws(self, shapes: Shapes) -> bool:
        """See `TargetKind`."""
        return self.rows is not None and self.rows < shapes.tokens

    def specs(self, shapes: Shapes) -> tuple[ArraySpec, ...]:
        """See `TargetKind`."""
        shape = (self.relation_heads(shapes.heads), shapes.tokens, shapes.tokens)
        return specs_of(self.config.relations, {"probs": ("float16", shape), "entropy": ("float32", ())})

    @torch.no_grad()
    def encode(self, tapped: Tapped, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """See `TargetKind`."""
        fields: dict[str, Tensor] = {}
        qkv, specs = self.split(tapped), self.specs(self.shapes(tapped))
        for relation in self.config.relations:
            probs = relation_probs(qkv, relation)
            fields |= {f"{relation}_probs": probs, f"{relation}_entropy": mean_entropy(probs)}
        return stored(fields, specs)

    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], shapes: Shapes) -> Rows:
        """See `TargetKind`; every relation is a `DenseRows` with the stored values in float32."""
        target: Rows = {}
        tokens = shapes.tokens
        for relation in self.config.relations:
            probs, entropy = arrays[f"{relation}_probs"].float(), arrays[f"{relation}_entropy"]
            rows = None
            if self.rows is not None and self.rows < tokens:
                rows = sample_rows(view_keys, relation, probs.shape[1], tokens, self.rows)
                probs = probs.gather(2, rows[..., None].expand(-1, -1, -1, tokens))
                entropy = torch.special.entr(probs).sum(-1).mean((1, 2))
            if self.entropy_by_head:
                entropy = torch.special.entr(probs).sum(-1).mean(-1)
            target[relation] = DenseRows(rows, probs, entropy)
        return target
