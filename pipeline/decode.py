"""Image bytes to the exact uint8 crop that both stages see, its digest, and what made it (I2). docs/views.md.

JPEG is decoded by simplejpeg (libjpeg-turbo), everything else, and every JPEG that simplejpeg objects to, by Pillow:
the bits of a JPEG are the same, at every DCT scale. The resize is torch's on uint8: bit-stable over threads and CPU
features, as a float resize is not. EXIF orientation is ignored, as in the ImageNet pipelines of timm and torchvision;
every colour mode becomes RGB.
"""

import hashlib
import importlib.metadata
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from tinymim.configs.errors import SourceError, first_line
from tinymim.pipeline.views import View

# Pillow's names of the formats, with the ending that a shard gives them. Its others run programs (EPS), or take any
# bytes for an image (TGA).
EXTENSIONS: Final = {
    **{"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "DIB": "bmp"},
    **{"TIFF": "tif", "AVIF": "avif", "JPEG2000": "jp2", "PPM": "ppm"},
}
_ORIENTATION = 0x0112  # EXIF
_JPEG_MAGIC = b"\xff\xd8\xff"
# Colours that simplejpeg converts as Pillow does; its CMYK differs.
_JPEG_COLOURS = ("YCbCr", "Gray", "RGB")
# Libraries whose version can change a pixel or a number.
_LIBRARIES = ("tinymim", "torch", "torchvision", "timm", "numpy", "zarr", "pillow", "simplejpeg")


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width by the header of a JPEG that simplejpeg decodes as Pillow does; None for every other image.

    Such an image can be decoded smaller, and not further down than needed.
    """
    if not data.startswith(_JPEG_MAGIC):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    limit = Image.MAX_IMAGE_PIXELS
    if colours not in _JPEG_COLOURS or (limit is not None and height * width > limit):
        return None
    return int(height), int(width)


def decode(data: bytes, reduction: int = 1, rows: int | None = None) -> Tensor:
    """Decode image bytes to RGB uint8 [3, height, width]. Alpha is dropped, 16-bit grey is scaled to 8 bits.

    Of animated images the first frame is taken.

    Args:
        data: an image file of one of the formats in `EXTENSIONS`.
        reduction: 1, 2, 4 or 8: decode at 1/reduction of the size, each side rounded up, by the scaled inverse DCT.
            Other than 1 only where `jpeg_size` knows the image.
        rows: number of rows of the full-size image that are needed; None: all. The result may end anywhere below them,
            and has the same values down to there.

    Raises:
        SourceError: the bytes are not an image that can be decoded whole, or a decompression bomb by Pillow's limit.
            Damage below `rows` goes unseen, but for a missing end.
    """
    size = jpeg_size(data)
    if size is not None:
        height, width = size
        shortened = None if rows is None else _shortened(data, height, rows, reduction)
        readable, height = shortened or (data, height)
        try:
            # min_factor alone would let it choose a smaller scale. What a shortened file holds below its last row is
            # "recoverable damage" to the library, and so it is not strict there.
            array = simplejpeg.decode_jpeg(
                readable,
                "RGB",
                min_height=-(-height // reduction),
                min_width=-(-width // reduction),
                min_factor=reduction,
                strict=shortened is None,
            )
            return torch.from_numpy(array).permute(2, 0, 1)
        except ValueError:
            pass  # damaged, perhaps harmlessly: Pillow decides, and its messages are better
    return torch.from_numpy(_decode_by_pillow(data, reduction)).permute(2, 0, 1)


def _shortened(data: bytes, height: int, rows: int, reduction: int) -> tuple[bytes, int] | None:
    """The file with a smaller height in its frame header, so that decoding stops there, and that height.

    None where nothing would be saved or the file is not simple: one sequential Huffman scan, whole to its end marker.
    """
    unit = 16 * reduction  # at least half a unit more than is needed: chroma is interpolated from rows beyond
    shorter = -(-(rows + unit // 2) // unit) * unit
    if shorter >= height or not data.endswith(b"\xff\xd9"):
        return None
    frame, place = 0, 2
    while place + 10 < len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in (0xC0, 0xC1):
            frame = place
        elif marker == 0xDA:
            if not frame or data[place + 4] != data[frame + 9]:  # the components of the scan, of the frame
                return None
            return data[: frame + 5] + shorter.to_bytes(2, "big") + data[frame + 7 :], shorter
        elif not (marker in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= marker <= 0xEF):  # tables, comments, applications
            return None
        place += 2 + length
    return None


@dataclass(frozen=True)
class Facts:
    """What the header of an image states."""

    extension: str
    height: int
    width: int
    colours: str  # "RGB", "grey", "CMYK", "palette", "alpha", or Pillow's mode
    orientation: int  # of EXIF, 1 to 8; 1: upright or not stated


def facts_of(data: bytes) -> Facts:
    """Read an image's header. Raises SourceError as `decode`."""
    with _opened(data) as image:
        mode = image.mode
        alpha = "transparency" in image.info or mode in ("RGBA", "LA", "PA", "La", "RGBa")
        names = {"L": "grey", "1": "grey", "P": "palette"}
        grey = mode.startswith(("I", "F"))
        turned: object = image.getexif().get(_ORIENTATION)
        return Facts(
            extension=EXTENSIONS.get(image.format or "", "jpg"),
            height=image.height,
            width=image.width,
            colours="alpha" if alpha else "grey" if grey else names.get(mode, mode),
            orientation=turned if isinstance(turned, int) and 1 <= turned <= 8 else 1,
        )


def _decode_by_pillow(data: bytes, reduction: int) -> npt.NDArray[np.uint8]:
    """uint8 [height, width, 3], writable."""
    with _opened(data) as image:
        if reduction > 1:
            image.draft(None, (image.width // reduction, image.height // reduction))
        return _to_rgb(image)


@cache
def _formats() -> tuple[str, ...]:
    """The formats that Pillow decodes on this machine. MPO is opened as JPEG."""
    Image.init()
    return tuple(name for name in EXTENSIONS if name in Image.OPEN)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """An image opened by Pillow. Any error of Pillow in the block becomes a SourceError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF data and the like: the pixels are whole
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                yield image
    except UnidentifiedImageError as error:  # its own message holds a memory address
        raise SourceError(
            "image cannot be decoded", got=f"{len(data):,} bytes of no known format", expected=", ".join(_formats())
        ) from error
    except Exception as error:  # its many parsers raise KeyError, struct.error and more on damaged files
        raise SourceError(
            "image cannot be decoded", got=first_line(error), expected="an image that Pillow decodes"
        ) from error


def _to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 [height, width, 3], writable."""
    if image.mode.startswith("I"):  # 16-bit grey, whatever Pillow's mode: its own conversion would clip at 255
        grey = (np.asarray(image, dtype=np.int64).clip(0, 65535) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))


def render(image: Tensor, view: View, size: int, interpolation: str) -> Tensor:
    """Crop, resize with antialias and flip: uint8 [3, height, width] -> uint8 [3, size, size]."""
    crop = image[:, view.top : view.top + view.height, view.left : view.left + view.width]
    if (view.height, view.width) == (size, size):
        pixels = crop
    else:
        # torchvision's resize without its detour: packed pixels in, planes out. The same kernel and bits. Importing
        # torchvision takes longer than importing torch, and every loader worker would pay for it.
        packed = crop.unsqueeze(0).contiguous(memory_format=torch.channels_last)
        pixels = interpolate(packed, [size, size], mode=interpolation, antialias=True)[0]
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
