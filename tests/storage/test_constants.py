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
from zarr.storage import ZipStore

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, InternalError
from tinymim.storage import layout
from tinymim.storage.commit import signed
from tinymim.storage.constants import constants_digest, encode_constants, read_constants
from tinymim.storage.layout import UnitId
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter
from tinymim.tests.storage import tiny
from tinymim.tests.storage.tiny import CLS

UNIT = UnitId("train-000.tar", 0, 2)
MANIFEST = tiny.make_manifest()
LAYER = tiny.make_layer(MANIFEST, CLS)


def constants(value: float = 1.0) -> dict[str, npt.NDArray[Any]]:
    return {
        "bits": np.array([3, 0, 8], np.uint8),
        "heads": np.array([3], np.int64),
        "weight": value * np.arange(500, dtype=np.float32).reshape(100, 5),
    }


def opened(path: Path) -> CacheWriter:
    return CacheWriter.open(path, MANIFEST, [LAYER])


def stored_in(path: Path) -> dict[str, npt.NDArray[Any]] | None:
    return read_constants(open_store(path), LAYER)


def make_cache(path: Path, value: float = 1.0) -> Path:
    """A cache with constants and one unit made with them."""
    with opened(path) as writer:
        writer.write_constants(CLS, constants(value))
        tiny.write_units(writer, [UNIT])
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "cache")


def rewrite_record(path: Path, **changes: Any) -> None:
    """Change fields of a record and update its digest."""
    record = json.loads(path.read_bytes()) | changes
    del record["record_digest"]
    path.write_bytes(signed(record))


def test_constants_come_back_and_plain_zarr_reads_them(cache: Path) -> None:
    stored = CacheReader(cache).constants(CLS)
    assert stored is not None and list(stored) == ["bits", "heads", "weight"]
    group = zarr.open_group(ZipStore(cache / "layers/cls/constants.zip", mode="r"), mode="r")
    for name, values in constants().items():
        np.testing.assert_array_equal(stored[name], values)
        assert stored[name].dtype == values.dtype
        np.testing.assert_array_equal(group[name][...], values)  # type: ignore[index]
    (unit,) = CacheReader(cache).units(CLS)
    assert unit.constants == constants_digest(open_store(cache), LAYER)


def test_layers_without_constants_have_none(tmp_path: Path) -> None:
    tiny.make_tiny_cache(tmp_path / "cache")
    reader = CacheReader(tmp_path / "cache")
    assert reader.constants(tiny.REL) is None
    assert all(info.constants is None for layer in (layout.VIEWS, tiny.REL) for info in reader.units(layer))
    assert all(info.constants is not None for info in reader.units(CLS))
    assert "constants" not in json.loads((tmp_path / "cache" / layout.commit_file(tiny.REL, UNIT)).read_bytes())


def test_the_next_writer_keeps_constants_and_names_them_in_its_units(cache: Path, tmp_path: Path) -> None:
    before = tiny.tree(cache)
    with opened(cache) as writer:
        tiny.write_units(writer, [UnitId("train-001.tar", 0, 1)])
    assert before.items() <= tiny.tree(cache).items()
    assert len({info.constants for info in CacheReader(cache).units(CLS)}) == 1
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
        with opened(path) as writer:
            if anew:
                writer.write_constants(CLS, constants(3.0))
        calls = iter(range(1000))

        def fsync(fd: int, calls: Any = calls, die_at: int = die_at) -> None:
            if next(calls) == die_at:
                raise Killed
            real_fsync(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            with opened(path) as writer:
                writer.write_constants(CLS, constants(2.0))  # replaced by the constants of the next writer
            finished = True
        except Killed:
            finished = False
        monkeypatch.setattr(os, "fsync", real_fsync)
        stored = stored_in(path)
        assert stored is None or stored["weight"][1, 0] in (10, 15)
        with opened(path) as writer:
            writer.write_constants(CLS, constants())
            tiny.write_units(writer, [UNIT])
        assert tiny.tree(path) == whole
        if finished:
            break
    assert 3 < die_at < 99


@pytest.mark.parametrize("damage", ["flip", "shorten", "lengthen", "delete"])
def test_damage_is_refused_and_the_file_named(cache: Path, damage: str) -> None:
    path = cache / "layers/cls/constants.zip"
    intact = path.read_bytes()
    for at in range(0, len(intact), 7 if damage == "flip" else len(intact)):
        if damage == "delete":
            path.unlink()
        else:
            path.write_bytes(
                {"flip": tiny.changed(intact, at), "shorten": intact[:-1], "lengthen": intact + b"\0"}[damage]
            )
        with pytest.raises(CacheCorrupt, match=r"layers/cls/constants\.zip is (missing|damaged)") as caught:
            stored_in(cache)
        assert caught.value.hint


def test_a_damaged_record_is_refused_by_reader_and_writer(cache: Path) -> None:
    path = cache / "layers/cls/constants.json"
    path.write_bytes(path.read_bytes().replace(b'"size_bytes": ', b'"size_bytes": 1', 1))
    for refuses in (lambda: CacheReader(cache).units(CLS), lambda: opened(cache)):
        with pytest.raises(CacheCorrupt, match=r"constants\.json is damaged"):
            refuses()
    assert CacheReader(cache).units()  # other layers do not need them


def test_constants_of_another_format_or_layer_are_refused(cache: Path) -> None:
    for change in ({"spec_id": "0" * 16}, {"layer": "rel"}):
        record = (cache / "layers/cls/constants.json").read_bytes()
        rewrite_record(cache / "layers/cls/constants.json", **change)
        with pytest.raises(CacheCorrupt, match="does not belong"):
            CacheReader(cache).units(CLS)
        (cache / "layers/cls/constants.json").write_bytes(record)
    rewrite_record(cache / "layers/cls/constants.json", format_version=3)
    with pytest.raises(CacheMismatch, match="format_version"):
        CacheReader(cache).units(CLS)


def test_units_made_with_other_constants_are_refused(cache: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", value=2.0)
    for name in ("constants.zip", "constants.json"):
        shutil.copy(other / "layers/cls" / name, cache / "layers/cls" / name)
    assert stored_in(cache) is not None  # intact, but not those of the units
    with pytest.raises(CacheCorrupt, match=r"unit cls: train-000\.tar v0-1 .* other constants"):
        CacheReader(cache).units(CLS)


def test_units_without_their_constants_are_refused(cache: Path) -> None:
    (cache / "layers/cls/constants.json").unlink()
    with pytest.raises(CacheCorrupt, match="other constants") as caught:
        CacheReader(cache).units(CLS)
    assert "constants.json" in str(caught.value.got)


def test_units_of_a_layer_that_had_none_are_not_taken_for_others(tmp_path: Path) -> None:
    manifest, layer = tiny.make_tiny_cache(tmp_path / "cache"), tiny.make_layer()
    with CacheWriter.open(tmp_path / "cache", manifest, [layer]) as writer:
        writer.put_constants(layer.name, *encode_constants(layer, constants()))
    with pytest.raises(CacheCorrupt, match="other constants") as caught:
        CacheReader(tmp_path / "cache").units(layer.name)
    assert caught.value.expected == "none"


def test_the_writer_refuses_constants_that_come_late_or_cannot_be_stored(cache: Path, tmp_path: Path) -> None:
    with opened(cache) as writer, pytest.raises(InternalError, match="without units"):
        writer.write_constants(CLS, constants())
    bad: list[dict[str, npt.NDArray[Any]]] = [
        {"a": np.float32(1.0)},  # type: ignore[dict-item]
        {"a b": np.ones(1)},
        {"a": np.array([None])},
    ]
    with opened(tmp_path / "new") as writer:
        for arrays in bad:
            with pytest.raises(InternalError, match="constants do not fit"):
                writer.write_constants(CLS, arrays)


def test_every_byte_is_counted(cache: Path) -> None:
    counted = CacheReader(cache).bytes_by_component()
    on_disk = {name: len(data) for name, data in tiny.tree(cache).items()}
    assert counted[CLS]["constants"] == on_disk["layers/cls/constants.zip"] > 1000
    assert sum(sum(each.values()) for each in counted.values()) == sum(on_disk.values())


def test_a_file_larger_than_recorded_is_not_read(cache: Path) -> None:
    with open(cache / "layers/cls/constants.zip", "r+b") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(CacheCorrupt, match="has 1099511627776 bytes, expected at most"):
        stored_in(cache)
