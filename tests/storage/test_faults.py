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
from tinymim.storage.commit import UnitInfo, holds_keys
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.reader import CacheReader
from tinymim.storage.writer import CacheWriter
from tinymim.tests import s3_server
from tinymim.tests.storage import tiny, workers
from tinymim.tests.storage.tiny import CLS, REL

FLIPS = 1000
KILLS = 50


def units_in(reader: CacheReader) -> list[UnitInfo]:
    """The units of all layers."""
    return [info for layer in (VIEWS, *reader.layers) for info in reader.units(layer)]


def everything(place: Path) -> list[Any]:
    """The content of a cache, read as for a student: descriptions, records, constants, arrays, keys."""
    reader = CacheReader(place)
    infos = units_in(reader)
    keys = [reader.read_keys(info) for info in infos if holds_keys(info.layer, info.unit)]
    constants = {name: reader.constants(name) for name in reader.layers}
    arrays = [reader.read_views(info) for info in infos]
    descriptions = [reader.manifest.to_json(), *(layer.to_json() for layer in reader.layers.values())]
    return [descriptions, infos, keys, constants, arrays]


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
    """A cache of two layers, one with constants."""
    manifest = tiny.make_manifest(num_samples=30)
    with CacheWriter.open(tmp_path / "cache", manifest, [tiny.make_layer(name=name) for name in (CLS, REL)]) as writer:
        writer.write_constants(CLS, tiny.make_constants())
        tiny.write_units(writer, [UnitId("train-000.tar", 0, 3), UnitId("train-001.tar", 0, 2)], num_images=30)
    return tmp_path / "cache"


def damaged(path: Path, cache: Path, intact: list[Any]) -> bool:
    """Read the cache with `path` damaged: an error that names the file or its unit and layer, or equal content."""
    name = path.relative_to(cache).as_posix()
    try:
        found = everything(cache)
    except UserError as error:
        message = str(error)
        owner = re.search(r"train-\d+|constants|zarr.json", name)
        layer = re.search(r"rel|cls|views", name)
        assert owner is not None and (owner[0] in message or (not path.exists() and "there is no" in message)), message
        assert layer is None or layer[0] in message, message
        return True
    assert same(found, intact), f"{name} changed what is read, unnoticed"
    return False


def read_parts(cache: Path) -> dict[Path, list[range]]:
    """The bytes of every file that a reader reads. Only other zarr readers read the other ones."""
    reader = CacheReader(cache)
    found = {path: [range(path.stat().st_size)] for path in cache.rglob("*.json")}
    found |= {path: [range(path.stat().st_size)] for path in cache.rglob("constants.*")}
    for group in ("views", "layers"):
        found[cache / group / "zarr.json"] = []
    for info in units_in(reader):
        places = info.parts.places()
        begin = info.parts.head.size_bytes if info.parts.keys is not None else places[0]
        found[cache / info.path] = [range(begin, places[-1])]
    return found


def test_a_flipped_byte_anywhere_is_named_or_changes_nothing(cache: Path) -> None:
    intact, parts = everything(cache), read_parts(cache)
    files = sorted(parts)
    sizes = [path.stat().st_size for path in files]
    rng, counts = random.Random(0), Counter[str]()
    for number in range(FLIPS):
        # Every file is damaged, large ones more often.
        path = files[number % len(files)] if number % 2 else rng.choices(files, sizes)[0]
        original = path.read_bytes()
        at = rng.randrange(len(original))
        path.write_bytes(tiny.changed(original, at, rng.randrange(1, 256)))
        detected = damaged(path, cache, intact)
        if any(at in part for part in parts[path]):
            counts["detected" if detected else "harmless"] += 1
        else:
            assert not detected, f"{path} {at} is not read"
            counts["not read"] += 1
        path.write_bytes(original)
    assert sum(counts.values()) == FLIPS
    # White space of a description may change: its digest is of the content.
    assert counts["harmless"] < 0.02 * FLIPS and counts["detected"] > 0.4 * FLIPS, counts


@pytest.mark.parametrize("what", ["cut", "empty", "gone", "longer", "swapped"])
def test_lost_and_swapped_files_are_named(cache: Path, what: str) -> None:
    intact, counts = everything(cache), Counter[bool]()
    for path in sorted(item for item in cache.rglob("*") if item.is_file()):
        original = path.read_bytes()
        other = cache / path.relative_to(cache).as_posix().replace("train-000", "train-001").replace("v0-2", "v0-1")
        if what == "gone":
            path.unlink()
        elif what == "swapped":
            path.write_bytes(other.read_bytes())
        else:
            path.write_bytes({"cut": original[:-1], "empty": b"", "longer": original + b"\n"}[what])
        relative = path.relative_to(cache).as_posix()
        if what == "gone" and relative.endswith((".json", "constants.json")) and relative.count("/") > 1:
            layer = relative.split("/")[-3]
            if path.name == "zarr.json":
                assert relative.split("/")[1] not in CacheReader(cache).layers  # the layer does not exist then
            elif path.name != "constants.json":
                assert len(CacheReader(cache).units(layer)) == 1  # the unit does not exist then, as coverage shows
            else:
                with pytest.raises(UserError, match="other constants"):
                    everything(cache)
        else:
            counts[damaged(path, cache, intact)] += 1
        path.write_bytes(original)
    assert counts[True] >= {"cut": 8, "empty": 17, "gone": 8, "longer": 8, "swapped": 6}[what], counts


def test_killed_at_any_moment_a_cache_comes_out_the_same(tmp_path: Path) -> None:
    manifest = tiny.make_manifest(num_shards=40)
    whole, rng = tiny.make_whole_cache(tmp_path / "whole", manifest), random.Random(0)
    kills = finished = 0
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
        if "done" in messages or (place.exists() and len(list(place.glob("layers/rel/train-*/v*.json"))) == 40):
            CacheWriter.open(place, manifest, [tiny.make_layer(manifest)]).close()
            assert tiny.tree(place) == whole
            assert len(written) == len(set(written))  # no committed unit is computed again
            finished, written = finished + 1, []
            place = tmp_path / f"killed-{finished}"
    assert tiny.make_whole_cache(place, manifest) == whole


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
    (small_disk / "filler").write_bytes(os.urandom(945_000))
    with pytest.raises(UserError, match=r"No space left[\s\S]*hint: free some space"):
        tiny.make_whole_cache(small_disk / "cache", manifest)
    held = CacheReader(small_disk / "cache").units()
    assert 0 < len(held) < 6
    everything(small_disk / "cache")
    (small_disk / "filler").unlink()
    tiny.make_whole_cache(small_disk / "cache", manifest)
    assert tiny.tree(small_disk / "cache") == tiny.make_whole_cache(tmp_path / "alone", manifest)


def test_a_disk_that_turns_read_only_is_explained(small_disk: Path) -> None:
    manifest = tiny.make_manifest()
    with CacheWriter.open(small_disk / "cache", manifest, [tiny.make_layer()]) as writer:
        tiny.write_units(writer, tiny.units_of(manifest)[:1])
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        with pytest.raises(UserError, match=r"cannot write the cache .*Read-only[\s\S]*committed units are intact"):
            tiny.write_units(writer, tiny.units_of(manifest)[1:])
        everything(small_disk / "cache")
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
        tiny.write_units(writer, tiny.units_of(manifest)[1:])
    assert len(CacheReader(small_disk / "cache").units(REL)) == 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EDQUOT])
def test_a_refusal_at_any_write_leaves_the_committed_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    manifest, (first, second) = tiny.make_manifest(), tiny.units_of(tiny.make_manifest())
    real_link = os.link
    for fail_at in range(5):  # the lease, and a file and a record of two layers
        place, calls = tmp_path / f"{number}-{fail_at}", iter(range(1000))
        with CacheWriter.open(place, manifest, [tiny.make_layer()]) as writer:
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
            writer.give_back(second)
            views = {f"views/train-001/v0-2.{kind}" for kind in ("zip", "json")} if fail_at > 2 else set()
            after = tiny.tree(place)
            assert after.keys() - before.keys() == views and before.items() <= after.items()
            tiny.write_units(writer, [second])
        assert CacheReader(place).coverage(REL).complete


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


@pytest.mark.parametrize(
    "fault",
    ["500", "503", "cut", pytest.param("hang", marks=pytest.mark.slow)],  # slow: waits 9 s for time limits
)
def test_a_store_that_fails_for_a_moment_is_asked_again(
    failing: s3_server.Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("tinymim.storage.remote.WRITE_TIMEOUT_S", 0.5)
    monkeypatch.setattr("tinymim.storage.remote.TIMEOUT_PAUSES_S", (0.1, 0.1, 0.1))
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
    for fail_at in range(5):  # the lease, and a file and a record of two layers
        place, puts = f"{PLACE}-{fail_at}", iter(range(10_000))
        with CacheWriter.open(place, manifest, [tiny.make_layer(manifest)]) as writer:
            tiny.write_units(writer, units[:1])

            def faults(method: str, key: str, puts: Any = puts, fail_at: int = fail_at) -> str | None:
                return fault if method == "PUT" and next(puts) >= fail_at else None

            failing.any_fault = faults
            with pytest.raises(StoreError, match=text):
                tiny.write_units(writer, units[1:2])
            failing.any_fault = lambda method, key: None
            reader = CacheReader(place)
            assert [info.unit for info in reader.units(REL)] == units[:1]
            assert [info.unit for info in reader.units()] == units[: 1 + (fail_at > 2)]
            tiny.write_units(writer, units)
        alone = tiny.make_whole_cache(tmp_path / f"alone-{fail_at}", manifest)
        assert tiny.tree(tmp_path / "bucket" / f"cache-{fail_at}") == alone


@pytest.mark.parametrize("fault", ["short", "cut", "503", "404"])
def test_faults_of_partial_reads_are_repeated_or_named(failing: s3_server.Log, fault: str) -> None:
    tiny.make_tiny_cache(PLACE)
    reader = CacheReader(PLACE)
    info = reader.units(REL)[0]
    expected = reader.read_views(info)
    faults = iter([fault])
    failing.fault = lambda number, get: next(faults, None)
    if fault in ("503", "cut"):  # it passes
        assert same(reader.read_views(info, [1]), {name: values[1:2] for name, values in expected.items()})
    else:
        with pytest.raises(UserError, match=r"cut short|cannot be reached|is missing") as caught:
            reader.read_views(info, [1])
        assert "train-000" in str(caught.value)
    failing.fault = lambda number, get: "503"
    with pytest.raises(StoreError, match=r"train-000/v0-1\.zip cannot be reached"):
        reader.read_views(info, [0])


def test_a_store_without_conditional_puts_is_refused_clearly(failing: s3_server.Log) -> None:
    failing.any_fault = lambda method, key: "501" if method == "PUT" else None
    with pytest.raises(StoreError) as caught:
        CacheWriter.open(PLACE, tiny.make_manifest())
    assert caught.value.exit_code == 2
    assert list(obstore.list(objects.connect(PLACE)).collect()) == []
