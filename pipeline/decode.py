"""Image bytes to the exact uint8 crop that both stages see, its digest, and what made it (I2).

Decoder and resize are torchvision's on uint8 tensors: bit-stable over threads and CPU features (a float resize
is not). EXIF orientation is ignored, as in the ImageNet pipelines of timm and torchvision; every colour mode
is converted to RGB by the decoder.
"""

import hashlib
import importlib.metadata

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from tinymim.configs.errors import SourceError
from tinymim.pipeline.views import View

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_MODES = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
# Libraries whose version can change a pixel or a number.
_LIBRARIES = ("tinymim", "torch", "torchvision", "timm", "numpy", "zarr", "pillow")


def decode(data: bytes) -> Tensor:
    """Decode image bytes to RGB uint8 [3, height, width].

    Raises:
        SourceError: the bytes are not an image that can be decoded.
    """
    if not data:
        raise SourceError("image has no bytes", got="0 bytes", expected="an encoded image")
    try:
        image: Tensor = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise SourceError("image cannot be decoded", got=reason, expected="a JPEG, PNG or WebP image") from error
    return image


def render(image: Tensor, view: View, size: int, interpolation: str) -> Tensor:
    """Crop, resize with antialias and flip: uint8 [3, height, width] -> uint8 [3, size, size]."""
    pixels: Tensor = F.resized_crop(
        image, view.top, view.left, view.height, view.width, [size, size], _MODES[interpolation], antialias=True
    )
    return pixels.flip(-1) if view.flip else pixels


def pixel_digest(pixels: Tensor) -> int:
    """64-bit blake2b of a contiguous uint8 crop, as a signed integer (what the cache stores)."""
    raw = hashlib.blake2b(pixels.contiguous().numpy().data, digest_size=8).digest()
    return int.from_bytes(raw, "big", signed=True)


def environment() -> dict[str, str]:
    """Versions of all libraries that make pixels and numbers, and the digest of a canary resize."""
    versions = {name: _version(name) for name in _LIBRARIES}
    ramp = torch.arange(3 * 96 * 120, dtype=torch.int64)
    canary = ((ramp * ramp * 31 + ramp * 17) % 251).to(torch.uint8).reshape(3, 96, 120)
    crop = render(canary, View(7, 11, 71, 83, True), 48, "bicubic")
    return versions | {"canary": f"{pixel_digest(crop) & (2**64 - 1):016x}"}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
