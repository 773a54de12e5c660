"""Relations as a target kind: the part that all their codecs share.

Shapes: B view, H relation head, Q query row, T token.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tinymim.configs.codecs.relations import DenseCodec, Relation, SketchCodec
from tinymim.configs.errors import CacheMismatch, RecipeError
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets.contract import Answers, Loss, PictureLine, Tapped, TargetHead, TargetKind, Yardstick
from tinymim.targets.picture import query_lines, written_out
from tinymim.targets.relations.draws import sample_rows
from tinymim.targets.relations.head import RelationHead
from tinymim.targets.relations.losses import cross_entropy_per_head
from tinymim.targets.relations.qkv import QKV, relation_probs
from tinymim.targets.relations.rows import DenseRows, Rows, RowTarget, SparseRows
from tinymim.targets.vectors import check_visible

_LEAST_PROBABILITY = 2.0**-24  # the smallest positive fp16 number
_TITLES: Final[dict[Relation, str]] = {
    "qk": "query-key: what this patch looks for",
    "vv": "value-value: what is like this patch",
    "qq": "query-query: what looks for the same",
    "kk": "key-key: what is found alike",
}


class RelationKind(TargetKind):
    """Softmaxed relation maps of one attention block, compared by KL (Ren et al., "TinyMIM", CVPR 2023)."""

    measure: ClassVar[str] = "kl"
    block: int

    @property
    def meaning(self) -> tuple[object, ...]:
        """See `TargetKind`."""
        return ("relations", self.taps)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """See `TargetKind`."""
        return (Tap("qkv", self.block),)

    @property
    @abstractmethod
    def relations(self) -> tuple[Relation, ...]:
        """The relations of a decoded target."""

    @property
    @abstractmethod
    def rows(self) -> int | None:
        """Number of query rows of a decoded target, where a map has more; None for all."""

    @abstractmethod
    def relation_heads(self, heads: int) -> int:
        """H of the decoded target for a teacher of `heads` heads."""

    def projections(self, tapped: Tapped) -> QKV:
        """The block's projections in the teacher's own heads."""
        return QKV(*tapped[self.taps[0]])

    def split(self, tapped: Tapped) -> QKV:
        """The block's projections in the relation heads."""
        qkv = self.projections(tapped)
        return qkv.resplit(self.relation_heads(qkv.q.shape[1]))

    def shapes(self, tapped: Tapped) -> Shapes:
        """The teacher's shapes, as far as they determine those of a record; prefix tokens and grid are unknown."""
        _, heads, tokens, head_dim = self.projections(tapped).q.shape
        return Shapes(heads, head_dim, tokens, 0, (1, tokens))

    def sampled_rows(
        self, relation: Relation, view_keys: Int64[Tensor, " B"], heads: int, tokens: int
    ) -> Int64[Tensor, "B H Q"] | None:
        """The query rows of a decoded target; None where it has all rows."""
        if self.rows is None or self.rows >= tokens:
            return None
        return sample_rows(view_keys, relation, heads, tokens, self.rows)

    # ---- the contract

    def draws(self, shapes: Shapes) -> bool:
        """See `TargetKind`."""
        return self.rows is not None and self.rows < shapes.tokens

    def exact(self, tapped: Tapped) -> Rows:
        """See `TargetKind`: float32 maps [B, H, T, T] (float64 for float64 inputs)."""
        return exact_rows(self.split(tapped), self.relations)

    def pick(self, target: Rows, some: slice, device: torch.device | None = None) -> Rows:
        """See `TargetKind`."""

        def of(tensor: Tensor) -> Tensor:
            return tensor[some] if device is None else tensor[some].to(device)

        def one(held: RowTarget) -> RowTarget:
            rows = None if held.rows is None else of(held.rows)
            if isinstance(held, DenseRows):
                return DenseRows(rows, of(held.probs), of(held.entropy))
            return replace(held, rows=rows, index=of(held.index), weight=of(held.weight), entropy=of(held.entropy))

        return {relation: one(held) for relation, held in target.items()}

    def parts(self, shapes: Shapes) -> dict[str, int]:
        """See `TargetKind`: one loss per relation, one part per relation head."""
        return dict.fromkeys(map(str, self.relations), self.relation_heads(shapes.heads))

    def head(self, student: Shapes, teacher: Shapes) -> TargetHead:
        """See `TargetKind`."""
        check_visible(student, teacher)
        if (student.grid, student.prefix_tokens) != (teacher.grid, teacher.prefix_tokens):
            rows, columns = student.grid
            raise CacheMismatch(
                "the student's tokens are not the teacher's",
                got=f"a grid of {rows} x {columns} and {student.prefix_tokens} prefix tokens",
                expected=f"{teacher.grid[0]} x {teacher.grid[1]}, a multiple or a part, and {teacher.prefix_tokens}",
                hint="choose student.patch_size so that img_size / patch_size is the teacher's grid",
            )
        heads, width = self.relation_heads(teacher.heads), student.width
        if width % heads:
            raise RecipeError(
                f"a student of width {width} cannot be split into {heads} relation heads",
                got=f"student.embed_dim {width}",
                expected=f"a multiple of {heads}",
                hint=f"the nearest are {width // heads * heads or heads} and {(width // heads + 1) * heads}",
            )
        return RelationHead(width, student.heads)

    def losses(self, answers: Answers, target: Rows) -> dict[str, Loss]:
        """See `TargetKind`: KL(teacher row || student row) in nats, mean over the target's rows."""
        heads = next(iter(target.values())).shape[1]
        found = cross_entropy_per_head(QKV(*answers).resplit(heads), target)
        return {str(relation): Loss(found[relation], rows.entropy) for relation, rows in target.items()}

    def yardsticks(self, targets: Sequence[Rows]) -> dict[str, Yardstick]:
        """See `TargetKind`: the KL to even rows, and to the mean over all other views."""
        return {str(name): _yardstick(torch.cat([each[name].dense() for each in targets])) for name in targets[0]}

    def statistics(self, tapped: Tapped, target: Rows) -> dict[str, dict[str, Float[Tensor, "B H"]]]:
        """See `TargetKind`: `entropy_nats` of the teacher's rows, and `kept_mass`, their mass on the stored tokens."""
        qkv, found = self.split(tapped), {}
        for relation, rows in target.items():
            dense = relation_probs(qkv, relation, rows.rows)
            kept = torch.ones_like(dense)
            if isinstance(rows, SparseRows):
                kept = torch.zeros_like(dense).scatter(-1, rows.index, 1.0)
            values = {"entropy_nats": torch.special.entr(dense).sum(-1), "kept_mass": (dense * kept).sum(-1)}
            found[str(relation)] = {name: value.mean(dim=2) for name, value in values.items()}
        return found

    # ---- pictures

    def answered(self, answers: Answers, shapes: Shapes) -> Rows:
        """See `TargetKind`."""
        return exact_rows(QKV(*answers).resplit(self.relation_heads(shapes.heads)), self.relations)

    def picture(self, columns: Mapping[str, Rows], shapes: Shapes, lines: int) -> list[PictureLine]:
        """See `TargetKind`: the most selective query patches, each of another head."""
        return relation_lines(_TITLES, columns, shapes, lines)


class StoredRelations(RelationKind):
    """A codec that stores the relations of its config, in the relation heads of its config."""

    config: SketchCodec | DenseCodec

    @property
    def relations(self) -> tuple[Relation, ...]:
        """See `RelationKind`."""
        return self.config.relations

    def relation_heads(self, heads: int) -> int:
        """See `RelationKind`."""
        return self.config.relation_heads or heads

    def record_heads(self, shapes: Shapes) -> int:
        """H of a record. Raises RecipeError where it does not divide the teacher's width."""
        heads = self.relation_heads(shapes.heads)
        check_divides("codec.relation_heads", heads, shapes.width, shapes.heads)
        return heads


def check_divides(field: str, heads: int, width: int, own_heads: int) -> None:
    """Raises RecipeError, naming `field`, where a teacher of `width` and `own_heads` has no such relation heads."""
    if width % heads:
        raise RecipeError(
            f"a teacher of width {width} cannot be split into {heads} relation heads",
            got=f"{field} {heads}",
            expected=f"a divisor of {width}",
            hint=f"leave {field} out for the teacher's own {own_heads}",
        )


def exact_rows(teacher: QKV, relations: Sequence[Relation]) -> Rows:
    """The dense maps as a target, float32 [B, H, T, T] (float64 for float64 inputs)."""
    probs = {relation: relation_probs(teacher, relation) for relation in relations}
    return {relation: DenseRows(None, each, mean_entropy(each, by_head=True)) for relation, each in probs.items()}


def relation_lines(
    titles: Mapping[Relation, str], columns: Mapping[str, Rows], shapes: Shapes, lines: int
) -> list[PictureLine]:
    """Lines of the rows of one view; the columns of sparse rows have a scale of their own."""

    def whole(rows: RowTarget) -> Float[Tensor, "H T T"]:
        return written_out(rows.dense()[0], None if rows.rows is None else rows.rows[0], rows.shape[-1])

    relations = next(iter(columns.values())).keys()
    maps = {titles[relation]: {name: whole(each[relation]) for name, each in columns.items()} for relation in relations}
    sparse = {name for name, each in columns.items() if any(isinstance(rows, SparseRows) for rows in each.values())}
    return query_lines(maps, shapes.prefix_tokens, shapes.grid, lines, own_scale=sparse)


def mean_entropy(probs: Float[Tensor, "B H Q T"], by_head: bool = False) -> Tensor:
    """Mean of -sum p log p in nats: over H and Q [B], or with `by_head` over Q [B, H]."""
    entropy: Tensor = torch.special.entr(probs).sum(-1).mean(-1 if by_head else (1, 2))
    return entropy


def _yardstick(rows: Float[Tensor, "B H T T"]) -> Yardstick:
    total, entropy, cross = rows.sum(0, dtype=torch.float64), 0.0, 0.0
    for each in rows:
        own = each.double()
        others = (total - own) / (len(rows) - 1)
        entropy += float(torch.special.entr(own).sum(-1).mean())
        cross -= float((own * others.clamp(min=_LEAST_PROBABILITY).log()).sum(-1).mean())
    return Yardstick(math.log(rows.shape[-1]) - entropy / len(rows), (cross - entropy) / len(rows))
