"""`tinymim cache copy`: the same bytes anywhere, interrupted, shared, layer by layer, or refused."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.stages.cache import copy as cache_copy
from tinymim.stages.cache import verify
from tinymim.stages.run.interrupt import Interrupted
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter
from tinymim.tests.stages.cache.caches import flip
from tinymim.tests.storage import tiny
from tinymim.tests.storage.tiny import CLS, REL, tree

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Seven units in three layers, one of which has constants."""
    tiny.make_tiny_cache(tmp_path / "cache")
    return tmp_path / "cache"


def test_a_copy_has_the_same_bytes_and_doing_it_again_does_nothing(cache: Path, run: Run) -> None:
    whole, copy = tree(cache), cache.parent / "copies" / "a"
    (cache / "mine.txt").touch()
    shutil.copy(cache / "views/train-000/v0-1.zip", cache / "views/train-000/v7-8.zip")
    code, out, _ = run("cache", "copy", cache, copy, "--json")
    report = json.loads(out)
    assert code == 0 and report["copied"] == report["units"] == 7 and tree(copy) == whole
    code, text, _ = run("cache", "copy", cache.as_uri(), copy.as_uri())
    assert code == 0 and "0 of 7 units copied" in text and tree(copy) == whole


def test_some_layers_are_copied_with_the_view_layer(cache: Path, run: Run) -> None:
    whole, copy = tree(cache), cache.parent / "copy"
    code, text, _ = run("cache", "copy", cache, copy, "--layer", REL)
    assert code == 0 and "layers views, rel" in text and "left out cls" in text
    assert tree(copy) == {path: data for path, data in whole.items() if "layers/cls" not in path}
    assert verify.run(copy)["sound"]
    assert run("cache", "copy", cache, copy, "--layer", REL, "--layer", CLS)[0] == 0 and tree(copy) == whole
    code, _, err = run("cache", "copy", cache, cache.parent / "other", "--layer", "none")
    assert code == 2 and "no layer none" in err and not (cache.parent / "other").exists()


def test_an_interrupted_copy_continues(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_unit = CacheWriter.copy_unit
    done: list[None] = []

    def interrupted(self: CacheWriter, *args: Any) -> None:
        copy_unit(self, *args)
        done.append(None)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(CacheWriter, "copy_unit", interrupted)
    with pytest.raises(Interrupted):
        cache_copy.run(cache, cache.parent / "copy")
    assert len(done) == 2
    report = cache_copy.run(cache, cache.parent / "copy")
    assert (report["copied"], report["already_there"]) == (5, 2)
    assert tree(cache.parent / "copy") == tree(cache)


def test_a_cache_that_grew_is_copied_into_its_older_copy(cache: Path) -> None:
    copy = cache.parent / "copy"
    cache_copy.run(cache, copy)
    manifest = tiny.make_manifest(num_shards=3)
    with CacheWriter.open(cache, manifest, [tiny.make_layer(manifest)]) as writer:
        tiny.write_units(writer, [UnitId("train-002.tar", 0, 2), UnitId("train-001.tar", 2, 1)])
    report = cache_copy.run(cache, copy)
    assert (report["copied"], report["already_there"]) == (4, 7) and tree(copy) == tree(cache)


def test_damaged_units_are_not_copied_and_all_others_are(cache: Path) -> None:
    whole, copy = tree(cache), cache.parent / "copy"
    flip(cache / "layers/rel/train-001/v0-1.zip", 1100)
    flip(cache / "layers/rel/train-000/v2-2.zip")
    with pytest.raises(CacheCorrupt, match=r"2 unit\(s\)") as caught:
        cache_copy.run(cache, copy)
    assert "checksum" in str(caught.value)
    missing = {path for path in whole if "rel/train-001/" in path or "rel/train-000/v2-2" in path}
    assert tree(copy) == {path: data for path, data in whole.items() if path not in missing}
    for path, data in whole.items():
        (cache / path).write_bytes(data)
    cache_copy.run(cache, copy)
    assert tree(copy) == whole


def test_a_copy_waits_for_what_another_copy_is_at(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, copy = CacheReader(cache), cache.parent / "copy"
    with CacheWriter.open(copy, reader.manifest, list(reader.layers.values())) as other:
        unit = reader.units(VIEWS)[0]
        assert other.claim(VIEWS, unit.unit)
        waits = []

        def finish(seconds: float) -> None:
            waits.append(seconds)
            other.copy_unit(unit, cache_copy._pieces(reader, unit))

        monkeypatch.setattr(time, "sleep", finish)
        report = cache_copy.run(cache, copy)
    assert len(waits) == 1 and (report["copied"], report["already_there"]) == (6, 1)
    assert tree(copy) == tree(cache)


def test_what_a_copy_must_not_overwrite_is_refused(cache: Path) -> None:
    other = cache.parent / "other"
    manifest = tiny.make_manifest(views={"seed": 1})
    with CacheWriter.open(other, manifest, [tiny.make_layer(manifest)]) as writer:
        tiny.write_units(writer, [UnitId("train-000.tar", 0, 2)])
    before = tree(other)
    with pytest.raises(CacheMismatch, match="made by something else"):
        cache_copy.run(cache, other)
    assert tree(other) == before
    with pytest.raises(UserError, match="not empty and not a tinymim cache"):
        cache_copy.run(cache, cache.parent)
    with pytest.raises(UserError, match="onto itself"):
        cache_copy.run(cache, cache)
    own, manifest = cache.parent / "own", tiny.make_manifest()
    with CacheWriter.open(own, manifest, [tiny.make_layer(manifest)]) as writer:  # the same views in other units
        tiny.write_units(writer, [UnitId("train-000.tar", 0, 3)])
    with pytest.raises(CacheMismatch, match="records of its own"):
        cache_copy.run(cache, own)
    assert tree(own).items() >= {}.items() and "views/train-000/v0-1.zip" not in tree(own)


def test_constants_of_another_calibration_are_not_mixed(cache: Path) -> None:
    manifest, other = tiny.make_manifest(), cache.parent / "other"
    with CacheWriter.open(other, manifest, [tiny.make_layer(manifest, CLS)]) as writer:
        writer.write_constants(CLS, tiny.make_constants(2.0))
    with pytest.raises(CacheMismatch, match="other constants"):
        cache_copy.run(cache, other)


def test_to_an_object_store_and_back_and_all_commands_there(
    cache: Path, seaweedfs: dict[str, str], monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    for name, value in seaweedfs.items():
        monkeypatch.setenv(name, value)
    root = f"s3://bucket/{cache.parent.name}"
    assert run("cache", "copy", cache, f"{root}/cache")[0] == 0
    assert run("cache", "copy", f"{root}/cache", cache.parent / "back")[0] == 0
    assert tree(cache.parent / "back") == tree(cache)
    assert run("cache", "verify", f"{root}/cache")[0] == 0
    assert run("cache", "info", root)[0] == 0  # the only one there
    code, out, _ = run("cache", "list", root, "--json")
    assert code == 0 and [row["path"] for row in json.loads(out)] == [f"{root}/cache"]
    info = json.loads(run("cache", "info", root, "--json")[1])
    assert all(layer["history"]["units_by_owner"] == {} for layer in info["layers"])
    assert run("cache", "pack", root, f"{root}-packed")[0] == 0
    assert run("cache", "copy", f"{root}-packed", cache.parent / "unpacked")[0] == 0
    assert tree(cache.parent / "unpacked") == tree(cache)
    store = open_store(f"{root}/cache")
    store.write("layers/rel/train-001/v0-1.zip", b"damaged")
    store.write("mine.txt", b"mine")
    code, out, _ = run("cache", "verify", f"{root}/cache", "--json")
    assert code == 2 and [found["path"] for found in json.loads(out)["findings"]] == ["layers/rel/train-001/v0-1.zip"]
    assert run("cache", "remove", f"{root}/cache", "--layer", REL, "--yes")[0] == 0
    assert json.loads(run("cache", "verify", f"{root}/cache", "--json")[1])["sound"]
    code, out, _ = run("cache", "remove", f"{root}/cache", "--yes", "--json")
    assert code == 0 and json.loads(out)["foreign"] == ["mine.txt"]
    assert [entry.path for entry in store.list()] == ["mine.txt"]
