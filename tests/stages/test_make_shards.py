"""Images to shards: bytes kept, keys safe, damage listed, the same twice."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tinymim.configs.errors import SourceError, UserError
from tinymim.configs.sections.source import SourceConfig
from tinymim.pipeline import drawn
from tinymim.pipeline.index import INDEX_NAME
from tinymim.pipeline.members import MEMBERS_NAME
from tinymim.pipeline.shards import Shard, hash_file, open_shards
from tinymim.pipeline.tar import UNLABELLED
from tinymim.stages import make_shards
from tinymim.stages.make_shards import Options
from tinymim.stages.run.interrupt import Interrupted, StopFlag


def picture(number: int, fmt: str = "JPEG") -> bytes:
    pixels = np.random.Generator(np.random.Philox(number)).integers(0, 255, (12, 10, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=fmt)
    return buffer.getvalue()


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """key -> (image bytes, label) of all shards of a folder."""
    found = {}
    for shard in open_shards(SourceConfig(shards=folder)).shards:
        members = shard.members()
        for sample, key in enumerate(members.keys):
            found[key] = (shard.read(sample), int(members.labels[sample]))
    return found


def everything(folder: Path) -> dict[str, bytes]:
    """All files but the members file, which holds modification times."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != MEMBERS_NAME}


def make(source: Path | str, target: Path, **options: Any) -> dict[str, Any]:
    return make_shards.run(str(source), target, Options(**options))


def test_class_folders(tmp_path: Path) -> None:
    files = {"dog/1.jpg": picture(1), "ant/x/2.JPEG": picture(2), "ant/3.png": picture(3, "PNG"), "ant/notes.txt": b"?"}
    index = make(fill(tmp_path / "src", files), tmp_path / "dst", images_per_shard=2)
    assert index["classes"] == ["ant", "dog"]
    assert contents(tmp_path / "dst") == {
        "ant/3": (files["ant/3.png"], 0),
        "ant/x/2": (files["ant/x/2.JPEG"], 0),
        "dog/1": (files["dog/1.jpg"], 1),
    }
    with tarfile.open(tmp_path / "dst" / "shard-000000.tar") as tar:
        assert tar.getnames() == ["ant/3.cls", "ant/3.png", "ant/x/2.cls", "ant/x/2.jpg"]


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    source = fill(tmp_path / "src", {"b.jpg": picture(1), "a.webp": picture(2, "WEBP")})
    index = make(source, tmp_path / "dst")
    assert index["classes"] == []
    assert {key: label for key, (_, label) in contents(tmp_path / "dst").items()} == dict.fromkeys("ab", UNLABELLED)


def test_existing_tars_are_packed_anew_with_bytes_labels_and_classes_kept(drawn_shards: Path, tmp_path: Path) -> None:
    index = make(drawn_shards, tmp_path / "dst", images_per_shard=60, prefix="train")
    assert contents(tmp_path / "dst") == contents(drawn_shards)
    assert index["classes"] == list(drawn.CLASSES)
    assert [row["name"] for row in index["shards"]] == ["train-000000.tar"]


def test_drawn(drawn_shards: Path) -> None:
    expected = {key: (data, label) for key, data, label in drawn.samples(0, 0, 60)}
    assert contents(drawn_shards) == expected


def test_drawn_seed(tmp_path: Path, drawn_shards: Path) -> None:
    make("drawn", tmp_path / "dst", count=3, seed=1)
    other, first = contents(tmp_path / "dst"), contents(drawn_shards)
    assert other.keys() < first.keys() and all(other[key] != first[key] for key in other)


def test_index_content(tmp_path: Path) -> None:
    source = fill(tmp_path / "src", {f"c{i % 2}/{i}.jpg": picture(i) for i in range(5)})
    index = make(source, tmp_path / "dst", images_per_shard=2)
    assert json.loads((tmp_path / "dst" / INDEX_NAME).read_text()) == index
    assert [row["num_samples"] for row in index["shards"]] == [2, 2, 1] and index["num_samples"] == 5
    for row in index["shards"]:
        path = tmp_path / "dst" / row["name"]
        assert row["size_bytes"] == path.stat().st_size and row["content_hash"] == hash_file(path)
    assert sorted(everything(tmp_path / "dst")) == [INDEX_NAME, *[f"shard-{i:06d}.tar" for i in range(3)]]


def test_unreadable_images_are_listed_not_fatal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"a.jpg": picture(1), "b.jpg": picture(2)[:-40], "c.jpg": b"", "d.png": b"garbage", "e.jpg": picture(5)}
    index = make(fill(tmp_path / "src", files), tmp_path / "dst")
    assert [row["origin"] for row in index["unreadable"]] == ["b.jpg", "c.jpg", "d.png"]
    assert all(row["reason"] for row in index["unreadable"])
    assert contents(tmp_path / "dst").keys() == {"a", "e"}
    assert "3 unreadable" in capsys.readouterr().err


def test_two_runs_are_byte_identical(tmp_path: Path) -> None:
    files = {f"c{i % 3}/{i}.jpg": picture(i) for i in range(9)} | {"c1/bad.jpg": b"bad", "c2/cut.jpg": picture(1)[:99]}
    source = fill(tmp_path / "src", files)
    for number, name in enumerate(("one", "two")):
        make(source, tmp_path / name, images_per_shard=4)
        make("drawn", tmp_path / f"drawn-{name}", count=12, images_per_shard=5)
        for path in source.rglob("*.jpg"):
            os.utime(path, (number, number))  # times of files are not part of a shard
    assert everything(tmp_path / "one") == everything(tmp_path / "two")
    assert everything(tmp_path / "drawn-one") == everything(tmp_path / "drawn-two")


def test_keys_with_dots_spaces_and_unicode(tmp_path: Path) -> None:
    names = {
        "v1.2/a.b.jpg": "v1_2/a_b",
        "v1.2/a_b.jpg": "v1_2/a_b-2",
        "v1.2/same.jpg": "v1_2/same-2",
        "v1.2/same.JPG.png": "v1_2/same_JPG",
        "v1.2/same.jpeg": "v1_2/same",
        "with space/猫 é.jpg": "with space/猫 é",
        f"long/{'x' * 200}.jpg": f"long/{'x' * 200}",
    }
    files = {name: picture(i) for i, name in enumerate(names)}
    make(fill(tmp_path / "src", files), tmp_path / "dst")
    assert {key: data for key, (data, _) in contents(tmp_path / "dst").items()} == {
        names[name]: data for name, data in files.items()
    }


def test_tars_that_share_keys_are_packed_with_keys_of_their_own(tmp_path: Path) -> None:
    for number in (1, 2):
        make(fill(tmp_path / f"in{number}", {"000.jpg": picture(number)}), tmp_path / "tars" / f"{number}")
        (tmp_path / "tars" / f"{number}" / "shard-000000.tar").rename(tmp_path / "tars" / f"{number}.tar")
    make(tmp_path / "tars", tmp_path / "out")
    assert {key: data for key, (data, _) in contents(tmp_path / "out").items()} == {
        "000": picture(1),
        "000-2": picture(2),
    }


def test_a_name_that_is_not_unicode_becomes_a_key_that_is(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", {"a.jpg": picture(1)})
    (source / "a.jpg").rename(os.fsdecode(os.fsencode(source) + b"/\xff.jpg"))
    make(source, tmp_path / "out")
    assert list(contents(tmp_path / "out")) == ["\N{REPLACEMENT CHARACTER}"]


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no image can be read"):
        make(fill(tmp_path / "in", {"a.jpg": b"no image"}), tmp_path / "out")
    assert not (tmp_path / "out" / INDEX_NAME).exists()


def test_the_extension_follows_the_bytes(tmp_path: Path) -> None:
    files = {"a.jpg": picture(1, "PNG"), "b.png": picture(2), "c.jpg": picture(3, "WEBP")}
    make(fill(tmp_path / "src", files), tmp_path / "dst")
    with tarfile.open(tmp_path / "dst" / "shard-000000.tar") as tar:
        assert tar.getnames() == ["a.png", "b.jpg", "c.webp"]


def test_refuses_a_target_that_holds_files(tmp_path: Path) -> None:
    source = fill(tmp_path / "src", {"a.jpg": picture(1)})
    fill(tmp_path / "dst", {"precious.txt": b"mine"})
    with pytest.raises(SourceError, match="target folder is not empty"):
        make(source, tmp_path / "dst")
    assert everything(tmp_path / "dst") == {"precious.txt": b"mine"}


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", {}, "does not exist"),
        ("empty", {}, "no images found"),
        ("drawn", {"images_per_shard": 0}, "at least 1"),
        ("drawn", {"count": 0}, "count must be at least 1"),
        ("drawn", {"labels": "folder"}, r"another form\n  got: folder\n  expected: auto, none, folders"),
        ("drawn", {"labels": "json:"}, "another form"),
        ("drawn", {"prefer": "txt"}, "prefer is no ending of an image"),
        ("drawn", {"prefix": "a/b"}, "prefix is no start of a file name"),
        ("drawn", {"report": Path("/nowhere/x/page.html")}, "folder of the report does not exist"),
    ],
)
def test_bad_sources_write_nothing(tmp_path: Path, source: str, options: dict[str, Any], message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=message):
        make(source if source == "drawn" else tmp_path / source, tmp_path / "dst", **options)
    assert not (tmp_path / "dst").exists()


def test_stopped_runs_leave_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fill(tmp_path / "src", {f"{i}.jpg": picture(i) for i in range(4)})

    def requested(stop: StopFlag) -> StopFlag:
        stop.requested = True
        return stop

    monkeypatch.setattr(StopFlag, "__enter__", requested)
    with pytest.raises(Interrupted):
        make(source, tmp_path / "dst")
    assert not (tmp_path / "dst" / INDEX_NAME).exists()


def test_shards_are_opened_from_the_index_without_a_scan(drawn_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shard, "members", lambda self: pytest.fail("scanned"))
    assert open_shards(SourceConfig(shards=drawn_shards)).num_samples == 60


# ---------------------------------------------------------------- resized images


def photograph(width: int, height: int, fmt: str = "JPEG", **options: Any) -> bytes:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([y * 255 // height, x * 255 // width, (x + y) % 256], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=fmt, **options)
    return buffer.getvalue()


def test_large_images_are_resized_and_small_ones_keep_their_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "large.jpg": photograph(300, 200),
        "tall.png": photograph(101, 250, "PNG"),
        "turned.jpg": photograph(200, 130, exif=turned),
        "exact.jpg": photograph(64, 90),
        "small.webp": photograph(50, 60, "WEBP"),
        "broken.jpg": b"?",
    }
    source = fill(tmp_path / "src", files)
    index = make(source, tmp_path / "dst", resize_short=64, quality=90)
    assert index["made_by"] == {"source": str(source), "resize_short": 64, "quality": 90, "resized": 3}
    assert [row["origin"] for row in index["unreadable"]] == ["broken.jpg"]
    found = {key: data for key, (data, _) in contents(tmp_path / "dst").items()}
    assert found["exact"] == files["exact.jpg"] and found["small"] == files["small.webp"]
    sizes = {"large": (96, 64), "tall": (64, 158), "turned": (98, 64)}  # EXIF orientation is ignored and dropped
    for key, size in sizes.items():
        with Image.open(io.BytesIO(found[key])) as image:
            assert image.format == "JPEG" and image.size == size and not image.getexif()
    assert "3 images resized" in capsys.readouterr().err
    make(source, tmp_path / "again", resize_short=64, quality=90)
    assert everything(tmp_path / "again") == everything(tmp_path / "dst")


def test_resized_images_are_another_source(tmp_path: Path) -> None:
    source = fill(tmp_path / "src", {"a.jpg": photograph(300, 200), "b.jpg": photograph(30, 20)})
    hashes = {
        make(source, tmp_path / f"dst-{short}-{quality}", resize_short=short, quality=quality)["shards"][0][
            "content_hash"
        ]
        for short, quality in ((0, 95), (100, 95), (100, 80), (50, 95))
    }
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [({"resize_short": -1}, "number of pixels"), ({"quality": 0}, "quality"), ({"quality": 101}, "quality")],
)
def test_bad_resize_options_write_nothing(tmp_path: Path, options: dict[str, int], message: str) -> None:
    source = fill(tmp_path / "src", {"a.jpg": picture(1)})
    with pytest.raises(SourceError, match=message):
        make(source, tmp_path / "dst", **options)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(("limit", "named"), [(1000, "shard-000000.tar"), (11_000, MEMBERS_NAME)])
def test_a_file_that_cannot_be_written_is_named(
    limit: int, named: str, tmp_path: Path, limited: Callable[[int], AbstractContextManager[None]]
) -> None:
    source = fill(tmp_path / "src", {f"{number}.jpg": picture(number) for number in range(4)})
    with pytest.raises(OSError, match="File too large") as caught, limited(limit):
        make(source, tmp_path / "dst", images_per_shard=1)
    assert caught.value.filename == str(tmp_path / "dst" / named)


def test_a_killed_process_of_the_pool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Iterator[Any]:
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor.map", broken)
    with pytest.raises(UserError, match=r"was killed\n  hint: .*memory is short"):
        make("drawn", tmp_path / "dst", count=200)
