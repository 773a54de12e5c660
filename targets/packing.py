"""Codes of 1 to 8 bits, end to end in bytes.

Shapes: M component, Y byte.
"""

import torch
from jaxtyping import UInt8
from torch import Tensor


class Packing:
    """The layout of a token's codes in its bytes: end to end, the first in the lowest bits of the first byte.

    Args:
        bits: 1 to 8 for every component, so a code spans at most two bytes. Packing runs on its device; only the
            constructor waits for that device.

    Attributes:
        num_bytes: Y; the unused bits of the last byte are zero.
    """

    def __init__(self, bits: UInt8[Tensor, " M"]) -> None:
        start = bits.long().cumsum(0) - bits.long()
        self.num_bytes = -(-int(bits.sum()) // 8)
        self._is_plain = bool((bits == 8).all())
        self._byte, self._shift = start // 8, (start % 8).int()
        self._mask = (1 << bits.int()) - 1

    def pack(self, codes: UInt8[Tensor, "*tokens M"]) -> UInt8[Tensor, "*tokens Y"]:
        """Codes of tokens to bytes."""
        if self._is_plain:
            return codes
        word = codes.int() << self._shift
        # One extra byte takes the upper halves of codes that end in the last byte; they are all zero.
        packed = torch.zeros((*codes.shape[:-1], self.num_bytes + 1), dtype=torch.int32, device=codes.device)
        # No two codes share a bit, so sums are unions, in any order.
        packed.index_add_(-1, self._byte, word & 255).index_add_(-1, self._byte + 1, word >> 8)
        return packed[..., :-1].to(torch.uint8)

    def unpack(self, packed: UInt8[Tensor, "*tokens Y"]) -> UInt8[Tensor, "*tokens M"]:
        """The inverse of `pack`."""
        if self._is_plain:
            return packed
        above = (self._byte + 1).clamp(max=self.num_bytes - 1)
        word = packed[..., self._byte].int() | (packed[..., above].int() << 8)
        return ((word >> self._shift) & self._mask).to(torch.uint8)
