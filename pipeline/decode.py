"""Image bytes to the exact uint8 crop that both stages see, its digest, and what made it (I2).

Decoding is Pillow's (JPEG decoding is the same to the bit in all libraries that use libjpeg-turbo), the resize is
torchvision's on uint8 tensors: bit-stable over threads and CPU features, as a float resize is not. EXIF orientation
is ignored, as in the ImageNet pipelines of timm and torchvision; every colour mode becomes RGB.
"""

import hashlib
import importlib.metadata
import io
import warnings

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from tinymim.configs.errors import SourceError, first_line
from tinymim.pipeline.views import View

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_MODES = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
_FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow's others include some that run programs (EPS)
# Libraries whose version can change a pixel or a number.
_LIBRARIES = ("tinymim", "torch", "torchvision", "timm", "numpy", "zarr", "pillow")


def decode(data: bytes) -> Tensor:
    """Decode image bytes to RGB uint8 [3, height, width]. Alpha is dropped, 16-bit grey is scaled to 8 bits.

    Of animated images the first frame is taken.

    Raises:
        SourceError: the bytes are not an image that can be decoded whole, or a decompression bomb by Pillow's limit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF data and the like: the pixels are whole
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                array = _to_rgb(image)
    except UnidentifiedImageError as error:  # its own message holds a memory address
        kinds = ", ".join(_FORMATS)
        raise SourceError(
            "image cannot be decoded", got=f"{len(data):,} bytes of no known format", expected=kinds
        ) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SourceError(
            "image cannot be decoded", got=first_line(error), expected="a JPEG, PNG or WebP image"
        ) from error
    return torch.from_numpy(array).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 [height, width, 3], writable."""
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        grey = (np.asarray(image, dtype=np.int64).clip(0, 65535) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))


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
