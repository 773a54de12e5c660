"""Bytes to uint8 RGB: every colour mode, clear errors for the rest, and a digest that is a function of the pixels."""

import io
import platform

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode, functional

from tinymim.configs.errors import SourceError
from tinymim.pipeline.decode import decode, environment, facts_of, pixel_digest, render
from tinymim.pipeline.views import View

HEIGHT, WIDTH = 40, 30
_Y, _X = np.mgrid[:HEIGHT, :WIDTH]
SMOOTH = Image.fromarray(np.stack([_Y * 6, _X * 8, 255 - _Y * 6], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, fmt: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=fmt, **options)
    return buffer.getvalue()


MODES = {
    "jpeg": (encoded(SMOOTH, "JPEG", quality=95), 3.0),
    "progressive jpeg": (encoded(SMOOTH, "JPEG", quality=95, progressive=True), 3.0),
    "cmyk jpeg": (encoded(SMOOTH.convert("CMYK"), "JPEG", quality=95), 6.0),
    "png": (encoded(SMOOTH, "PNG"), 0.0),
    "alpha png": (encoded(SMOOTH.convert("RGBA"), "PNG"), 0.0),
    "palette png": (encoded(SMOOTH.quantize(256), "PNG"), 6.0),
    "webp": (encoded(SMOOTH, "WEBP", quality=95), 6.0),
    "lossless alpha webp": (encoded(SMOOTH.convert("RGBA"), "WEBP", lossless=True), 0.0),
    "gif": (encoded(SMOOTH, "GIF"), 6.0),
    "bmp": (encoded(SMOOTH, "BMP"), 0.0),
    "device-independent bitmap": (encoded(SMOOTH, "DIB"), 0.0),
    "tiff": (encoded(SMOOTH, "TIFF"), 0.0),
    "cmyk tiff": (encoded(SMOOTH.convert("CMYK"), "TIFF"), 0.0),
    "ppm": (encoded(SMOOTH, "PPM"), 0.0),
    "jpeg 2000": (encoded(SMOOTH, "JPEG2000"), 0.0),
    "avif": (encoded(SMOOTH, "AVIF", quality=95), 6.0),
    "two jpegs of a camera": (encoded(SMOOTH, "MPO", save_all=True, append_images=[SMOOTH], quality=95), 3.0),
}


@pytest.mark.parametrize("mode", MODES)
def test_colour_modes_become_rgb(mode: str) -> None:
    data, tolerance = MODES[mode]
    image = decode(data)
    assert image.dtype == torch.uint8 and image.shape == (3, HEIGHT, WIDTH)
    wanted = torch.from_numpy(np.asarray(SMOOTH).copy()).permute(2, 0, 1)
    assert (image.float() - wanted.float()).abs().mean() <= tolerance


@pytest.mark.parametrize("fmt", ["JPEG", "PNG"])
def test_grey_becomes_three_equal_channels(fmt: str) -> None:
    image = decode(encoded(SMOOTH.convert("L"), fmt))
    assert image.shape == (3, HEIGHT, WIDTH) and torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


def test_one_bit_png() -> None:
    assert set(decode(encoded(SMOOTH.convert("1"), "PNG")).unique().tolist()) <= {0, 255}


def test_sixteen_bit_png_is_scaled() -> None:
    values = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 54).astype(np.uint16)
    image = decode(encoded(Image.fromarray(values), "PNG"))
    assert image.dtype == torch.uint8
    assert torch.equal(image[0], torch.from_numpy((values // 257).astype(np.uint8)))


JPEG = MODES["jpeg"][0]
BROKEN = {
    "nothing": b"",
    "garbage": b"garbage" * 100,
    "jpeg magic only": b"\xff\xd8\xff",
    "half a jpeg": JPEG[: len(JPEG) // 2],
    "jpeg without its end": JPEG[:-2],
    "half a png": MODES["png"][0][: len(MODES["png"][0]) // 2],
    "half a webp": MODES["webp"][0][:100],
    "half a tiff": encoded(SMOOTH, "TIFF")[:900],
    "half a gif": encoded(SMOOTH, "GIF")[:400],
    "half an avif": encoded(SMOOTH, "AVIF")[:200],
    "targa": encoded(SMOOTH, "TGA"),
    "postscript": encoded(SMOOTH, "EPS"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_image_is_a_source_error(case: str) -> None:
    messages = set()
    for _ in range(2):
        with pytest.raises(SourceError) as caught:
            decode(bytes(bytearray(BROKEN[case])))
        messages.add(str(caught.value))
    # One message, without memory addresses: make-shards lists it in the index, which must be equal in every run.
    assert len(messages) == 1 and "object at" not in messages.pop()


def test_of_an_animation_the_first_frame_is_taken() -> None:
    for fmt in ("PNG", "WEBP"):
        data = encoded(SMOOTH, fmt, save_all=True, append_images=[SMOOTH.rotate(180)], lossless=True)
        assert torch.equal(decode(data), decode(MODES["png"][0]))


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (MODES["jpeg"][0], ("jpg", "RGB", 1)),
        (MODES["two jpegs of a camera"][0], ("jpg", "RGB", 1)),
        (MODES["cmyk jpeg"][0], ("jpg", "CMYK", 1)),
        (MODES["alpha png"][0], ("png", "alpha", 1)),
        (encoded(SMOOTH.quantize(16), "PNG"), ("png", "palette", 1)),
        (encoded(SMOOTH.quantize(16), "PNG", transparency=3), ("png", "alpha", 1)),
        (encoded(SMOOTH.convert("L"), "TIFF"), ("tif", "grey", 1)),
        (encoded(SMOOTH.convert("I;16"), "PNG"), ("png", "grey", 1)),
        (
            encoded(SMOOTH, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
            ("jpg", "RGB", 6),
        ),
        (encoded(SMOOTH, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01"), ("jpg", "RGB", 1)),  # damaged
    ],
)
def test_facts_are_those_of_the_header(data: bytes, wanted: tuple[str, str, int]) -> None:
    facts = facts_of(data)
    assert (facts.extension, facts.colours, facts.orientation) == wanted
    assert (facts.height, facts.width) == (HEIGHT, WIDTH)


def test_damage_beside_the_pixels_is_let_pass_in_silence() -> None:
    transparent = encoded(SMOOTH.quantize(16), "PNG", transparency=bytes(range(16)))
    exif = encoded(SMOOTH, "JPEG", quality=95, exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x09\x00\x12\x01")
    assert decode(transparent).shape == (3, HEIGHT, WIDTH)
    assert torch.equal(decode(exif), decode(JPEG))


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert torch.equal(decode(encoded(SMOOTH, "JPEG", quality=95, exif=exif)), decode(JPEG))


def test_decompression_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(SourceError, match="decompression bomb"):
        decode(JPEG)


def _pattern(height: int, width: int) -> torch.Tensor:
    ramp = torch.arange(3 * height * width)
    return ((ramp * ramp * 7 + ramp * 13) % 253).to(torch.uint8).reshape(3, height, width)


def test_digest_is_blake2b_of_the_bytes_whatever_the_strides() -> None:
    pixels = _pattern(48, 48)
    assert pixel_digest(pixels) == 8246267673314073255
    assert pixel_digest(pixels.flip(-1).flip(-1)) == pixel_digest(pixels)
    assert pixel_digest(pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)) == pixel_digest(pixels)
    changed = pixels.clone()
    changed[2, 47, 47] += 1
    assert pixel_digest(changed) != pixel_digest(pixels)


def test_render_crops_flips_and_keeps_an_exact_crop_as_it_is() -> None:
    image = _pattern(60, 50)
    crop = image[:, 7:23, 11:27]
    assert torch.equal(render(image, View(7, 11, 16, 16, False), 16, "bicubic"), crop)
    assert torch.equal(render(image, View(7, 11, 16, 16, True), 16, "bicubic"), crop.flip(-1))
    assert render(image, View(0, 0, 60, 50, False), 32, "bilinear").shape == (3, 32, 32)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_pixels_are_torchvisions(mode: str) -> None:
    if mode == "bilinear" and torch.backends.cpu.get_cpu_capability() == "DEFAULT" and platform.machine() == "x86_64":
        pytest.skip("without AVX2 torchvision resizes bilinearly in float32, and rounds")
    drawn = np.random.default_rng(0)
    for number in range(150):
        height, width, size = (int(length) for length in drawn.integers(1, 300, 3))
        box_height, box_width = int(drawn.integers(1, height + 1)), int(drawn.integers(1, width + 1))
        top, left = int(drawn.integers(0, height - box_height + 1)), int(drawn.integers(0, width - box_width + 1))
        image = torch.from_numpy(drawn.integers(0, 256, (height, width, 3), dtype=np.uint8)).permute(2, 0, 1)
        image = image.contiguous() if number % 2 else image
        got = render(image, View(top, left, box_height, box_width, False), size, mode)
        wanted = functional.resized_crop(
            image, top, left, box_height, box_width, [size, size], InterpolationMode(mode), antialias=True
        )
        assert torch.equal(got, wanted), (height, width, top, left, box_height, box_width, size)


@pytest.mark.parametrize(("mode", "digest"), [("bicubic", -508473130636483189), ("bilinear", -946377242143089927)])
def test_resized_pixels_are_the_same_on_every_machine(mode: str, digest: int) -> None:
    assert pixel_digest(render(_pattern(200, 300), View(3, 5, 190, 280, True), 96, mode)) == digest


def test_pixels_do_not_depend_on_the_number_of_threads() -> None:
    image, view = _pattern(200, 300), View(3, 5, 190, 280, True)
    before = torch.get_num_threads()
    digests = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        digests.add(pixel_digest(render(image, view, 96, "bicubic")))
    torch.set_num_threads(before)
    assert len(digests) == 1


def test_environment_names_the_libraries_and_a_canary() -> None:
    versions = environment()
    assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"].startswith("2")
    assert len(versions["canary"]) == 16 and environment() == versions
