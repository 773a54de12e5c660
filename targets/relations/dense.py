"""The `dense` codec: every probability of every row in fp16, for audits.

Shapes: B view, H head, Q query row, T token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int64
from torch import Tensor

from tinymim.configs.codecs.relations import DenseCodec
from tinymim.configs.taps import Shapes
from tinymim.targets.contract import ArraySpec, Tapped
from tinymim.targets.record import specs_of, stored
from tinymim.targets.relations.kind import StoredRelations, mean_entropy
from tinymim.targets.relations.qkv import relation_probs
from tinymim.targets.relations.rows import DenseRows, Rows


@dataclass(frozen=True)
class Dense(StoredRelations):
    """Whole relation maps.

    Attributes:
        config: the codec section.
        block: the tapped block of the teacher, counted from 1.
        rows: number of query rows of a decoded target; None for all.
        entropy_by_head: whether a decoded target's entropy is [B, H] instead of [B], as audits of students need it.
    """

    config: DenseCodec
    block: int = 1
    rows: int | None = None
    entropy_by_head: bool = False
    name: ClassVar[str] = "dense"
    version: ClassVar[int] = 1

    @property
    def whole(self) -> bool:
        """See `TargetKind`."""
        return True

    def specs(self, shapes: Shapes) -> tuple[ArraySpec, ...]:
        """See `TargetKind`."""
        shape = (self.record_heads(shapes), shapes.tokens, shapes.tokens)
        return specs_of(self.config.relations, {"probs": ("float16", shape), "entropy": ("float32", ())})

    @torch.no_grad()
    def encode(self, tapped: Tapped, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """See `TargetKind`."""
        fields: dict[str, Tensor] = {}
        specs, qkv = self.specs(self.shapes(tapped)), self.split(tapped)
        for relation in self.config.relations:
            probs = relation_probs(qkv, relation)
            fields |= {f"{relation}_probs": probs, f"{relation}_entropy": mean_entropy(probs)}
        return stored(fields, specs)

    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], shapes: Shapes) -> Rows:
        """See `TargetKind`; every relation is a `DenseRows` with the stored values in float32."""
        target: Rows = {}
        for relation in self.config.relations:
            probs, entropy = arrays[f"{relation}_probs"].float(), arrays[f"{relation}_entropy"]
            rows = self.sampled_rows(relation, view_keys, probs.shape[1], shapes.tokens)
            if rows is not None:
                probs = probs.gather(2, rows[..., None].expand(-1, -1, -1, shapes.tokens))
            if rows is not None or self.entropy_by_head:
                entropy = mean_entropy(probs, self.entropy_by_head)
            target[relation] = DenseRows(rows, probs, entropy)
        return target
