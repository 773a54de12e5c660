"""Headers of tars that other programs made, or broke: nothing is dropped in silence, nothing hangs."""

import gzip
import io
import os
import random
import tarfile
from pathlib import Path

import pytest

from tinymim.configs.errors import SourceError
from tinymim.configs.sections.source import SourceConfig
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.tar import TarScan, is_system, scan_tar, survey_tar


def packed(members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def named(*names: str) -> bytes:
    return packed([(name, b"3") for name in names])


def survey(data: bytes, prefer: str = "", last_dot: bool = False) -> TarScan:
    return survey_tar(io.BytesIO(data), "x.tar", len(data), prefer, last_dot)


def refused(data: bytes, match: str) -> SourceError:
    with pytest.raises(SourceError, match=match) as caught:
        survey(data)
    assert "x.tar" in caught.value.what
    return caught.value


# ---------------------------------------------------------------- ends


def test_bytes_after_the_end_are_refused() -> None:
    one, two = named("a.jpg"), named("b.jpg")
    assert "--ignore-zeros" in str(refused(one + two, r"bytes follow the end of the archive x.tar").hint)
    refused(one + bytes(50_000) + two, "bytes follow the end")
    refused(one[:1024] + bytes(1024) + b"x", "bytes follow the end")


def test_a_shard_whose_rest_is_zeros_is_refused() -> None:
    data = packed([(f"{i:03d}.jpg", os.urandom(3000)) for i in range(20)])
    for cut in (1024, 20_000, 30_000, 35_001):
        error = refused(data[:cut] + bytes(len(data) - cut), "ends in zeros")
        assert error.hint and "copy the tar again" in error.hint
    refused(bytes(40_960), "ends in zeros")


def test_what_tars_end_with_is_accepted() -> None:
    data = named("a.jpg")
    assert len(data) == 10_240 and list(survey(data).images) == ["a"]
    assert list(survey(data[: 1024 + 512]).images) == ["a"]
    assert list(survey(data + bytes(1024)).images) == ["a"]


def test_a_damaged_header_in_the_middle_is_refused() -> None:
    data = bytearray(named("a.jpg", "b.jpg", "c.jpg"))
    data[1024 + 10] ^= 1
    refused(bytes(data), "damaged: at byte 1024 there is neither a member nor the end")


@pytest.mark.parametrize(
    "magic",
    [gzip.compress(named("a.jpg"), mtime=0), b"BZh91AY", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd\0"],
    ids=["gzip", "bzip2", "xz", "zstd"],
)
def test_compression_is_named(magic: bytes) -> None:
    assert "decompress" in str(refused(magic, r"x.tar is compressed\n  got: (gzip|bzip2|xz|zstd)").hint)


# ---------------------------------------------------------------- names


def test_a_name_with_dots_is_taken_where_only_one_image_can_be_meant() -> None:
    shot = "Screenshot 2024-01-01 at 10.15.30"
    scan = survey(
        named(f"d.x/{shot}.jpg", f"d.x/{shot}.cls", "a.jpg", "a.mask.png", "b.left.png", "b.cls", "a.cls.txt")
    )
    assert list(scan.images) == [f"d.x/{shot}", "a", "b.left"]
    assert [scan.label(key) for key in scan.images] == [3, 3, 3]
    assert dict(scan.skipped) == {"further picture of a sample": 1}
    assert scan.members().labels.tolist() == [3, 3, 3]


def test_names_with_dots_that_could_be_one_sample_are_refused_with_the_rule() -> None:
    data = named("at 10.15.jpg", "at 10.16.jpg")
    error = refused(data, "one key by webdataset's rule")
    assert "at 10.15.jpg" in str(error.got) and "--last-dot" in str(error.hint)
    assert list(survey(data, last_dot=True).images) == ["at 10.15", "at 10.16"]


def test_two_images_of_a_sample_are_refused_or_chosen() -> None:
    data = named("a.png", "a.jpg", "b.png")
    error = refused(data, r"sample 'a' of shard x.tar has several images\n  got: 'a.png', 'a.jpg'")
    assert "--prefer" in str(error.hint)
    for prefer in ("jpg", "png"):
        scan = survey(data, prefer)
        assert [image.name for image in scan.images.values()] == [f"a.{prefer}", "b.png"]
        assert dict(scan.skipped) == {"further picture of a sample": 1}
    assert survey(named("a.png", "a.gif", "a.jpg"), "jpg").images["a"].name == "a.jpg"
    with pytest.raises(SourceError, match=r"expected: one image, or one that ends in .jpg"):
        survey(named("a.png", "a.gif"), "jpg")


def test_companions_of_an_image_are_found_whatever_its_key() -> None:
    scan = survey(named("a.jpg", "a.json", "b.1.jpg", "b.1.json", "b.2.jpg", "b.json"), last_dot=True)
    assert [list(scan.beside(key)) for key in scan.images] == [["json"], ["json"], []]


def test_files_of_systems_are_no_images() -> None:
    names = ["._a.jpg", "__MACOSX/._a.jpg", "@eaDir/a.jpg", ".Trash-0/a.jpg", "x/.ipynb_checkpoints/a.jpg"]
    assert all(map(is_system, names)) and not any(map(is_system, ["./a.jpg", "../a.jpg", ".data/a.jpg", "a._b/c.jpg"]))
    scan = survey(named(*names, "./a.jpg"))
    assert list(scan.images) == ["./a"] and dict(scan.skipped) == {"hidden or system file": 5}


def test_endings_and_other_members_are_counted() -> None:
    scan = survey(named("a.jpg", "b.GIF", "c.heic", "a.json", "a.txt", "README", "d.jpeg"))
    assert list(scan.images) == ["a", "b", "d"]
    assert dict(scan.endings) == {"jpg": 1, "gif": 1, "heic": 1, "json": 1, "txt": 1, "(none)": 1, "jpeg": 1}
    assert set(scan.others["a"]) == {"json", "txt"}


@pytest.mark.parametrize("text", [b"2147483648", b"9" * 30, b"9" * 5000, b"1" * 40 + b"x", b" " * 100 + b"1"])
def test_class_numbers_are_bounded(text: bytes) -> None:
    refused(packed([("a.jpg", b"1"), ("a.cls", text)]), "'a.cls' in shard x.tar is not a class number")


def test_a_sparse_image_is_named_as_one() -> None:
    data = bytearray(named("a.jpg", "b.jpg"))
    data[156] = ord("S")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    with pytest.raises(SourceError, match=r"image 'a.jpg' of shard x.tar cannot be read\n  got: stored sparse"):
        scan_tar(io.BytesIO(data), "x.tar", len(data))


def test_a_link_to_a_sparse_image_is_named_as_one() -> None:
    data = bytearray(named("a.jpg", "b.jpg"))
    data[:] = with_header(with_header(bytes(data), 0, 156, b"S"), 1024, 156, b"1")
    data[:] = with_header(bytes(data), 1024, 157, b"./a.jpg")
    data[:] = with_header(bytes(data), 1024, 124, b"00000000000\0")[:1536] + bytes(9000)  # a link has no data
    assert survey(bytes(data)).left_out[1] == ("b.jpg", "a link to './a.jpg', which is stored sparse")


# ---------------------------------------------------------------- hostile headers


def with_header(data: bytes, place: int, at: int, new: bytes) -> bytes:
    """A tar with changed bytes in the header at `place`, and the checksum that fits."""
    changed = bytearray(data)
    changed[place + at : place + at + len(new)] = new
    changed[place + 148 : place + 156] = b" " * 8
    changed[place + 148 : place + 156] = b"%06o\0 " % sum(changed[place : place + 512])
    return bytes(changed)


@pytest.mark.parametrize(
    "size",
    [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\x80\0\0\0" + b"\x7f" + b"\xff" * 7, b"7" * 11 + b"\0", b"-000001\0"],
)
@pytest.mark.parametrize("kind", [b"0", b"x", b"L", b"K", b"g", b"S", b"V"])
def test_hostile_sizes_neither_hang_nor_fill_the_memory(size: bytes, kind: bytes) -> None:
    data = with_header(with_header(named("a.jpg", "b.jpg"), 0, 124, size), 0, 156, kind)
    with pytest.raises(SourceError, match=r"x\.tar"):
        survey(data)


def test_a_chain_of_attributes_does_not_exhaust_the_stack() -> None:
    attributes = with_header(packed([("a", b"10 path=b\n")])[:1024], 0, 156, b"x")
    refused(attributes * 3000 + named("a.jpg"), "not a readable tar")


@pytest.mark.parametrize("count", [3000, pytest.param(100_000, marks=pytest.mark.slow)])  # a minute
def test_mutations_end_in_our_error_or_success(count: int) -> None:
    draw, accepted = random.Random(0), 0
    bases = [
        packed([("a.jpg", b"x" * 600), ("a.cls", b"3"), ("é" * 90 + ".png", b"y"), ("z" * 150 + ".jpg", b"q")], form)
        for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)
    ]
    for _ in range(count):
        data = bytearray(draw.choice(bases))
        place = draw.randrange(10) * 512
        for _ in range(draw.choice([1, 1, 3])):
            data[place + draw.choice([draw.randrange(512), 156, 124, 125, 135])] = draw.randrange(256)
        data = bytearray(with_header(bytes(data), place, 0, b"")) if draw.random() < 0.8 else data
        try:
            survey(bytes(data))
            accepted += 1
        except SourceError:
            pass
    assert 0 < accepted < count


# ---------------------------------------------------------------- files that are no tars


def test_a_fifo_and_a_dangling_link_among_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(named("a.jpg"))
    os.mkfifo(tmp_path / "b.tar")
    with pytest.raises(SourceError, match=r"shard b.tar is no file\n  got: p"):
        open_shards(SourceConfig(shards=tmp_path))
    (tmp_path / "b.tar").unlink()
    (tmp_path / "b.tar").symlink_to(tmp_path / "gone.tar")
    with pytest.raises(SourceError, match=r"shard b.tar cannot be opened\n  got: a link to nothing"):
        open_shards(SourceConfig(shards=tmp_path))
    (tmp_path / "b.tar").unlink()
    (tmp_path / "b.tar").symlink_to(tmp_path / "a.tar")
    assert open_shards(SourceConfig(shards=tmp_path)).counts == [1, 1]


def test_tars_that_the_pattern_passes_over_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "B.TAR").write_bytes(named("b.jpg"))
    with pytest.raises(SourceError, match=r"hint: B.TAR do not match: set source.pattern='\*.TAR'"):
        open_shards(SourceConfig(shards=tmp_path))
    (tmp_path / "a.tar").write_bytes(named("a.jpg"))
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(named("c.jpg")))
    assert open_shards(SourceConfig(shards=tmp_path)).counts == [1]
    assert "2 files are passed over, since '*.tar' does not match: B.TAR, c.tar.gz" in capsys.readouterr().err
    (tmp_path / "a.tar").unlink()
    (tmp_path / "B.TAR").unlink()
    with pytest.raises(SourceError, match=r"c.tar.gz do not match: decompress them"):
        open_shards(SourceConfig(shards=tmp_path))


@pytest.mark.parametrize("data", [b"", bytes(1024), bytes(10_240), named("a.txt")])
def test_a_tar_without_an_image_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(named("a.jpg"))
    (tmp_path / "b.tar").write_bytes(data)
    with pytest.raises(SourceError, match=r"shard b.tar (holds no image|is not a readable tar)"):
        open_shards(SourceConfig(shards=tmp_path))


def test_a_pattern_that_is_none_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(named("a.jpg"))
    with pytest.raises(SourceError):
        open_shards(SourceConfig(shards=tmp_path, pattern="a\0.tar"))
