"""`tinymim cache copy`: the same bytes anywhere, interrupted, shared, or refused."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.stages import cache_teacher
from tinymim.stages.cache import copy as cache_copy
from tinymim.stages.run.interrupt import Interrupted
from tinymim.storage.manifest import Manifest
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter
from tinymim.tests.stages.cache.caches import flip, recipe, repaired
from tinymim.tests.stages.tiny import run_in, tree

Run = Callable[..., tuple[int, str, str]]


# ---------------------------------------------------------------- copy


@pytest.mark.parametrize("name", ["cache", "hidden"])
def test_a_copy_has_the_same_bytes_and_doing_it_again_does_nothing(home: Path, name: str, run: Run) -> None:
    (home / name / "mine.txt").touch()
    shutil.copytree(home / name / "units/shard-000000/v0-1", home / name / "units/shard-000000/v7-7")
    code, out, _ = run("cache", "copy", home / name, home / "copies" / name, "--json")
    report = json.loads(out)
    assert code == 0 and report["copied"] == report["units"] > 0
    (home / name / "mine.txt").unlink()
    shutil.rmtree(home / name / "units/shard-000000/v7-7")
    assert tree(home / "copies" / name) == tree(home / name)
    code, text, _ = run("cache", "copy", (home / name).as_uri(), (home / "copies" / name).as_uri())
    assert code == 0 and f"0 of {report['units']} units copied" in text
    assert tree(home / "copies" / name) == tree(home / name)


def test_an_interrupted_copy_continues(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = CacheWriter.put_unit
    done = []

    def interrupted(self: CacheWriter, *args: Any) -> Any:
        done.append(put(self, *args))
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return done[-1]

    monkeypatch.setattr(CacheWriter, "put_unit", interrupted)
    with pytest.raises(Interrupted):
        cache_copy.run(home / "cache", home / "copy")
    assert len(done) == 2 and len(list((home / "copy" / "commits").iterdir())) == 2
    report = cache_copy.run(home / "cache", home / "copy")
    assert (report["copied"], report["already_there"]) == (4, 2)
    assert tree(home / "copy") == tree(home / "cache")


def test_a_cache_that_grew_is_copied_into_its_older_copy(home: Path, made: Path) -> None:
    cache_teacher.run(recipe(made, num_views=2, cache=home / "small", run=run_in(home / "run")))
    report = cache_copy.run(home / "cache", home / "small")
    assert (report["copied"], report["already_there"]) == (3, 3)
    assert tree(home / "small") == tree(home / "cache")


def test_damaged_units_are_not_copied_and_all_others_are(home: Path, made: Path) -> None:
    whole = tree(home / "cache")
    path = "units/shard-000001/v2-2/vv_tail_gap"  # no unit after it whose writer would clean up
    flip(next((home / "cache" / path / "c").rglob("0/0/0/0")))
    with pytest.raises(CacheCorrupt, match="1 unit") as caught:
        cache_copy.run(home / "cache", home / "copy")
    assert "vv_tail_gap" in str(caught.value) and "shard-000001.tar v2-2" in str(caught.value)
    missing = {name for name in whole if "shard-000001" in name and "v2-2" in name}
    assert tree(home / "copy") == {name: data for name, data in whole.items() if name not in missing}
    repaired(home, made)
    cache_copy.run(home / "cache", home / "copy")
    assert tree(home / "copy") == whole


def test_a_copy_waits_for_what_another_copy_is_at(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CacheWriter.open(home / "copy", manifest_of(home / "cache")) as other:
        units = CacheReader(home / "cache").units()
        assert other.claim(units[0].unit)
        waits = []

        def finish(seconds: float) -> None:
            waits.append(seconds)
            other.put_unit(units[0], cache_copy._parts(CacheReader(home / "cache"), units[0]))

        monkeypatch.setattr(time, "sleep", finish)
        report = cache_copy.run(home / "cache", home / "copy")
    # Two units lie in the shard that the other holds.
    assert len(waits) == 1 and (report["copied"], report["already_there"]) == (5, 1)
    assert tree(home / "copy") == tree(home / "cache")


def manifest_of(cache: Path) -> Manifest:
    return CacheReader(cache).manifest


def test_what_a_copy_must_not_overwrite_is_refused(home: Path, made: Path) -> None:
    other = tree(home / "hidden")
    with pytest.raises(CacheMismatch, match="made by something else"):
        cache_copy.run(home / "cache", home / "hidden")
    assert tree(home / "hidden") == other
    with pytest.raises(UserError, match="not empty and not a tinymim cache"):
        cache_copy.run(home / "cache", home)
    with pytest.raises(UserError, match="onto itself"):
        cache_copy.run(home / "cache", home / "cache")
    cache_teacher.run(recipe(made, cache=home / "own", run=run_in(home / "run")))  # the same views in other units
    own = tree(home / "own")
    with pytest.raises(CacheMismatch, match="records of its own"):
        cache_copy.run(home / "cache", home / "own")
    assert tree(home / "own") == own


def test_constants_of_another_calibration_are_not_mixed(home: Path, made: Path) -> None:
    with CacheWriter.open(home / "other", manifest_of(home / "hidden")) as writer:
        writer.write_constants({"scale": np.ones(3)})
    with pytest.raises(CacheMismatch, match="other constants"):
        cache_copy.run(home / "hidden", home / "other")


def test_to_an_object_store_and_back_and_all_commands_there(
    home: Path, seaweedfs: dict[str, str], monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    for name, value in seaweedfs.items():
        monkeypatch.setenv(name, value)
    root = f"s3://bucket/{home.name}"
    assert run("cache", "copy", home / "hidden", f"{root}/hidden")[0] == 0
    assert run("cache", "copy", f"{root}/hidden", home / "back")[0] == 0
    assert tree(home / "back") == tree(home / "hidden")
    assert run("cache", "verify", f"{root}/hidden")[0] == 0
    assert run("cache", "info", root)[0] == 0  # the only one there
    code, out, _ = run("cache", "list", root, "--json")
    assert code == 0 and [row["path"] for row in json.loads(out)] == [f"{root}/hidden"]
    assert json.loads(run("cache", "info", root, "--json")[1])["history"]["units_by_owner"] == {}
    store = open_store(f"{root}/hidden")
    store.write("units/shard-000001/v0-1/digest/c/0", b"damaged")
    store.write("mine.txt", b"mine")
    code, out, _ = run("cache", "verify", f"{root}/hidden", "--json")
    assert code == 2 and [found["path"] for found in json.loads(out)["findings"]] == [
        "units/shard-000001/v0-1/digest/c/0"
    ]
    code, out, _ = run("cache", "remove", f"{root}/hidden", "--yes", "--json")
    assert code == 0 and json.loads(out)["foreign"] == ["mine.txt"]
    assert [entry.path for entry in store.list()] == ["mine.txt"]
