"""`tinymim cache copy --format 2`: every record of a format-1 cache, to the byte; other commands name that line."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.stages.cache import upgrade, verify
from tinymim.stages.run.interrupt import Interrupted
from tinymim.storage.layout import VIEWS
from tinymim.storage.reader import CacheReader
from tinymim.storage.v1.cache import OldCache
from tinymim.storage.writer import CacheWriter
from tinymim.tests.storage.tiny import tree

Run = Callable[..., tuple[int, str, str]]
DATA = Path(__file__).parents[2] / "data"
CACHES = ["cache_v1", "cache_v1_first", "cache_v1_sketch", "cache_v1_hidden"]
LINE = "cache copy SRC DST --format 2"


@pytest.mark.parametrize("name", CACHES)
def test_every_record_is_the_same_to_the_byte(tmp_path: Path, name: str, run: Run) -> None:
    old = OldCache(DATA / name)
    code, out, _ = run("cache", "copy", DATA / name, tmp_path / "new", "--format", "2", "--json")
    report = json.loads(out)
    assert code == 0 and report["written"] == report["units"] == len(old.units)
    assert verify.run(tmp_path / "new")["sound"]
    reader = CacheReader(tmp_path / "new")
    layer = reader.layer()
    assert layer.name == f"vit_tiny_patch16_224-b2-{old.manifest.codec['name']}" == report["layer"]
    assert layer.teacher["license"] == old.manifest.teacher["license"]
    assert layer.target["parameters"] == old.manifest.codec["parameters"] and layer.shapes == old.manifest.shapes
    assert dict(reader.manifest.views) == old.manifest.views
    for old_unit, views, info in zip(old.units, reader.units(), reader.units(layer.name), strict=True):
        keys, arrays = old.read_unit(old_unit)
        assert reader.keys(old_unit.shard) == keys and info.key_digest == old_unit.key_digest
        stored = reader.read_views(info) | reader.read_views(views)
        for image in range(old_unit.num_images):
            for view in range(old_unit.num_views):
                row = image * old_unit.num_views + view
                for array in layer.arrays:
                    assert stored[array][view, image].tobytes() == arrays[array][row].tobytes()
                assert stored["digest"][view, image] == arrays["digest"][row] & np.uint64(2**32 - 1)
        assert {**views.statistics, **info.statistics} == old_unit.statistics
        assert set(views.statistics) <= {"unreadable"} and "unreadable" not in info.statistics
    wanted, held = old.constants(), reader.constants(layer.name)
    assert (wanted is None) == (held is None)
    for array, values in (wanted or {}).items():
        assert held is not None and held[array].dtype == values.dtype and held[array].tobytes() == values.tobytes()


def test_what_is_not_kept_is_said_and_the_layer_may_be_named(tmp_path: Path, run: Run) -> None:
    line = ["cache", "copy", DATA / "cache_v1_hidden", tmp_path / "new", "--format", "2"]
    code, text, _ = run(*line, "--layer", "mine")
    assert code == 0 and all(f"not kept: {what}" in text for what in upgrade.NOT_KEPT) and "layer mine" in text
    assert list(CacheReader(tmp_path / "new").layers) == ["mine"]
    assert run(*line, "--layer", "a", "--layer", "b")[0] == 2


def test_a_stopped_upgrade_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upgrade.run(DATA / "cache_v1_hidden", tmp_path / "whole")
    commit = CacheWriter.commit
    for stop_after in range(1, 8):
        place, done = tmp_path / f"stopped-{stop_after}", 0

        def stopped(self: CacheWriter, *args: Any, limit: int = stop_after) -> None:
            nonlocal done
            commit(self, *args)
            done += 1
            if done == limit:
                os.kill(os.getpid(), signal.SIGINT)
            if done > limit and limit % 2:
                raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(CacheWriter, "commit", stopped)
            with pytest.raises((Interrupted, UserError)):
                upgrade.run(DATA / "cache_v1_hidden", place)
        left = 4 - len(CacheReader(place).units("vit_tiny_patch16_224-b2-hidden"))
        assert upgrade.run(DATA / "cache_v1_hidden", place)["written"] == left
        assert tree(place) == tree(tmp_path / "whole")


def test_other_records_in_the_target_and_a_damaged_source_are_refused(tmp_path: Path) -> None:
    shutil.copytree(DATA / "cache_v1_sketch", tmp_path / "old")
    upgrade.run(tmp_path / "old", tmp_path / "new")
    with pytest.raises(CacheMismatch):
        upgrade.run(DATA / "cache_v1", tmp_path / "new")
    reader = CacheReader(tmp_path / "new")
    info, views = reader.units("vit_tiny_patch16_224-b2-sketch")[0], reader.units(VIEWS)[0]
    arrays, keys = reader.read_views(info), reader.keys(info.unit.shard)
    with CacheWriter.open(tmp_path / "new", reader.manifest, [reader.layer()]) as writer:
        writer.drop_unit(info.layer, info.unit)
        name = next(iter(arrays))
        with writer.begin(info.layer, info.unit, keys) as draft:
            draft.add(arrays | {name: arrays[name] + arrays[name].dtype.type(1)})
            draft.commit(info.statistics)
    with pytest.raises(CacheMismatch, match="holds other records"):
        upgrade.run(tmp_path / "old", tmp_path / "new")
    assert views.num_images
    path = next((tmp_path / "old" / "units").rglob("digest/c/0"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheCorrupt, match="digest"):
        upgrade.run(tmp_path / "old", tmp_path / "again")


@pytest.mark.parametrize(
    "line",
    [
        ["cache", "verify", "{old}"],
        ["cache", "copy", "{old}", "{new}"],
        ["cache", "pack", "{old}", "{new}"],
        ["cache", "remove", "{old}", "--yes"],
        ["cache", "remove", "{old}", "--layer", "rel"],
    ],
)
def test_every_command_names_the_line_that_upgrades(tmp_path: Path, line: list[str], run: Run) -> None:
    shutil.copytree(DATA / "cache_v1_hidden", tmp_path / "old")
    before = tree(tmp_path / "old")
    code, out, err = run(*(part.format(old=tmp_path / "old", new=tmp_path / "new") for part in line))
    assert (code, out) == (2, "") and LINE in err and tree(tmp_path / "old") == before
    assert not (tmp_path / "new").exists()


def test_info_and_list_summarise_it(tmp_path: Path, run: Run) -> None:
    shutil.copytree(DATA / "cache_v1_hidden", tmp_path / "root" / "old")
    code, text, _ = run("cache", "info", tmp_path / "root" / "old")
    assert code == 0 and LINE in text and "hidden version 1" in text and "18 records" in text
    info = json.loads(run("cache", "info", tmp_path / "root", "--json")[1])
    assert info["format_version"] == 1 and info["bytes"] == sum(len(d) for d in tree(tmp_path / "root").values())
    code, text, _ = run("cache", "list", tmp_path / "root")
    assert code == 0 and LINE in text
