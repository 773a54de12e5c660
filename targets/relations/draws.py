"""The streams of a view's random numbers (`targets/counter.py`) that a relation uses, and the query rows drawn by them.

This file is part of the sketch codec's version. Shapes: B view, H head, Q query row, T token.
"""

from typing import Final, Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from tinymim.configs.codecs.relations import Relation
from tinymim.targets.counter import spread

Purpose = Literal["rows", "rounding", "tail"]

PURPOSES: Final[dict[Purpose, int]] = {"rows": 0, "rounding": 1, "tail": 2}
RELATIONS: Final[dict[Relation, int]] = {"qk": 0, "vv": 1, "qq": 2, "kk": 3}


def stream_of(purpose: Purpose, relation: Relation) -> int:
    """Number of the stream for one purpose and relation: 16 x purpose + relation, from the tables above."""
    return 16 * PURPOSES[purpose] + RELATIONS[relation]


def sample_rows(
    keys: Int64[Tensor, " B"], relation: Relation, heads: int, tokens: int, rows: int
) -> Int64[Tensor, "B H Q"]:
    """The query rows of a record: per view and head a stratified sample, spread over the image.

    Neighbouring rows are nearly equal, so a spread sample (`counter.spread`) has less variance than a simple random
    one (docs/decisions/006-sketch.md). Every row is as likely, so means over the rows are unbiased.

    Args:
        keys: int64 [B], one key a view.
        relation: the relation; each has its own sample.
        heads, tokens: H and T of the teacher; each head has its own sample.
        rows: number of rows; `tokens` or more gives all of them.

    Returns:
        int64 [B, H, Q], Q = min(rows, tokens), distinct and ascending along Q.
    """
    if rows >= tokens:
        return torch.arange(tokens, device=keys.device).expand(len(keys), heads, tokens)
    return spread(keys, stream_of("rows", relation), (heads,), tokens, rows)
