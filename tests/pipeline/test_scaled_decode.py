"""Decoding less than the whole image changes no bit, except at the reductions 1/2, 1/4 and 1/8 of the view law."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from tinymim.configs.errors import SourceError
from tinymim.configs.sections.views import ViewConfig
from tinymim.pipeline.decode import _decode_by_pillow, _shortened, decode, jpeg_size
from tinymim.pipeline.views import RandomViews, View, reduced, reduction_of

HEIGHT, WIDTH = 333, 250
_Y, _X = np.mgrid[:HEIGHT, :WIDTH]
BUSY = Image.fromarray(np.stack([_Y * 3 % 256, _X * 5 % 256, _X * _Y % 251], axis=-1).astype(np.uint8))


def jpeg(image: Image.Image = BUSY, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


KINDS = {
    "4:2:0": jpeg(subsampling="4:2:0"),
    "4:2:2": jpeg(subsampling="4:2:2"),
    "4:4:4": jpeg(subsampling="4:4:4"),
    "grey": jpeg(BUSY.convert("L")),
    "rgb": jpeg(keep_rgb=True),
    "progressive": jpeg(progressive=True),
    "restarts": jpeg(restart_marker_blocks=5),
    "exif with a thumbnail": jpeg(exif=b"Exif\x00\x00" + jpeg(BUSY.resize((16, 16)))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_every_scale_and_every_end_has_pillows_bits(kind: str, reduction: int) -> None:
    data = KINDS[kind]
    whole = torch.from_numpy(_decode_by_pillow(data, reduction)).permute(2, 0, 1)
    assert whole.shape == (3, -(-HEIGHT // reduction), -(-WIDTH // reduction))
    assert torch.equal(decode(data, reduction), whole)
    for rows in (1, 7, 8, 9, 15, 16, 17, 100, 200, 257, HEIGHT - 1, HEIGHT):
        needed = (rows + reduction // 2) // reduction
        assert torch.equal(decode(data, reduction, rows)[:, :needed], whole[:, :needed])


def test_decoding_stops_early_where_the_file_is_simple_and_not_elsewhere() -> None:
    stops = {kind: _shortened(data, HEIGHT, 50, 1) is not None for kind, data in KINDS.items()}
    assert stops == dict.fromkeys(KINDS, True) | {"progressive": False}
    assert decode(KINDS["4:2:0"], 1, 50).shape[1] == 64
    assert _shortened(KINDS["4:2:0"], HEIGHT, HEIGHT, 1) is None
    assert _shortened(KINDS["4:2:0"] + b"\0", HEIGHT, 50, 1) is None  # without an end marker all of it is read


def test_a_truncated_image_is_refused_however_little_of_it_is_needed() -> None:
    for kind, data in KINDS.items():
        for cut, reduction in itertools.product((4, 100, len(data) // 3), (1, 4)):
            with pytest.raises(SourceError, match="image cannot be decoded"):
                decode(data[:-cut], reduction, 16)
        assert decode(data, 1, 16).shape[2] == WIDTH, kind


def test_harmless_damage_gives_the_same_pixels_however_far_down_it_is_read() -> None:
    data = bytearray(KINDS["4:2:0"])
    data[len(data) // 3] ^= 0x5A
    whole = torch.from_numpy(_decode_by_pillow(bytes(data), 1)).permute(2, 0, 1)
    for rows in (40, 120, 200, 300, HEIGHT):
        assert torch.equal(decode(bytes(data), 1, rows)[:, :rows], whole[:, :rows])


def test_header_sizes() -> None:
    assert {jpeg_size(data) for data in KINDS.values()} == {(HEIGHT, WIDTH)}
    png = io.BytesIO()
    BUSY.save(png, format="PNG")
    for other in (png.getvalue(), jpeg(BUSY.convert("CMYK")), b"", b"\xff\xd8\xff", KINDS["grey"][:40]):
        assert jpeg_size(other) is None


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(1, 1, 1), (447, 900, 1), (448, 448, 2), (895, 896, 2), (896, 896, 4), (1792, 1792, 8), (9000, 9000, 8)],
)
def test_reduction_leaves_at_least_the_output_size(height: int, width: int, expected: int) -> None:
    assert reduction_of(View(0, 0, height, width, False), 224) == expected


def test_golden_reduced_boxes() -> None:
    view = View(101, 46, 905, 1003, True)
    assert reduced(view, 1) == view
    assert reduced(view, 2) == View(51, 23, 452, 502, True)
    assert reduced(view, 4) == View(25, 12, 227, 250, True)
    assert reduced(view, 8) == View(13, 6, 113, 125, True)


def test_reduced_boxes_stay_inside_and_long_enough() -> None:
    law, size = RandomViews(ViewConfig(size=20, scale=(0.05, 1.0))), 20
    found = set()
    for index in range(3000):
        height, width = 20 + index % 311, 20 + index % 293
        view = law(f"k{index}", 0, height, width)
        reduction = reduction_of(view, size)
        found.add(reduction)
        box = reduced(view, reduction)
        assert box.top >= 0 and box.top + box.height <= -(-height // reduction)
        assert box.left >= 0 and box.left + box.width <= -(-width // reduction)
        if reduction > 1:
            assert min(box.height, box.width) >= size
        assert abs(box.top * reduction - view.top) <= reduction / 2
        assert abs((box.left + box.width) * reduction - view.left - view.width) <= reduction / 2
    assert found == {1, 2, 4, 8}
