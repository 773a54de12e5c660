"""Relation rows of some query patches, for a picture of teacher, cache and students side by side.

Shapes: B view, H relation head, T token.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from tinymim.configs.taps import Shapes
from tinymim.targets.contract import Answers, Tapped
from tinymim.targets.relations.kind import RelationKind, exact_rows
from tinymim.targets.relations.qkv import QKV
from tinymim.targets.relations.rows import Rows, RowTarget

TITLES: Final[dict[str, str]] = {
    "qk": "query-key: what this patch looks for",
    "vv": "value-value: what is like this patch",
}


class QueryMaps(NamedTuple):
    """One query patch of one view.

    Attributes:
        view: the view's place in the batch.
        head: the relation head, counted from 0.
        query: the patch, counted from 0 in raster order.
        maps: probabilities of the patches, float [rows, columns], by relation and then by model ("teacher", the
            cache's name, a student's name).
    """

    view: int
    head: int
    query: int
    maps: dict[str, dict[str, Tensor]]


def query_maps(
    kind: RelationKind,
    shapes: Shapes,
    teacher: Tapped,
    stored: tuple[str, Rows],
    students: Mapping[str, Answers],
    queries_per_view: int,
) -> Iterator[QueryMaps]:
    """The most selective queries of every view, among those whose row is stored for all relations.

    Args:
        kind: the kind of the cache.
        shapes: the teacher's shapes.
        teacher: the teacher's tensors for B views.
        stored: a name for the cache's rows, and the decoded records of the B views.
        students: answers for the B views by the student's name.
        queries_per_view: number of queries, each in another head.
    """
    name, target = stored
    heads = kind.relation_heads(shapes.heads)
    sides = {"teacher": kind.split(teacher)} | {who: QKV(*each).resplit(heads) for who, each in students.items()}
    dense = {who: exact_rows(qkv, kind.relations) for who, qkv in sides.items()}
    exact = {r: {who: maps[r].dense() for who, maps in dense.items()} for r in target}
    entropy = torch.stack([torch.special.entr(maps["teacher"]).sum(-1) for maps in exact.values()]).sum(0)
    prefix = shapes.prefix_tokens
    for view in range(len(entropy)):
        held = [rows.rows for rows in target.values()]
        for head, query in _queries(entropy[view], held, view, prefix, queries_per_view):
            found: dict[str, dict[str, Tensor]] = {}
            for relation, by_model in exact.items():
                rows = {who: probs[view, head, query] for who, probs in by_model.items()}
                own, *others = rows.items()
                rows = dict([own, (name, _stored_row(target[relation], view, head, query)), *others])
                found[str(relation)] = {who: row[prefix:].reshape(shapes.grid) for who, row in rows.items()}
            yield QueryMaps(view, head, query - prefix, found)


def _queries(
    entropy: Tensor, sampled: Sequence[Tensor | None], view: int, prefix: int, most: int
) -> list[tuple[int, int]]:
    """(head, query) pairs of one view, sampled by every relation; the least entropy [H, T] of each head, ascending."""
    held = torch.ones_like(entropy, dtype=torch.bool)
    held[:, :prefix] = False
    for rows in sampled:
        if rows is not None:
            held &= torch.zeros_like(held).scatter(1, rows[view], True)
    least, query = entropy.masked_fill(~held, torch.inf).min(dim=1)
    order = [head for head in least.argsort().tolist() if least[head] < torch.inf]
    return [(head, int(query[head])) for head in order[:most]]


def _stored_row(target: RowTarget, view: int, head: int, query: int) -> Tensor:
    """The stored row of `query`, written out, [T]."""
    place = query if target.rows is None else int((target.rows[view, head] == query).nonzero())
    return target.dense()[view, head, place]
