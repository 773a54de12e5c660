"""Residual vector quantisation: a vector as the sum of one entry from each of several codebooks.

Source: Juang and Gray, "Multiple stage vector quantization for speech coding", ICASSP 1982. Codebook s holds the
k-means centres of what codebooks 1..s-1 leave of the calibration vectors. The nearest entry is taken in each stage.

The code is **biased**: a vector always comes back as the same sum, so its error does not average out.

This file is part of the versions of the codecs that use it. Shapes: P calibration vector, S codebook, K entry, C width.
"""

from typing import Final

import torch
from jaxtyping import Float, Float32, Float64, Int64, UInt8
from torch import Tensor

from tinymim.targets.counter import uniforms

ENTRIES: Final = 256  # of a codebook: a code is one byte
_ROUNDS: Final = 5  # of k-means; ten rounds leave as large an error
_FIRST: Final = 0x6D65616E73  # the key of the first centres; stream s is codebook s
_CHUNK: Final = 8192  # vectors whose distances to all centres are in memory at once


def codebooks(vectors: Float32[Tensor, "P C"], stages: int) -> Float32[Tensor, "S K C"]:
    """Codebooks for vectors like these, on the CPU; the same for the same vectors."""
    left, books = vectors, []
    for stage in range(stages):
        books.append(_kmeans(left, stage))
        left = left - books[-1][_nearest(left, books[-1])]
    return torch.stack(books)


def encode(vectors: Float64[Tensor, "*n C"], books: Float32[Tensor, "S K C"]) -> UInt8[Tensor, "*n S"]:
    """The codes. In float64, so that a code does not depend on the batch around it."""
    left, codes = vectors, []
    for book in books.double():
        codes.append(_nearest(left, book))
        left = left - book[codes[-1]]
    return torch.stack(codes, dim=-1).to(torch.uint8)


def decode(codes: UInt8[Tensor, "*n S"], books: Float32[Tensor, "S K C"]) -> Float32[Tensor, "*n C"]:
    """The vectors, as sums of entries."""
    value = books.new_zeros(*codes.shape[:-1], books.shape[-1])
    for stage, book in enumerate(books):
        value = value + book[codes[..., stage].long()]
    return value


def _nearest(vectors: Float[Tensor, "*n C"], book: Float[Tensor, "K C"]) -> Int64[Tensor, "*n"]:
    """The number of the nearest entry of every vector."""
    half = book.square().sum(-1) / 2
    flat = vectors.reshape(-1, vectors.shape[-1])
    found = torch.cat([(part @ book.T - half).argmax(-1) for part in flat.split(_CHUNK)])
    return found.reshape(vectors.shape[:-1])


def _kmeans(vectors: Float32[Tensor, "P C"], stage: int) -> Float32[Tensor, "K C"]:
    """Lloyd's centres. Each centre without a vector moves to one of the vectors that are farthest from their own."""
    first = uniforms(torch.tensor([_FIRST]), stage, (len(vectors),))[0].argsort()
    centres = vectors[first[torch.arange(ENTRIES) % len(vectors)]]  # fewer vectors than entries repeat
    for _ in range(_ROUNDS):
        near = _nearest(vectors, centres)
        count = near.bincount(minlength=ENTRIES)
        total = torch.zeros_like(centres).index_add_(0, near, vectors)  # one after the other on the CPU
        moved = total / count.clamp(min=1)[:, None]
        empty = (count == 0).nonzero()[: len(vectors), 0]
        far = (vectors - centres[near]).square().sum(-1).topk(len(empty)).indices
        moved[empty] = vectors[far]
        centres = moved
    return centres
