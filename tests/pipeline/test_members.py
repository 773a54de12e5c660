"""The members file beside shards: what it holds, who uses it, and every way in which it can be wrong."""

import json
import os
import pickle
import random
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

from tinymim.configs.sections.source import SourceConfig
from tinymim.pipeline import shards as shards_module
from tinymim.pipeline import tar as tar_module
from tinymim.pipeline.index import INDEX_NAME
from tinymim.pipeline.members import MEMBERS_NAME, Keys, Members, MembersWriter, load_members, read_table
from tinymim.pipeline.shards import ShardSet, open_shards
from tinymim.storage.atomic import partial_path

KEYS = ["a", "", "猫/ü x", "a" * 300, "last"]


@pytest.fixture
def copied(drawn_shards: Path, tmp_path: Path) -> Path:
    """A copy of the drawn shards that a test may damage."""
    return Path(shutil.copytree(drawn_shards, tmp_path / "copied"))


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tars whose headers are read."""
    names: list[str] = []
    original = tar_module.scan_tar

    def counted(file: object, name: str, size_bytes: int) -> Members:
        names.append(name)
        return original(file, name, size_bytes)  # type: ignore[arg-type]

    monkeypatch.setattr(shards_module, "scan_tar", counted)
    return names


def opened(folder: Path, pattern: str = "*.tar") -> ShardSet:
    return open_shards(SourceConfig(shards=folder, pattern=pattern))


def all_keys(folder: Path) -> list[list[str]]:
    return [list(shard.members().keys) for shard in opened(folder).shards]


def test_keys_are_a_sequence_of_strings() -> None:
    keys = Keys.of(KEYS)
    assert list(keys) == KEYS == [keys[i] for i in range(5)] == keys[:] == [keys[i - 5] for i in range(5)]
    assert keys == KEYS and keys == tuple(KEYS) and keys != KEYS[:4] and keys != 5
    assert keys[1:4] == KEYS[1:4] and "猫/ü x" in keys and keys.index("last") == 4
    for wrong in (5, -6):
        with pytest.raises(IndexError):
            keys[wrong]
    assert list(Keys.of([])) == []


def test_what_is_written_is_read(tmp_path: Path) -> None:
    numbers = np.arange(5, dtype=np.int64)
    empty = Members(Keys.of([]), numbers[:0], numbers[:0], numbers[:0])
    with MembersWriter(tmp_path) as writer:
        writer.add("empty.tar", 1, "sha256:0", 3, empty)
        writer.add("x.tar", 2**40, "sha256:1", 7, Members(Keys.of(KEYS), numbers * 2**40, numbers + 5, numbers - 1))
        assert not (tmp_path / MEMBERS_NAME).exists()
    table = read_table(tmp_path)
    assert [(e.name, e.size_bytes, e.content_hash, e.mtime_ns) for e in table.values()] == [
        ("empty.tar", 1, "sha256:0", 3),
        ("x.tar", 2**40, "sha256:1", 7),
    ]
    found = load_members(tmp_path, table["x.tar"].block)
    assert found is not None and found.keys == KEYS
    assert found.offsets.tolist() == [i * 2**40 for i in range(5)] and found.labels.tolist() == [-1, 0, 1, 2, 3]
    assert not found.offsets.flags.writeable
    assert table["x.tar"].describes(2**40, "sha256:1", 7)
    for other in ((2**40 + 1, "sha256:1", 7), (2**40, "sha256:2", 7), (2**40, "sha256:1", 8)):
        assert not table["x.tar"].describes(*other)


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / MEMBERS_NAME).write_bytes(b"old")
    with pytest.raises(RuntimeError), MembersWriter(tmp_path):
        raise RuntimeError
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_what_a_dead_process_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = partial_path(tmp_path / MEMBERS_NAME)
    child = subprocess.Popen(["true"])
    child.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: child.pid)
        dead = partial_path(tmp_path / MEMBERS_NAME)
    elsewhere, other = tmp_path / f"{MEMBERS_NAME}.00000000-1-0.partial", tmp_path / "download.partial"
    for path in (ours, dead, elsewhere, other):
        path.write_bytes(b"half")
    with MembersWriter(tmp_path):
        pass
    kept = [MEMBERS_NAME, ours.name, elsewhere.name, other.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_shards_of_make_shards_are_never_scanned(drawn_shards: Path, scanned: list[str]) -> None:
    source = pickle.loads(pickle.dumps(opened(drawn_shards)))
    assert [len(shard.members().keys) for shard in source.shards] == [25, 25, 10]
    assert source.shards[1].members().keys[3].endswith("000028") and scanned == []


@pytest.mark.parametrize("index", [True, False])
def test_the_first_opening_writes_the_file_and_the_second_reads_it(
    copied: Path, scanned: list[str], index: bool
) -> None:
    wanted = all_keys(copied)
    (copied / MEMBERS_NAME).unlink()
    if not index:
        (copied / INDEX_NAME).unlink()
    assert all_keys(copied) == wanted and len(scanned) == 3
    assert all_keys(copied) == wanted and len(scanned) == 3


def test_a_folder_that_cannot_be_written_is_scanned_by_every_process(
    copied: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / MEMBERS_NAME).unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    source = opened(copied)
    assert scanned == [], "the index suffices for opening"
    assert [len(shard.members().keys) for shard in source.shards] == [25, 25, 10] and len(scanned) == 3
    assert not (copied / MEMBERS_NAME).exists()


def test_a_full_disk_costs_only_time(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = all_keys(copied)
    (copied / MEMBERS_NAME).unlink()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert all_keys(copied) == wanted
    assert "cannot be written ([Errno 28]" in capsys.readouterr().err
    assert sorted(path.name for path in copied.iterdir() if "index" in path.name) == [INDEX_NAME]


@pytest.mark.parametrize("place", [-1, -5, -20, -60, 0, 100, 3000, 5000])
def test_a_flipped_byte_never_gives_a_wrong_key(copied: Path, place: int) -> None:
    wanted = all_keys(copied)
    path = copied / MEMBERS_NAME
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert all_keys(copied) == wanted


def test_mutations_give_the_same_members_or_none(copied: Path) -> None:
    path, whole, draw = copied / MEMBERS_NAME, (copied / MEMBERS_NAME).read_bytes(), random.Random(0)
    wanted = {name: list(load_members(copied, entry.block).keys) for name, entry in read_table(copied).items()}  # type: ignore[union-attr]
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 2, 10])):
            data[draw.choice([draw.randrange(len(data)), len(data) - 1 - draw.randrange(600)])] = draw.randrange(256)
        path.write_bytes(data[: draw.choice([len(data), len(data), draw.randrange(len(data))])])
        for name, entry in read_table(copied).items():
            members = load_members(copied, entry.block)
            assert members is None or list(members.keys) == wanted[name]


@pytest.mark.parametrize("size_bytes", [0, 10, 24, 4096, 9000])
def test_a_cut_file_is_written_anew(copied: Path, size_bytes: int) -> None:
    wanted, whole = all_keys(copied), (copied / MEMBERS_NAME).read_bytes()
    os.truncate(copied / MEMBERS_NAME, size_bytes)
    assert all_keys(copied) == wanted
    assert len((copied / MEMBERS_NAME).read_bytes()) >= len(whole)


def test_a_file_replaced_under_an_open_source_gives_no_wrong_key(copied: Path, scanned: list[str]) -> None:
    wanted, source = all_keys(copied), opened(copied)
    members = source.shards[2].members()
    with MembersWriter(copied) as writer:
        writer.add("shard-000002.tar", 1, "", 0, members)
    shards_module._members.cache_clear()
    shards_module._scan.cache_clear()
    read_table(copied)
    assert [list(shard.members().keys) for shard in source.shards] == wanted and len(scanned) == 3


def test_members_of_another_shard_of_the_same_size_are_not_used(copied: Path) -> None:
    """Also where the index is stale: its hash is that of the old shard."""
    tar = copied / "shard-000001.tar"
    data = tar.read_bytes()
    old = opened(copied).shards[1].members().keys[0].encode()
    new = old[:-1] + b"x"
    with open(tar, "r+b") as file:  # in place, so that only the modification time tells
        file.write(data.replace(old + b".", new + b"."))
    fix_checksums(tar)
    assert opened(copied).shards[1].members().keys[0].encode() == new


def fix_checksums(tar: Path) -> None:
    data = bytearray(tar.read_bytes())
    for place in range(0, len(data), 512):
        if data[place + 257 : place + 262] == b"ustar":
            data[place + 148 : place + 156] = b" " * 8
            data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])
    tar.write_bytes(data)


def test_a_damaged_shard_does_not_have_the_file_written_at_every_opening(copied: Path, scanned: list[str]) -> None:
    (copied / "shard-000001.tar").write_bytes(bytes((copied / "shard-000001.tar").stat().st_size))
    before = (copied / MEMBERS_NAME).stat()
    for number in (1, 2):
        opened(copied)
        assert scanned == ["shard-000001.tar"] * number
    assert (copied / MEMBERS_NAME).stat().st_ino == before.st_ino


def test_a_copy_with_other_times_is_scanned_once(copied: Path, scanned: list[str]) -> None:
    wanted = all_keys(copied)
    for tar in copied.glob("*.tar"):
        os.utime(tar)
    for _ in range(2):
        assert all_keys(copied) == wanted and len(scanned) == 3


def test_growth_keeps_what_is_known_and_forgets_what_is_gone(copied: Path, scanned: list[str]) -> None:
    shutil.copy(copied / "shard-000000.tar", copied / "more.tar")
    assert all_keys(copied)[0] == all_keys(copied)[1] and scanned == ["more.tar"]
    opened(copied, "more*.tar")
    assert set(read_table(copied)) == {"more.tar", *(f"shard-{i:06d}.tar" for i in range(3))}
    (copied / "more.tar").unlink()
    shutil.copy(copied / "shard-000000.tar", copied / "other.tar")
    opened(copied)
    assert set(read_table(copied)) == {"other.tar", *(f"shard-{i:06d}.tar" for i in range(3))}


def test_shards_of_several_folders_have_a_file_in_each(drawn_shards: Path, tmp_path: Path, scanned: list[str]) -> None:
    for number in range(2):
        (tmp_path / f"{number}").mkdir()
        shutil.copy(drawn_shards / f"shard-00000{number}.tar", tmp_path / f"{number}")
    for _ in range(2):
        source = opened(tmp_path, "*/*.tar")
        assert [len(shard.members().keys) for shard in source.shards] == [25, 25] and len(scanned) == 2
    assert (tmp_path / "1" / MEMBERS_NAME).exists() and not (tmp_path / MEMBERS_NAME).exists()


def test_a_table_of_another_form_is_passed_over(copied: Path) -> None:
    wanted = all_keys(copied)
    forms: list[object] = [[], {}, [1], [{"name": "x"}], "x"]
    for rows in forms:
        table = json.dumps(rows).encode()
        tail = (0).to_bytes(8, "little") + len(table).to_bytes(8, "little") + zlib.crc32(table).to_bytes(4, "little")
        (copied / MEMBERS_NAME).write_bytes(table + tail + b"tmm1")
        assert read_table(copied) == {}
        assert all_keys(copied) == wanted
