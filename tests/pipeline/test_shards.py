"""Reading tars by offset, from disk and from object stores: identity, labels, and every kind of damage named."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tinymim.configs.errors import SourceError, UserError
from tinymim.configs.sections.source import SourceConfig
from tinymim.pipeline.index import INDEX_NAME
from tinymim.pipeline.shards import ShardSet, labels_of, open_shards
from tinymim.pipeline.tar import UNLABELLED, split_name

Opened = Callable[..., ShardSet]  # see conftest.py


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def copied(drawn_shards: Path, tmp_path: Path) -> Path:
    """A copy of the drawn shards that a test may damage."""
    return Path(shutil.copytree(drawn_shards, tmp_path / "copied"))


def test_index_and_scan_agree(opened: Opened, drawn_shards: Path, copied: Path) -> None:
    indexed = opened(drawn_shards)
    (copied / INDEX_NAME).unlink()
    scanned = opened(copied)
    assert [(s.name, s.size_bytes, s.num_samples, s.content_hash) for s in indexed.shards] == [
        (s.name, s.size_bytes, s.num_samples, s.content_hash) for s in scanned.shards
    ]
    assert indexed.counts == scanned.counts == [25, 25, 10] and indexed.num_samples == 60
    assert len(indexed.classes) == 10 and scanned.classes == ()
    for ours, theirs in zip(indexed.shards, scanned.shards, strict=True):
        assert ours.members().keys == theirs.members().keys
        np.testing.assert_array_equal(ours.members().labels, theirs.members().labels)


def test_bytes_are_those_that_tarfile_extracts(opened: Opened, drawn_shards: Path) -> None:
    for shard in opened(drawn_shards).shards:
        members = shard.members()
        with tarfile.open(drawn_shards / shard.name) as tar:
            for sample, key in enumerate(members.keys):
                file, label = tar.extractfile(f"{key}.jpg"), tar.extractfile(f"{key}.cls")
                assert file and file.read() == shard.read(sample)
                assert label and int(label.read()) == members.labels[sample]


def test_pattern_selects_and_names_order(opened: Opened, tmp_path: Path) -> None:
    for name in ("val-1", "train-10", "train-2"):
        write_tar(tmp_path / f"{name}.tar", [("a.jpg", b"x")])
    assert [shard.name for shard in opened(tmp_path, "train-*.tar").shards] == ["train-10.tar", "train-2.tar"]
    with pytest.raises(SourceError, match="no shards match 'test"):
        opened(tmp_path, "test-*.tar")
    with pytest.raises(UserError, match=r"does not exist|no shards match"):
        opened(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("n01/b.JPEG", ("n01/b", "jpeg")),
        ("v1.2/c.png", ("v1.2/c", "png")),
        ("猫/ü x.webp", ("猫/ü x", "webp")),
        ("a.left.jpg", ("a", "left.jpg")),
        ("noextension", ("noextension", "")),
    ],
)
def test_split_name_is_webdatasets_rule(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


def test_other_members_are_passed_over_and_unlabelled_is_minus_one(opened: Opened, tmp_path: Path) -> None:
    members = [("a.json", b"{}"), ("a.jpg", b"AA"), ("b.cls", b" 7\n"), ("b.png", b"BBB"), ("c.txt", b"?")]
    shard = opened(write_tar(tmp_path / "x.tar", members).parent).shards[0]
    assert shard.members().keys == ("a", "b")
    assert shard.members().labels.tolist() == [UNLABELLED, 7]
    assert [shard.read(0), shard.read(1)] == [b"AA", b"BBB"]
    with pytest.raises(SourceError, match=r"sample 'a' of shard x.tar has no label"):
        labels_of([shard])


def test_labels_are_in_shard_order(opened: Opened, drawn_shards: Path) -> None:
    np.testing.assert_array_equal(labels_of(opened(drawn_shards).shards), np.arange(60) % 10)


@pytest.mark.parametrize("second", ["a.jpg", "a.png"])
def test_duplicate_key(opened: Opened, tmp_path: Path, second: str) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), (second, b"2")])
    message = (
        r"duplicate key 'a' in shard x.tar" if second == "a.jpg" else r"sample 'a' of shard x.tar has several images"
    )
    with pytest.raises(SourceError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize("text", [b"", b"cat", b"-1", b"1.5", "²".encode(), b"3 4"])
def test_bad_class_number(opened: Opened, tmp_path: Path, text: bytes) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("a.cls", text)])
    with pytest.raises(SourceError, match=r"'a.cls' in shard x.tar is not a class number"):
        opened(tmp_path)


def test_a_tar_cut_anywhere_is_refused_or_whole(opened: Opened, tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole", [(f"{i}.jpg", bytes(700)) for i in range(3)]).read_bytes()
    end = 3 * (512 + 1024)  # header and padded data of each; then zero blocks
    for size in [*range(0, end + 512, 256), 511, 513, end - 1, end + 511]:
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "x.tar").write_bytes(whole[:size])
        with pytest.raises(SourceError, match=r"x\.tar"):
            opened(folder)
    (tmp_path / "x.tar").write_bytes(whole[: end + 512])
    assert opened(tmp_path).num_samples == 3


def test_garbage_is_no_tar(opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"not a tar" * 1000)
    with pytest.raises(SourceError, match=r"x\.tar is not a readable tar"):
        opened(tmp_path)


def test_names_that_are_not_utf8_are_refused(opened: Opened, tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("caf\udce9.jpg", b"1")], errors="surrogateescape", format=tarfile.GNU_FORMAT)
    with pytest.raises(SourceError, match="not UTF-8"):
        opened(tmp_path)


def test_another_size_than_the_index_says(opened: Opened, copied: Path) -> None:
    path = sorted(copied.glob("*.tar"))[1]
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(SourceError) as caught:
        opened(copied)
    assert path.name in caught.value.what and caught.value.hint and INDEX_NAME in caught.value.hint


def test_a_tar_that_the_index_does_not_know_is_scanned(opened: Opened, copied: Path) -> None:
    write_tar(copied / "zz.tar", [("new.jpg", b"1"), ("new.cls", b"3")])
    source = opened(copied)
    assert source.counts == [25, 25, 10, 1] and source.shards[-1].content_hash.startswith("sha256:")


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ('{"version": 99}', "unknown version")])
def test_bad_index(opened: Opened, copied: Path, text: str, message: str) -> None:
    (copied / INDEX_NAME).write_text(text)
    with pytest.raises(SourceError, match=message):
        opened(copied)


def test_a_shard_shortened_after_opening(copied: Path) -> None:
    shard = open_shards(SourceConfig(shards=copied)).shards[0]
    shard.members()
    with open(shard.path, "r+b") as file:
        file.truncate(4000)
    with pytest.raises(UserError, match="is truncated at sample") as caught:
        shard.read(24)
    assert not isinstance(caught.value, SourceError), "it would count as an unreadable image"
    shard.path.unlink()
    with pytest.raises(UserError, match="cannot be read any more") as caught:
        shard.read(0)
    assert not isinstance(caught.value, SourceError)


def test_names_that_point_out_of_the_tar_touch_no_file(opened: Opened, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "shards"
    folder.mkdir(parents=True)
    write_tar(folder / "x.tar", [("../../evil.jpg", b"E"), ("/tmp/evil.jpg", b"F"), ("../evil.cls", b"1")])
    opened(folder)  # writes the members file
    before = sorted(tmp_path.rglob("*"))
    shard = opened(folder).shards[0]
    assert [shard.read(i) for i in range(2)] == [b"E", b"F"]
    assert shard.members().keys == ("../../evil", "/tmp/evil")
    assert sorted(tmp_path.rglob("*")) == before


def add_link(tar: tarfile.TarFile, name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> None:
    link = tarfile.TarInfo(name)
    link.type, link.linkname = kind, target
    tar.addfile(link)


def test_links_in_a_tar_are_the_image_they_point_to(opened: Opened, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add_link(tar, "s/early.jpg", "../c.jpg")  # before its target
        for name in ("c.jpg", "c.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"7"))
        add_link(tar, "hard.jpg", "c.jpg", tarfile.LNKTYPE)
        add_link(tar, "hard.cls", "c.cls", tarfile.LNKTYPE)
        add_link(tar, "soft.jpg", "hard.jpg")  # a link to a link
        add_link(tar, "./dot.jpg", "./s/../hard.jpg")
        folder = tarfile.TarInfo("b.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    shard = opened(tmp_path).shards[0]
    assert shard.members().keys == ("c", "s/early", "hard", "soft", "./dot")
    assert [shard.read(i) for i in range(5)] == [b"7"] * 5
    assert shard.members().labels.tolist() == [7, -1, 7, -1, -1]


@pytest.mark.parametrize("target", ["/etc/passwd", "../gone.jpg", "a.jpg"])
def test_a_link_out_of_a_tar_is_no_image_and_named(opened: Opened, tmp_path: Path, target: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add_link(tar, "a.jpg", target)
        info = tarfile.TarInfo("c.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"C"))
    with pytest.raises(SourceError, match=r"image 'a.jpg' of shard x.tar cannot be read\n  got: a link to"):
        opened(tmp_path)


def test_index_is_what_make_shards_says(drawn_shards: Path) -> None:
    index = json.loads((drawn_shards / INDEX_NAME).read_text())
    assert [row["num_samples"] for row in index["shards"]] == [25, 25, 10]
