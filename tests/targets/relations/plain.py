"""Relation kinds on plain q, k and v, as these tests have them: no taps, no shapes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tinymim.configs.codecs.kinds import CodecConfig
from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets.contract import ArraySpec, Tapped
from tinymim.targets.kinds import make_kind, stored_kind
from tinymim.targets.relations.kind import RelationKind
from tinymim.targets.relations.losses import cross_entropy_per_head
from tinymim.targets.relations.qkv import QKV
from tinymim.targets.relations.rows import Rows

TAP = Tap("qkv", 1)


def tapped(qkv: QKV) -> Tapped:
    """As a teacher gives them."""
    sides = (qkv.q, qkv.k, qkv.v)
    return {TAP: sides if qkv.x is None else (*sides, qkv.x)}


def shapes(heads: int, tokens: int, head_dim: int = 8) -> Shapes:
    """With one prefix token, and a square of patches where their number allows it, else one row."""
    side = math.isqrt(tokens - 1)
    return Shapes(heads, head_dim, tokens, 1, (side, side) if side**2 == tokens - 1 else (1, tokens - 1))


@dataclass(frozen=True)
class Plain:
    """A relation kind whose methods take and give what the formulas have."""

    kind: RelationKind

    @property
    def name(self) -> str:
        return self.kind.name

    @property
    def version(self) -> int:
        return self.kind.version

    def relation_heads(self, heads: int) -> int:
        return self.kind.relation_heads(heads)

    def arrays(self, heads: int, tokens: int, head_dim: int = 8) -> tuple[ArraySpec, ...]:
        return self.kind.specs(shapes(heads, tokens, head_dim))

    def encode(self, qkv: QKV, view_keys: Tensor) -> dict[str, Tensor]:
        return self.kind.encode(tapped(qkv), view_keys)

    def decode(self, arrays: Mapping[str, Tensor], view_keys: Tensor, tokens: int) -> Rows:
        rows: Rows = self.kind.decode(arrays, view_keys, shapes(1, tokens))
        return rows


def make_codec(
    config: CodecConfig, targets: TargetsConfig | None = None, constants: Mapping[str, Tensor] | None = None
) -> Plain:
    """`make_kind` for relations."""
    kind = make_kind(config, 1, targets or TargetsConfig(), constants)
    assert isinstance(kind, RelationKind)
    return Plain(kind)


def stored_codec(section: Mapping[str, Any]) -> Plain:
    """`stored_kind` for relations."""
    kind = stored_kind({"taps": [str(TAP)], **section})
    assert isinstance(kind, RelationKind)
    return Plain(kind)


def relation_loss(student: QKV, target: Rows) -> dict[str, Tensor]:
    """The KL of every relation, mean over views, heads and rows."""
    found = cross_entropy_per_head(student, target)
    return {str(relation): found[relation].mean() - rows.entropy.mean() for relation, rows in target.items()}
