"""The spool: its budget, eviction, and processes that share it, die or fill its disk."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinymim.configs.errors import RecipeError, StoreError, UserError
from tinymim.configs.sections.source import SourceConfig, SpoolConfig
from tinymim.pipeline import remote, spool
from tinymim.pipeline.remote import RemoteObject
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.spool import NoRoom, Spool, SpooledTar
from tinymim.tests import s3_server
from tinymim.tests.s3_server import Log

SIZE = 100_000
PART = 10_000
READ = """
import sys, types
from pathlib import Path
sys.modules["tinymim.pipeline.decode"] = types.SimpleNamespace(IMAGE_EXTENSIONS=())  # avoids the import of torch
from tinymim.pipeline import spool
from tinymim.pipeline.remote import RemoteObject
spool.PART_BYTES, spool.REQUESTS = 10_000, 1
tars = [spool.SpooledTar(RemoteObject(*eval(line)), spool.Spool(Path(sys.argv[1]), 10**9), "") for line in sys.argv[2:]]
for tar in tars:
    with tar.open() as file:
        print(len(file.read()), flush=True)
"""


@pytest.fixture
def bucket(tmp_path: Path, s3: Log, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in S3 with the objects 0.tar to 5.tar, each of 100,000 bytes, fetched in ten parts."""
    monkeypatch.setattr(spool, "PART_BYTES", PART)
    monkeypatch.setattr(spool, "_POLL_S", 0.005)
    folder = tmp_path / "bucket"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.tar").write_bytes(os.urandom(SIZE))
    return folder


def tar(folder: Path, number: int, budget: int = 10 * SIZE, at: Path | None = None) -> SpooledTar:
    name = f"{number}.tar"
    found = RemoteObject(f"s3://{s3_server.BUCKET}{folder}", name, SIZE, s3_server._tag(folder / name).strip('"'))
    return SpooledTar(found, Spool(at or folder.parent / "spool", budget), "")


def read(each: SpooledTar) -> bytes:
    with each.open() as file:
        return file.read()


def spooled(folder: Path) -> list[int]:
    return [number for number in range(6) if tar(folder, number).path.exists()]


def age(each: SpooledTar, seconds: float) -> None:
    os.utime(each.path, (time.time() - seconds,) * 2)


def partial(each: SpooledTar) -> Path:
    return each.path.with_suffix(".tar.partial")


# ---------------------------------------------------------------- budget


def test_the_least_recently_used_goes_first(bucket: Path, s3: Log) -> None:
    tars = [tar(bucket, number, 3 * SIZE) for number in range(6)]
    for number in (0, 1, 2):
        assert read(tars[number]) == (bucket / f"{number}.tar").read_bytes()
    for number in (0, 1, 2):
        age(tars[number], 100 - number)
    read(tars[0])  # used again
    read(tars[3])
    assert spooled(bucket) == [0, 2, 3]
    read(tars[4])
    assert spooled(bucket) == [0, 3, 4]
    held = sum(path.stat().st_size for path in tars[0].spool.path.glob("*.tar*"))
    assert held <= 3 * SIZE
    s3.clear()
    assert read(tars[0]) and s3.gets == []
    assert read(tars[1]) == (bucket / "1.tar").read_bytes() and len(s3.gets) == SIZE // PART


def test_what_is_in_use_is_never_evicted(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "ROOM_S", 0.1)
    first, second, third = (tar(bucket, number, 2 * SIZE) for number in range(3))
    with first.open() as held:
        read(second)
        age(first, 1000)
        read(third)
        assert spooled(bucket) == [0, 2]
        with third.open(), pytest.raises(UserError, match=r"no room for shard 1\.tar") as caught:
            second.open()
        assert held.read() == (bucket / "0.tar").read_bytes()
    assert caught.value.hint and "source.spool.gib" in f"{caught.value.expected}{caught.value.hint}"
    assert list(first.spool.path.glob("*.partial")) == []
    read(second)


def test_a_download_that_ends_while_the_folder_is_listed_is_counted(
    bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list then holds a name that is gone, and not the new one."""
    ending, wanted = (tar(bucket, number, budget=SIZE) for number in range(2))
    ending.path.parent.mkdir()
    partial(ending).write_bytes(bytes(SIZE))

    def listed(path: Path) -> list[os.DirEntry[str]]:
        found = list(scandir(path))
        partial(ending).rename(ending.path)
        return found

    scandir = os.scandir
    with partial(ending).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # as the process does that has downloaded it
        monkeypatch.setattr(os, "scandir", listed)
        with pytest.raises(NoRoom):
            wanted.fetch()
    assert ending.path.exists() and not wanted.path.exists()


def test_a_reader_waits_for_room(bucket: Path) -> None:
    first, second = (tar(bucket, number, SIZE) for number in range(2))
    held = first.open()
    threading.Timer(0.1, held.close).start()
    assert read(second) == (bucket / "1.tar").read_bytes() and spooled(bucket) == [1]


def test_a_download_ahead_of_need_evicts_only_what_is_out_of_use(bucket: Path) -> None:
    first, second, third = (tar(bucket, number, 2 * SIZE) for number in range(3))
    read(first)
    read(second)
    with pytest.raises(NoRoom):
        third.fetch(ahead=lambda: True)
    assert spooled(bucket) == [0, 1]
    assert second.touch(used=False)
    file = third.fetch(ahead=lambda: True)
    assert file is not None and file.read() == (bucket / "2.tar").read_bytes()
    file.close()
    assert spooled(bucket) == [0, 2]
    age(first, 2 * spool.STALE_S)
    assert second.fetch(ahead=lambda: False) is None  # ended before its first byte
    assert spooled(bucket) == [2] and not tar(bucket, 5).touch()


def test_a_budget_below_one_shard_is_refused_with_both_numbers(drawn_shards: Path, s3: Log) -> None:
    url, size = f"s3://{s3_server.BUCKET}{drawn_shards}", (drawn_shards / "shard-000000.tar").stat().st_size
    with pytest.raises(RecipeError, match=r"source\.spool\.gib is less than shard shard-000000\.tar") as caught:
        open_shards(SourceConfig(shards=url, spool=SpoolConfig(gib=1e-5)))
    assert f"{int(1e-5 * 2**30):,} bytes" in str(caught.value.got) and f"{size:,}" in str(caught.value.expected)
    assert s3.of(".tar") == []


def test_foreign_files_are_neither_counted_nor_touched(bucket: Path) -> None:
    folder = bucket.parent / "spool"
    folder.mkdir()
    others = [folder / "precious.tar", folder / "0.tar.partial", folder / f"{'a' * 32}-999999999.tar.bak"]
    for path in others:
        path.write_bytes(b"x" * SIZE)
    for number in range(6):
        read(tar(bucket, number, SIZE))
    assert spooled(bucket) == [5] and all(path.stat().st_size == SIZE for path in others)


@pytest.mark.parametrize("name", ["../../evil.tar", "/etc/evil.tar", "a/b.tar", "ü\n\0x.tar", "x" * 3000])
def test_no_name_points_out_of_the_folder(tmp_path: Path, name: str) -> None:
    found = SpooledTar(RemoteObject("s3://bucket", name, 5, "../version"), Spool(tmp_path, 10), "")
    assert found.path.parent == tmp_path and spool._NAME.fullmatch(found.path.name)


def test_memory_is_bounded(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bucket / "0.tar").write_bytes(os.urandom(100 * PART))
    tag = s3_server._tag(bucket / "0.tar").strip('"')
    found = RemoteObject(f"s3://{s3_server.BUCKET}{bucket}", "0.tar", 100 * PART, tag)
    each = SpooledTar(found, Spool(bucket.parent, 10**7), "")
    parts: list[memoryview] = []

    def counted(source: RemoteObject, start: int, end: int) -> memoryview:
        assert end - start == PART
        parts.append(remote.fetch_range(source, start, end))
        assert len(parts) * PART - partial(each).stat().st_size <= (spool.REQUESTS + 1) * PART  # not written yet
        return parts[-1]

    monkeypatch.setattr(spool, "fetch_range", counted)
    assert len(read(each)) == 100 * PART and len(parts) == 100


# ---------------------------------------------------------------- damage


def test_a_partial_is_taken_over_at_its_end(bucket: Path, s3: Log) -> None:
    each = tar(bucket, 0)
    data = (bucket / "0.tar").read_bytes()
    each.spool.path.mkdir()
    partial(each).write_bytes(data[:33_333])
    assert read(each) == data and not partial(each).exists()
    assert min(get.start for get in s3.gets) == 33_333 and sum(get.end - get.start for get in s3.gets) == SIZE - 33_333


def test_a_partial_of_another_version_is_left_alone_and_evicted_in_its_turn(bucket: Path) -> None:
    old = tar(bucket, 0, 2 * SIZE)
    old.spool.path.mkdir()
    partial(old).write_bytes(b"old bytes")
    (bucket / "0.tar").write_bytes(os.urandom(SIZE))
    new = tar(bucket, 0, 2 * SIZE)
    assert read(new) == (bucket / "0.tar").read_bytes() and partial(old).exists()
    read(tar(bucket, 1, 2 * SIZE))
    assert not partial(old).exists() and spooled(bucket) == [0, 1]


def test_damaged_bytes_of_a_partial_are_fetched_again(bucket: Path, s3: Log) -> None:
    data = (bucket / "0.tar").read_bytes()
    plain = tar(bucket, 0)
    with plain.open() as file:
        content_hash = spool._sha256(file)
    plain.path.unlink()
    each = SpooledTar(plain.source, plain.spool, content_hash)
    partial(each).write_bytes(bytes(50_000))
    assert read(each) == data
    each.path.unlink()
    wrong = SpooledTar(plain.source, plain.spool, "sha256:0")
    with pytest.raises(StoreError, match=r"is not the shard that index\.json describes") as caught:
        wrong.open()
    assert caught.value.got == content_hash and caught.value.hint and not partial(wrong).exists()


def test_a_spooled_file_that_was_cut_is_fetched_again(bucket: Path) -> None:
    each = tar(bucket, 0)
    read(each)
    os.truncate(each.path, 10)
    assert read(each) == (bucket / "0.tar").read_bytes()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(bucket: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    each = tar(bucket, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=f"the disk of the spool folder {each.spool.path} is full") as caught:
            each.open()
    assert "source.spool.gib" in str(caught.value.hint) and f"{SIZE:,} bytes" in str(caught.value.expected)
    assert list(each.spool.path.glob("*.tar*")) == []
    assert len(read(each)) == SIZE


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_is_named_and_left_empty(bucket: Path, tiny_disk: Path) -> None:
    each = tar(bucket, 0, at=tiny_disk)
    with pytest.raises(UserError, match="is full") as caught:
        each.open()
    assert str(tiny_disk) in caught.value.what and list(tiny_disk.glob("*.tar*")) == []


def test_a_folder_that_cannot_be_made_is_named(bucket: Path) -> None:
    (bucket.parent / "file").touch()
    with pytest.raises(UserError, match=r"the spool folder .* cannot be used") as caught:
        tar(bucket, 0, at=bucket.parent / "file").open()
    assert "source.spool.folder" in str(caught.value.hint)


# ---------------------------------------------------------------- many processes


def start(bucket: Path, *numbers: int) -> "subprocess.Popen[str]":
    """A process that reads these tars in turn and prints the length of each."""
    sources = [tar(bucket, number).source for number in numbers]
    rows = [repr((each.url, each.path, each.size_bytes, each.version)) for each in sources]
    command = [sys.executable, "-c", READ, str(bucket.parent / "spool"), *rows]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_and_threads_download_every_shard_once(bucket: Path, s3: Log) -> None:
    s3.latency_s = 0.01
    try:
        process = start(bucket, *range(6))
        assert process.stdout and process.stdout.readline() == f"{SIZE}\n"
        threads = [threading.Thread(target=read, args=(tar(bucket, number),)) for number in (1, 5, 5, 4, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out == f"{SIZE}\n" * 5, err
    finally:
        s3.latency_s = 0.0
    ranges = [(get.key, get.start) for get in s3.gets]
    assert len(ranges) == len(set(ranges)) == 6 * SIZE // PART


def test_a_download_that_was_killed_is_gone_on_with(bucket: Path, s3: Log) -> None:
    each, found = tar(bucket, 0), list[bytes]()
    s3.latency_s = 0.1
    try:
        process = start(bucket, 0)
        while not (partial(each).exists() and partial(each).stat().st_size >= 3 * PART):
            assert process.poll() is None
            time.sleep(0.01)
        waiting = threading.Thread(target=lambda: found.append(read(each)))  # must wait for the claim
        waiting.start()
        time.sleep(0.05)
        assert partial(each).stat().st_size < SIZE
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        waiting.join()
    finally:
        s3.latency_s = 0.0
    assert found == [(bucket / "0.tar").read_bytes()]
    again = len(s3.gets) - len({get.start for get in s3.gets})
    assert len({get.start for get in s3.gets}) == SIZE // PART and again <= 1  # the requests of the killed process
