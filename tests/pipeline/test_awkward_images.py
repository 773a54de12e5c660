"""Awkward images and keys end to end: file -> make-shards -> open_shards -> ImageViews -> pixels."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tinymim.configs.errors import SourceError
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.views import ViewConfig
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.decode import decode, render
from tinymim.pipeline.order import view_batches
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews, reduced, reduction_of, view_key
from tinymim.stages import make_shards

SIZE = 24
_Y, _X = np.mgrid[:190, :150]
SMOOTH = Image.fromarray(np.stack([_Y, _X, 255 - _Y], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, fmt: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=fmt, **options)
    return buffer.getvalue()


def oriented(tag: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = tag
    return encoded(SMOOTH, "JPEG", quality=95, exif=exif)


def with_size(data: bytes, height: int, width: int) -> bytes:
    """A JPEG or PNG whose header claims another size."""
    if data.startswith(b"\x89PNG"):
        chunk = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
        return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


def views_of(files: dict[str, bytes], folder: Path, num_views: int = 3, views: ViewConfig | None = None) -> ViewBatch:
    """Every view of every file, through shards."""
    for name, data in files.items():
        (folder / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "in" / name).write_bytes(data)
    make_shards.run(str(folder / "in"), folder / "out", make_shards.Options(labels="none"))
    shards = open_shards(SourceConfig(shards=folder / "out")).shards
    law = RandomViews(views or ViewConfig(size=SIZE))
    (items,) = view_batches(0, shards[0].num_samples, range(num_views), 1000)
    return ImageViews(shards, law, seed=0).batch(items)


GOOD = {
    "1x1.jpg": encoded(SMOOTH.resize((1, 1)), "JPEG"),
    "1xN.jpg": encoded(SMOOTH.resize((1, 700)), "JPEG"),
    "Nx1.png": encoded(SMOOTH.resize((700, 1)), "PNG"),
    "grey.jpg": encoded(SMOOTH.convert("L"), "JPEG"),
    "cmyk.jpg": encoded(SMOOTH.convert("CMYK"), "JPEG", quality=95),
    "palette.png": encoded(SMOOTH.quantize(64), "PNG"),
    "transparent palette.png": encoded(SMOOTH.quantize(64), "PNG", transparency=3),
    "sixteen bits.png": encoded(Image.fromarray((_Y * 300).astype(np.uint16)), "PNG"),
    "one bit.png": encoded(SMOOTH.convert("1"), "PNG"),
    "alpha.png": encoded(SMOOTH.convert("RGBA"), "PNG"),
    "grey alpha.png": encoded(SMOOTH.convert("LA"), "PNG"),
    "lossy.webp": encoded(SMOOTH, "WEBP"),
    "alpha.webp": encoded(SMOOTH.convert("RGBA"), "WEBP", lossless=True),
    "progressive.jpg": encoded(SMOOTH, "JPEG", progressive=True),
    "rotated.jpg": oriented(6),
}
BAD = {
    "truncated.jpg": encoded(SMOOTH, "JPEG")[:-500],
    "truncated, large.jpg": encoded(SMOOTH.resize((900, 800)), "JPEG")[:-500],
    "bomb.jpg": with_size(encoded(SMOOTH, "JPEG"), 10_000, 10_001),
    "bomb.png": with_size(encoded(SMOOTH, "PNG"), 10_000, 10_001),
    "nothing.jpg": b"",
}


@pytest.mark.parametrize("name", GOOD)
def test_awkward_images_give_views(name: str, tmp_path: Path) -> None:
    batch = views_of({name: GOOD[name]}, tmp_path)
    assert batch.pixels.shape == (3, 3, SIZE, SIZE) and batch.unreadable == []
    image = decode(GOOD[name])
    for pixels, view in zip(batch.pixels, batch.views, strict=True):
        assert view.top + view.height <= image.shape[1] and view.left + view.width <= image.shape[2]
        if reduction_of(view, SIZE) == 1:
            assert torch.equal(pixels, render(image, view, SIZE, "bicubic"))
        else:  # decoded at a reduced size, or at full size if the format has no other: similar, not equal
            whole = render(image, view, SIZE, "bicubic")
            assert name == "one bit.png" or (pixels.float() - whole.float()).abs().mean() < 4


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused_in_full_at_any_scale(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no image can be read"):
        views_of({name: BAD[name]}, tmp_path)
    if BAD[name].startswith(b"\xff\xd8"):
        with pytest.raises(SourceError, match="image cannot be decoded"):
            decode(BAD[name], 2, 30)


def test_a_bomb_is_named_as_one() -> None:
    for name in ("bomb.jpg", "bomb.png"):
        with pytest.raises(SourceError, match="decompression bomb"):
            decode(BAD[name])


def test_all_views_of_an_unreadable_image_are_left_out(tmp_path: Path) -> None:
    large = SMOOTH.resize((600, 500))
    views_of({"a.jpg": encoded(large, "JPEG"), "b.png": encoded(large, "PNG")}, tmp_path)
    tar = tmp_path / "out" / "shard-000000.tar"
    whole = tar.read_bytes()
    place = whole.index(b"\xff\xd9")  # the end marker of a.jpg
    tar.write_bytes(whole[: place - 300] + bytes(302) + whole[place + 2 :])
    shards = open_shards(SourceConfig(shards=tmp_path / "out")).shards
    for law in (RandomViews(ViewConfig(size=SIZE)), RandomViews(ViewConfig(size=300, scaled_decode=False))):
        (items,) = view_batches(0, 2, range(5), 10)
        batch = ImageViews(shards, law).batch(items)
        assert batch.keys == ["b"] * 5 and [key for key, _ in batch.unreadable] == ["a"]
        assert batch.items[:, 2].tolist() == list(range(5)) and len(batch.pixels) == len(batch.views) == 5


def test_exif_orientation_is_ignored_in_views(tmp_path: Path) -> None:
    batches = [views_of({"same.jpg": oriented(tag)}, tmp_path / str(tag)) for tag in (1, 3, 6, 8)]
    assert all(torch.equal(batch.pixels, batches[0].pixels) for batch in batches)


def test_views_of_one_image_at_several_scales_are_what_each_is_alone(tmp_path: Path) -> None:
    files = {"a.jpg": encoded(SMOOTH.resize((500, 400)), "JPEG", quality=90)}
    batch = views_of(files, tmp_path, num_views=24, views=ViewConfig(size=80, scale=(0.02, 1.0)))
    assert {reduction_of(view, 80) for view in batch.views} == {1, 2, 4}
    for pixels, view in zip(batch.pixels, batch.views, strict=True):
        reduction = reduction_of(view, 80)
        alone = render(decode(files["a.jpg"], reduction), reduced(view, reduction), 80, "bicubic")
        assert torch.equal(pixels, alone)


def test_awkward_keys(tmp_path: Path) -> None:
    names = ["v1.2/a.b.jpg", "with space/c d.jpg", "über/猫 é.jpg", f"{'long' * 50}.jpg", "-dash.jpg", "100%.jpg"]
    names.append("/".join(["deep" * 10] * 5) + "/x.jpg")
    files = {name: encoded(SMOOTH.resize((60 + i, 70)), "JPEG") for i, name in enumerate(names)}
    batch = views_of(files, tmp_path, num_views=1)
    keys = {name.removesuffix(".jpg").replace(".", "_"): data for name, data in files.items()}
    assert sorted(batch.keys) == sorted(keys)
    law = RandomViews(ViewConfig(size=SIZE))
    for key, view, pixels, identity in zip(batch.keys, batch.views, batch.pixels, batch.view_keys, strict=True):
        image = decode(keys[key])
        assert view == law(key, 0, image.shape[1], image.shape[2]) and int(identity) == view_key(0, key, 0)
        reduction = reduction_of(view, SIZE)
        assert torch.equal(pixels, render(decode(keys[key], reduction), reduced(view, reduction), SIZE, "bicubic"))
