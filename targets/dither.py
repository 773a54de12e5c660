"""Vectors as codes of 1 to 8 bits by stochastic rounding, without bias.

A vector y is coded as code = floor((y + a) / step + u), with a = max |y| and step = 2 a / (2^bits - 1), so the codes
are 0..2^bits - 1. u is uniform in [0, 1) and a function of the view key. Two decoders are unbiased:

- plain: step x code - a. With z = (y + a) / step, E[floor(z + u)] = z. The variance is up to step^2 / 4.
- subtractive: step x (code - u + 1/2) - a, with the same u drawn again. floor(z + u) = z + u - r, where r, the
  fractional part of z + u, is uniform in [0, 1) whatever z is. So the value is y + step x (1/2 - r): its mean is y and
  its variance step^2 / 12, also whatever y is (Roberts, "Picture coding using pseudo-random noise", 1962).

With few bits, step follows the largest component. A fixed random rotation makes the components of every vector alike,
so that the largest is small (Ailon and Chazelle, "The fast Johnson-Lindenstrauss transform", 2009). A linear decoder
keeps the mean, so the vector rotated back is unbiased, too.

This file is part of the versions of the codecs that use it. Shapes: B view, Q vector, C component.
"""

from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from jaxtyping import Float, Float32, Float64, UInt8
from torch import Tensor

from tinymim.targets.counter import uniforms
from tinymim.targets.packing import Packing

_SIGNS: Final = 0x74696E796D696D  # the key of the rotation's signs
# `step` is rounded to fp32; a little more keeps the largest component within the codes.
_MARGIN: Final = 1 + 2.0**-20


@dataclass(frozen=True)
class Dither:
    """The code of vectors of one width.

    Attributes:
        width: C.
        bits: of a component.
        rotated: whether vectors are rotated and the decoder is the subtractive one; else the decoder is plain, and
            does not need the random numbers.
    """

    width: int
    bits: int
    rotated: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of a vector's codes."""
        return -(-self.width * self.bits // 8)

    def encode(
        self, vectors: Float64[Tensor, "B Q C"], uniform: Float64[Tensor, "B Q C"]
    ) -> tuple[UInt8[Tensor, "B Q Y"], Float32[Tensor, "B Q"]]:
        """Bytes and step of every vector. In float64, so that a code does not depend on the batch around it."""
        y = vectors @ rotation(self.width, vectors.device).T if self.rotated else vectors
        most = 2**self.bits - 1
        step = (2 * _MARGIN / most * y.abs().amax(-1)).float()
        exact = step.double()[..., None]
        z = torch.where(exact > 0, y / exact, 0.0) + most / 2
        codes = (z + uniform).floor().clamp(0, most).to(torch.uint8)  # the clamp is for components of nan
        return self._packing(codes.device).pack(codes), step

    def decode(
        self,
        packed: UInt8[Tensor, "B Q Y"],
        step: Float32[Tensor, "B Q"],
        uniform: Float[Tensor, "B Q C"] | None,
    ) -> Float32[Tensor, "B Q C"]:
        """The vectors; `uniform` are the numbers given to `encode`, needed where the code is rotated."""
        y = self._packing(packed.device).unpack(packed).float() - (2**self.bits - 1) / 2
        if not self.rotated:
            plain: Tensor = y * step[..., None]
            return plain
        assert uniform is not None, "the subtractive decoder draws its numbers again"
        y = (y - (uniform - 0.5).float()) * step[..., None]
        with torch.autocast(y.device.type, enabled=False):
            back: Tensor = y @ rotation(self.width, y.device).float()
        return back

    def _packing(self, device: torch.device) -> Packing:
        return _packing(self.width, self.bits, device)


@cache
def _packing(width: int, bits: int, device: torch.device) -> Packing:
    return Packing(torch.full((width,), bits, dtype=torch.uint8, device=device))


@cache
def rotation(width: int, device: torch.device) -> Float64[Tensor, "C C"]:
    """An orthogonal matrix: random signs, then the discrete cosine transform (DCT-II), for any width."""
    place = torch.arange(width, dtype=torch.float64)
    cosines = torch.cos(torch.pi / width * (place + 0.5) * place[:, None]) * (2 / width) ** 0.5
    cosines[0] *= 0.5**0.5
    signs = uniforms(torch.tensor([_SIGNS]), 0, (width,))[0] < 0.5
    rotated: Tensor = cosines * (1 - 2 * signs.double())
    return rotated.to(device)
