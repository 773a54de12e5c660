"""Faults of a cache: flipped or lost bytes, killed writers, failing disks and stores."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest

from tinymim.configs.errors import StoreError, UserError
from tinymim.storage import objects
from tinymim.storage.constants import read_constants
from tinymim.storage.layout import UnitId
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import LocalStore
from tinymim.storage.writer import CacheWriter
from tinymim.tests import s3_server
from tinymim.tests.storage import tiny, workers

FLIPS = 1000
KILLS = 50


def everything(place: Path) -> list[Any]:
    """The content of a cache, read as for a student, with digests."""
    reader = CacheReader(place)
    constants = read_constants(reader.store, reader.manifest)
    records = [reader.read_unit(info) for info in reader.units()]
    return [reader.manifest.to_json(), reader.units(), constants, [(r.keys, r.arrays) for r in records]]


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, np.ndarray):
        return ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    return bool(ours == theirs)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with constants and units of several inner chunks."""
    with CacheWriter.open(tmp_path / "cache", tiny.make_manifest(num_samples=30)) as writer:
        writer.write_constants({"weight": np.arange(50, dtype=np.float32), "bits": np.ones(3, np.uint8)})
        tiny.write_units(writer, [UnitId("train-000.tar", 0, 3), UnitId("train-001.tar", 0, 2)], num_images=30)
    return tmp_path / "cache"


def damaged(path: Path, cache: Path, intact: list[Any], counts: Counter[str]) -> None:
    """Read the cache with `path` damaged: either an error that names the file or its unit, or equal content."""
    name = path.relative_to(cache).as_posix()
    message = None
    try:
        found = everything(cache)
    except UserError as error:
        message = str(error)
    counts["harmless" if message is None else "detected"] += 1
    if message is None:
        assert same(found, intact), f"{name} changed what is read, unnoticed"
    else:
        owner = re.search(r"train-\d+|constants|zarr.json", name)
        assert owner is not None and (owner[0] in message or (not path.exists() and "there is no cache" in message))


def test_a_flipped_byte_anywhere_is_named_or_changes_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    real_read = LocalStore.read

    def recorded(self: LocalStore, path: str, limit: int) -> bytes:
        read.add(path)
        return real_read(self, path, limit)

    monkeypatch.setattr(LocalStore, "read", recorded)
    intact = everything(cache)
    files = sorted(item for item in cache.rglob("*") if item.is_file())
    sizes = [path.stat().st_size for path in files]
    rng, counts = random.Random(0), Counter[str]()
    for number in range(FLIPS):
        # Every file is damaged, large ones more often.
        path = files[number % len(files)] if number % 2 else rng.choices(files, sizes)[0]
        original = path.read_bytes()
        data = bytearray(original)
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        path.write_bytes(data)
        if path.relative_to(cache).as_posix() in read:
            damaged(path, cache, intact, counts)
        else:
            assert path.name == "zarr.json"  # a group, which only other zarr readers read
            counts["never read"] += 1
        path.write_bytes(original)
    assert sum(counts.values()) == FLIPS
    assert counts["detected"] > 0.8 * FLIPS and counts["harmless"] < 0.02 * FLIPS, counts


@pytest.mark.parametrize("what", ["cut", "empty", "gone", "longer", "swapped"])
def test_lost_and_swapped_files_are_named(cache: Path, what: str) -> None:
    intact, counts = everything(cache), Counter[str]()
    for path in sorted(item for item in cache.rglob("*") if item.is_file()):
        original = path.read_bytes()
        other = cache / path.relative_to(cache).as_posix().replace("train-000", "train-001").replace("v0-2", "v0-1")
        if what == "gone":
            path.unlink()
        elif what == "swapped":
            path.write_bytes(other.read_bytes())
        else:
            path.write_bytes({"cut": original[:-1], "empty": b"", "longer": original + b"\n"}[what])
        is_record = path.parent.name == "commits"
        if what == "gone" and is_record:
            assert len(CacheReader(cache).units()) == 1  # the unit does not exist then, as coverage shows
        elif path.name == "zarr.json" and "units" in path.parts and not (path.parent / "c").exists():
            pass  # a group, or an array without payload
        else:
            damaged(path, cache, intact, counts)
        path.write_bytes(original)
    assert counts["detected"] >= 9


def test_killed_at_any_moment_a_cache_comes_out_the_same(tmp_path: Path) -> None:
    manifest = tiny.make_manifest(num_shards=40)
    with CacheWriter.open(tmp_path / "whole", manifest) as writer:
        tiny.write_units(writer, tiny.units_of(manifest))
    whole, rng, kills, finished = tiny.tree(tmp_path / "whole"), random.Random(0), 0, 0
    written: list[UnitId] = []
    place = tmp_path / "killed-0"
    while kills < KILLS:
        process, connection = workers.start(workers.write_all, place, manifest, 60.0)
        if rng.random() < 0.7:  # else at any moment, also while opening
            assert connection.recv() == "open"
        time.sleep(rng.uniform(0.0, 0.15))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        messages = _said(connection)
        written += [message[1] for message in messages if message[0] == "written"]
        if (place / "zarr.json").exists():
            everything(place)
        if "done" in messages or (place.exists() and len(list((place / "commits").glob("*.json"))) == 40):
            CacheWriter.open(place, manifest).close()
            assert tiny.tree(place) == whole
            assert len(written) == len(set(written))  # no committed unit is computed again
            finished, written = finished + 1, []
            place = tmp_path / f"killed-{finished}"
    with CacheWriter.open(place, manifest) as writer:
        tiny.write_units(writer, tiny.units_of(manifest))
    assert tiny.tree(place) == whole


def _said(connection: Any) -> list[Any]:
    found = []
    try:
        while connection.poll():
            found.append(connection.recv())
    except EOFError:
        pass
    return found


# ---------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    manifest = tiny.make_manifest(num_shards=6)
    (small_disk / "filler").write_bytes(os.urandom(850_000))
    with (
        CacheWriter.open(small_disk / "cache", manifest) as writer,
        pytest.raises(UserError, match=r"No space left[\s\S]*hint: free some space"),
    ):
        tiny.write_units(writer, tiny.units_of(manifest))
    held = CacheReader(small_disk / "cache").units()
    assert 0 < len(held) < 6
    everything(small_disk / "cache")
    (small_disk / "filler").unlink()
    with CacheWriter.open(small_disk / "cache", manifest) as writer:
        tiny.write_units(writer, tiny.units_of(manifest))
    with CacheWriter.open(tmp_path / "alone", manifest) as writer:
        tiny.write_units(writer, tiny.units_of(manifest))
    assert tiny.tree(small_disk / "cache") == tiny.tree(tmp_path / "alone")


def test_a_disk_that_turns_read_only_is_explained(small_disk: Path) -> None:
    manifest = tiny.make_manifest()
    with CacheWriter.open(small_disk / "cache", manifest) as writer:
        tiny.write_units(writer, tiny.units_of(manifest)[:1])
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        with pytest.raises(UserError, match=r"cannot write the cache .*Read-only[\s\S]*committed units are intact"):
            tiny.write_units(writer, tiny.units_of(manifest)[1:])
        everything(small_disk / "cache")
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
        tiny.write_units(writer, tiny.units_of(manifest)[1:])
    assert len(CacheReader(small_disk / "cache").units()) == 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EDQUOT])
def test_a_refusal_at_any_write_leaves_the_committed_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    manifest, (first, second) = tiny.make_manifest(), tiny.units_of(tiny.make_manifest())
    real_link = os.link
    for fail_at in range(1, 18, 4):
        place, calls = tmp_path / f"{number}-{fail_at}", iter(range(1000))
        with CacheWriter.open(place, manifest) as writer:
            tiny.write_units(writer, [first])
            before = tiny.tree(place)

            def refusing(source: Any, target: Any, calls: Any = calls, fail_at: int = fail_at) -> None:
                if next(calls) >= fail_at:
                    raise OSError(number, os.strerror(number), str(target))
                real_link(source, target)

            monkeypatch.setattr(os, "link", refusing)
            with pytest.raises(UserError, match="cannot write the cache"):
                tiny.write_units(writer, [second])
            monkeypatch.setattr(os, "link", real_link)
            after = {path: data for path, data in tiny.tree(place).items() if path != "units/train-001/zarr.json"}
            assert after == before
            tiny.write_units(writer, [second])
        assert CacheReader(place).coverage().complete


# ---------------------------------------------------------------- object stores


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3_server.Log]:
    """The log of an S3 server that fails on demand; clients give up after two retries."""
    (tmp_path / "bucket").mkdir()
    with s3_server.served(tmp_path / "bucket", writable=True) as (endpoint, log):
        for name, value in s3_server.environment(endpoint).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setitem(objects.RETRIES, "max_retries", 2)
        objects._connect.cache_clear()
        yield log
    objects._connect.cache_clear()


PLACE = f"s3://{s3_server.BUCKET}/cache"


@pytest.mark.parametrize("fault", ["500", "503", "cut", "hang"])
def test_a_store_that_fails_for_a_moment_is_asked_again(
    failing: s3_server.Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("tinymim.storage.store.WRITE_TIMEOUT_S", 0.5)
    monkeypatch.setattr("tinymim.storage.store.TIMEOUT_PAUSES_S", (0.1, 0.1, 0.1))
    rng = random.Random(0)
    failing.any_fault = lambda method, key: fault if rng.random() < 0.1 else None
    tiny.make_tiny_cache(PLACE)
    failing.any_fault = lambda method, key: None
    tiny.make_tiny_cache(tmp_path / "alone")
    assert tiny.tree(tmp_path / "bucket" / "cache") == tiny.tree(tmp_path / "alone")


@pytest.mark.parametrize(("fault", "text"), [("500", "cannot be reached"), ("403", "refuses access")])
def test_a_store_that_goes_away_loses_nothing(failing: s3_server.Log, tmp_path: Path, fault: str, text: str) -> None:
    manifest = tiny.make_manifest(num_shards=3)
    units = tiny.units_of(manifest)
    for fail_at in (0, 1, 5, 9, 16):
        place, puts = f"{PLACE}-{fail_at}", iter(range(10_000))
        with CacheWriter.open(place, manifest) as writer:
            tiny.write_units(writer, units[:1])

            def faults(method: str, key: str, puts: Any = puts, fail_at: int = fail_at) -> str | None:
                return fault if method == "PUT" and next(puts) >= fail_at else None

            failing.any_fault = faults
            with pytest.raises(StoreError, match=text):
                tiny.write_units(writer, units[1:2])
            failing.any_fault = lambda method, key: None
            assert [info.unit for info in CacheReader(place).units()] == units[:1]
            tiny.write_units(writer, units)
        tiny_alone = tmp_path / f"alone-{fail_at}"
        with CacheWriter.open(tiny_alone, manifest) as writer:
            tiny.write_units(writer, units)
        assert tiny.tree(tmp_path / "bucket" / f"cache-{fail_at}") == tiny.tree(tiny_alone)


def test_a_store_without_conditional_puts_is_refused_clearly(failing: s3_server.Log) -> None:
    failing.any_fault = lambda method, key: "501" if method == "PUT" else None
    with pytest.raises(StoreError) as caught:
        CacheWriter.open(PLACE, tiny.make_manifest())
    assert caught.value.exit_code == 2
    assert list(obstore.list(objects.connect(PLACE)).collect()) == []
