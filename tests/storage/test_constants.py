"""Constants are whole or absent, checked byte by byte, and tied to the units that were made with them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, InternalError
from tinymim.stages.cache.info import describe, format_info
from tinymim.storage import layout
from tinymim.storage.atomic import canonical_json
from tinymim.storage.commit import record_digest
from tinymim.storage.constants import constants_digest, constants_files, read_constants
from tinymim.storage.layout import UnitId
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter
from tinymim.tests.storage import tiny

UNIT = UnitId("train-000.tar", 0, 2)
MANIFEST = tiny.make_manifest()


def constants(value: float = 1.0) -> dict[str, npt.NDArray[Any]]:
    return {
        "bits": np.array([3, 0, 8], np.uint8),
        "heads": np.array([3], np.int64),
        "weight": value * np.arange(500, dtype=np.float32).reshape(100, 5),
    }


def make_cache(path: Path, value: float = 1.0) -> Path:
    """A cache with constants and one unit made with them."""
    with CacheWriter.open(path, MANIFEST) as writer:
        writer.write_constants(constants(value))
        tiny.write_units(writer, [UNIT])
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "cache")


def rewrite_record(path: Path, **changes: Any) -> None:
    """Change fields of a record and update its digest."""
    record = json.loads(path.read_bytes()) | changes
    del record["record_digest"]
    path.write_bytes(canonical_json(record | {"record_digest": record_digest(record)}))


def test_constants_come_back_and_plain_zarr_reads_them(cache: Path) -> None:
    stored = read_constants(open_store(cache), MANIFEST)
    assert stored is not None and list(stored) == ["bits", "heads", "weight"]
    group = zarr.open_group(cache, mode="r")
    for name, values in constants().items():
        np.testing.assert_array_equal(stored[name], values)
        assert stored[name].dtype == values.dtype
        np.testing.assert_array_equal(group[f"constants/{name}"][...], values)  # type: ignore[index]
    (unit,) = CacheReader(cache).units()
    assert unit.constants == constants_digest(open_store(cache), MANIFEST)


def test_caches_without_constants_are_as_they_were(tmp_path: Path) -> None:
    tiny.make_tiny_cache(tmp_path / "cache")
    assert read_constants(open_store(tmp_path / "cache"), MANIFEST) is None
    assert all(info.constants is None for info in CacheReader(tmp_path / "cache").units())
    assert "constants" not in json.loads((tmp_path / "cache" / layout.commit_file(UNIT)).read_bytes())
    assert "constants" not in describe(tmp_path / "cache")["bytes_by_component"]


def test_the_next_writer_keeps_constants_and_names_them_in_its_units(cache: Path, tmp_path: Path) -> None:
    before = tiny.tree(cache)
    with CacheWriter.open(cache, MANIFEST) as writer:
        tiny.write_units(writer, [UnitId("train-001.tar", 0, 1)])
    assert before.items() <= tiny.tree(cache).items()
    assert len({info.constants for info in CacheReader(cache).units()}) == 1
    assert tiny.tree(make_cache(tmp_path / "again")) == before


@pytest.mark.parametrize("anew", [False, True])
def test_death_at_any_step_leaves_constants_absent_or_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    class Killed(BaseException):
        pass

    tiny.bury_the_dead(monkeypatch)
    whole, real_fsync = tiny.tree(make_cache(tmp_path / "whole")), os.fsync
    for die_at in range(100):
        path = tmp_path / f"killed-{die_at}"
        with CacheWriter.open(path, MANIFEST) as writer:
            if anew:
                writer.write_constants(constants(3.0))
        calls = iter(range(1000))

        def fsync(fd: int, calls: Any = calls, die_at: int = die_at) -> None:
            if next(calls) == die_at:
                raise Killed
            real_fsync(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            with CacheWriter.open(path, MANIFEST) as writer:
                writer.write_constants(constants(2.0))  # replaced by the constants of the next writer
            finished = True
        except Killed:
            finished = False
        monkeypatch.setattr(os, "fsync", real_fsync)
        stored = read_constants(open_store(path), MANIFEST)
        assert stored is None or stored["weight"][1, 0] in (10, 15)
        with CacheWriter.open(path, MANIFEST) as writer:
            writer.write_constants(constants())
            tiny.write_units(writer, [UNIT])
        assert tiny.tree(path) == whole
        if finished:
            break
    assert 5 < die_at < 99


@pytest.mark.parametrize("name", ["weight/c/0/0", "weight/zarr.json", "bits/c/0"])
@pytest.mark.parametrize("damage", ["flip", "shorten", "delete"])
def test_damage_is_refused_and_the_file_named(cache: Path, name: str, damage: str) -> None:
    path = cache / "constants" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(CacheCorrupt, match=f"array {name.partition('/')[0]} of .*constants") as caught:
        read_constants(open_store(cache), MANIFEST)
    assert path.name in str(caught.value.what) and caught.value.hint


def test_a_damaged_record_is_refused_by_reader_and_writer(cache: Path) -> None:
    path = cache / "constants.json"
    path.write_bytes(path.read_bytes().replace(b'"size_bytes": ', b'"size_bytes": 1', 1))
    for refuses in (lambda: CacheReader(cache), lambda: CacheWriter.open(cache, MANIFEST)):
        with pytest.raises(CacheCorrupt, match=r"constants\.json is damaged"):
            refuses()


def test_constants_of_another_format_or_cache_are_refused(cache: Path) -> None:
    rewrite_record(cache / "constants.json", spec_id="0" * 16)
    with pytest.raises(CacheCorrupt, match="does not belong"):
        CacheReader(cache)
    rewrite_record(cache / "constants.json", format_version=2)
    with pytest.raises(CacheMismatch, match="format_version"):
        CacheReader(cache)


def test_units_made_with_other_constants_are_refused(cache: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", value=2.0)
    for name in ("constants", "constants.json"):
        source, goal = other / name, cache / name
        shutil.rmtree(goal) if goal.is_dir() else goal.unlink()
        shutil.copytree(source, goal) if source.is_dir() else shutil.copy(source, goal)
    assert read_constants(open_store(cache), MANIFEST) is not None  # intact, but not those of the units
    for refuses in (lambda: CacheReader(cache), lambda: CacheWriter.open(cache, MANIFEST)):
        with pytest.raises(CacheCorrupt, match=r"train-000\.tar v0-1 .* other constants"):
            refuses()


def test_units_without_their_constants_are_refused(cache: Path) -> None:
    (cache / "constants.json").unlink()
    with pytest.raises(CacheCorrupt, match="other constants") as caught:
        CacheReader(cache)
    assert "constants.json" in str(caught.value.got)


def test_units_of_a_cache_that_had_none_are_not_taken_for_others(tmp_path: Path) -> None:
    tiny.make_tiny_cache(tmp_path / "cache")
    with CacheWriter.open(tmp_path / "cache", MANIFEST) as writer:
        writer.put_constants(*constants_files(MANIFEST.spec_id, constants()))
    with pytest.raises(CacheCorrupt, match="other constants") as caught:
        CacheReader(tmp_path / "cache")
    assert caught.value.expected == "none"


def test_the_writer_refuses_constants_that_come_late_or_cannot_be_stored(cache: Path, tmp_path: Path) -> None:
    with CacheWriter.open(cache, MANIFEST) as writer, pytest.raises(InternalError, match="without units"):
        writer.write_constants(constants())
    bad: list[dict[str, npt.NDArray[Any]]] = [
        {"a": np.float32(1.0)},  # type: ignore[dict-item]
        {"a b": np.ones(1)},
        {"a": np.array([None])},
    ]
    with CacheWriter.open(tmp_path / "new", MANIFEST) as writer:
        for arrays in bad:
            with pytest.raises(InternalError, match="constants do not fit"):
                writer.write_constants(arrays)


def test_every_byte_is_counted_and_further_views_cost_no_constants(cache: Path) -> None:
    info = describe(cache)
    on_disk = {name: len(data) for name, data in tiny.tree(cache).items()}
    assert info["total_bytes"] == sum(info["bytes_by_component"].values()) == sum(on_disk.values())
    held = sum(size for name, size in on_disk.items() if name.startswith("constants"))
    assert info["bytes_by_component"]["constants"] == held > 1000
    assert info["bytes_to_complete"] == round((info["total_bytes"] - held) / 6 * 12)
    assert "constants" in format_info(info)
