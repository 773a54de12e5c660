"""The streams of a view's random numbers (`targets/counter.py`) that a relation uses, and the query rows drawn by them.

This file is part of the sketch codec's version. Shapes: B view, H head, Q query row, T token.
"""

from typing import Final, Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from tinymim.configs.codecs import Relation
from tinymim.targets.counter import uniforms

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

    The T tokens, on a ring, are cut into Q runs of T/Q (rounded) and one token is drawn from each. Then the ring
    is turned by a uniform number of tokens. A token lies in run j with probability s_j / T (s_j is the length of
    the run, over the turns) and is then drawn with probability 1 / s_j. Each token is therefore in the sample with
    probability sum over j of 1 / T = Q / T, exactly, so means over the rows are unbiased. Neighbouring rows are
    nearly equal, so a spread sample has less variance than a simple random one (docs/decisions/006-sketch.md).

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
    uniform = uniforms(keys, stream_of("rows", relation), (heads, rows + 1))
    edges = torch.arange(rows + 1, device=keys.device) * tokens // rows
    inside = (uniform[..., :rows] * edges.diff()).long()
    turn = (uniform[..., rows:] * tokens).long()
    return ((edges[:-1] + inside + turn) % tokens).sort(dim=-1).values
