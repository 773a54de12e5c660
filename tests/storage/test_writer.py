"""I7: a unit is committed whole or not at all, whatever happens to the writer."""

import errno
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinymim.configs.errors import InternalError, SourceError, UserError
from tinymim.storage.atomic import HOST
from tinymim.storage.layout import UnitId, shard_stem
from tinymim.storage.manifest import Manifest, SourceShard
from tinymim.storage.reader import CacheReader
from tinymim.storage.writer import CacheWriter, UnitTaken
from tinymim.tests.storage import tiny

A, B = UnitId("train-000.tar", 0, 2), UnitId("train-001.tar", 0, 2)


class Killed(BaseException):
    """Stands for the death of the process: no `except Exception` or `except OSError` sees it."""


def test_sigkill_and_resume_is_byte_identical(tmp_path: Path) -> None:
    manifest = tiny.make_manifest(num_shards=10)
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["tinymim.tests.storage.tiny"])  # import zarr once, not for every kill
    with CacheWriter.open(tmp_path / "whole", manifest) as writer:
        tiny.write_units(writer, tiny.units_of(manifest))
    rng, counts = random.Random(0), []
    for _ in range(8):
        here, there = forkserver.Pipe()
        arguments = (tmp_path / "killed", manifest, there)
        process = forkserver.Process(target=tiny.write_and_be_killed, args=arguments)
        process.start()
        assert here.poll(60)
        assert here.recv() == "open"
        time.sleep(rng.uniform(0.0, 0.12))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        here.close()
        there.close()
        reader = CacheReader(tmp_path / "killed")
        for info in reader.units():
            reader.read_unit(info)
        counts.append(len(reader.units()))
    assert counts == sorted(counts)
    with CacheWriter.open(tmp_path / "killed", manifest) as writer:
        tiny.write_units(writer, tiny.units_of(manifest))
    assert tiny.tree(tmp_path / "killed") == tiny.tree(tmp_path / "whole")


def test_death_at_any_durable_step_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = tiny.make_manifest(num_shards=1)
    units = tiny.units_of(manifest)
    tiny.bury_the_dead(monkeypatch)

    def run(path: Path, die_at: int) -> int:
        steps = 0

        def dying(function: Any) -> Any:
            def step(*args: Any) -> Any:
                nonlocal steps
                if steps == die_at:
                    raise Killed
                steps += 1
                return function(*args)

            return step

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", dying(os.fsync))
            patch.setattr(os, "replace", dying(os.replace))
            with CacheWriter.open(path, manifest) as writer:
                tiny.write_units(writer, units)
        return steps

    total = run(tmp_path / "whole", -1)
    expected = tiny.tree(tmp_path / "whole")
    for die_at in [*range(6), *range(6, total - 4, 16), *range(total - 4, total)]:
        path = tmp_path / str(die_at)
        with pytest.raises(Killed):
            run(path, die_at)
        run(path, -1)
        assert tiny.tree(path) == expected, die_at


def test_full_disk_is_explained_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with CacheWriter.open(tmp_path, tiny.make_manifest()) as writer:
        tiny.write_units(writer, [A])
        before = tiny.tree(tmp_path / "units" / "train-000")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(UserError, match=r"No space left[\s\S]*hint: free some space"):
                tiny.write_units(writer, [B])
        assert writer.committed() == {A}
        assert tiny.tree(tmp_path / "units" / "train-000") == before
        assert [info.unit for info in CacheReader(tmp_path).units()] == [A]
        tiny.write_units(writer, [B])
    assert len(CacheReader(tmp_path).units()) == 2


def test_leftovers_are_never_read_and_removed(tmp_path: Path) -> None:
    tiny.make_tiny_cache(tmp_path)
    expected = tiny.tree(tmp_path)
    before = len(CacheReader(tmp_path).units())
    dead = f"{HOST}-{2**22 + 1}-0.partial"  # an id that no process has
    for leftover in (
        "units/train-000/v7-8/box/c/0/0",
        f"units/train-000/zarr.json.{dead}",
        f"commits/train-000.v7-8.json.{dead}",
        f"zarr.json.{dead}",
    ):
        (tmp_path / leftover).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / leftover).write_bytes(b"dead")
    lease = tiny.lease_of_the_dead(tmp_path, "units/train-000")
    assert lease.exists()
    assert len(CacheReader(tmp_path).units()) == before
    CacheWriter.open(tmp_path, tiny.make_manifest()).close()
    assert tiny.tree(tmp_path) == expected


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty and not a tinymim cache"):
        CacheWriter.open(tmp_path, tiny.make_manifest())
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_growth_by_views_and_shards_rewrites_no_unit(tmp_path: Path) -> None:
    small, large = tiny.make_manifest(1, num_views=2), tiny.make_manifest(2, num_views=3)
    with CacheWriter.open(tmp_path, small) as writer:
        tiny.write_units(writer, [A])
        with pytest.raises(InternalError, match="not in the manifest"):
            tiny.write_units(writer, [B])
    before = tiny.tree(tmp_path / "units" / "train-000" / "v0-1")
    with CacheWriter.open(tmp_path, large) as writer:
        assert writer.committed() == {A}
        tiny.write_units(writer, [UnitId(A.shard, 2, 1), UnitId(B.shard, 0, 3)])
    with CacheWriter.open(tmp_path, small) as writer:
        assert writer.manifest == large
    assert tiny.tree(tmp_path / "units" / "train-000" / "v0-1") == before
    reader = CacheReader(tmp_path)
    assert reader.manifest == large
    assert [str(info.unit) for info in reader.units()] == [
        "train-000.tar v0-1",
        "train-000.tar v2-2",
        "train-001.tar v0-2",
    ]
    assert reader.coverage().complete


def test_bad_units_are_refused(tmp_path: Path) -> None:
    keys, arrays = tiny.make_unit(A)
    with CacheWriter.open(tmp_path, tiny.make_manifest()) as writer:
        with pytest.raises(SourceError, match=r"more than once in shard train-000\.tar\n  got: 'b'"):
            writer.write_unit(A, ["b", "a", "b"], arrays, {})
        with pytest.raises(SourceError, match="not Unicode"):
            writer.write_unit(A, ["a", "b", "\udcff"], arrays, {})
        for name, values in {
            "box": arrays["box"].astype(np.int64),
            "flip": arrays["flip"][:-1],
            "qk_index": np.array([None] * 6),
            "key_ends": np.zeros(6),
            "a/b": np.zeros(6),
        }.items():
            with pytest.raises(InternalError, match=name):
                writer.write_unit(A, keys, arrays | {name: values}, {})
        with pytest.raises(InternalError, match="statistics"):
            writer.write_unit(A, keys, arrays, {"kl": float("nan")})
        with pytest.raises(InternalError, match="views outside"):
            writer.write_unit(UnitId(A.shard, 2, 2), keys, arrays, {})
        assert not list((tmp_path / "units").glob("*/*"))
        writer.write_unit(A, keys, arrays, {})
        with pytest.raises(UnitTaken, match=r"v1-2[\s\S]*committed"):
            writer.write_unit(UnitId(A.shard, 1, 2), keys, arrays, {})


def test_shard_names_become_safe_and_collisions_are_refused(tmp_path: Path) -> None:
    stems = [shard_stem(name) for name in ("a-0.tar", "../x y.tar", "zarr.json", ".tar")]
    assert stems == ["a-0", "s___x_y", "zarr_json", "s"]
    manifest = tiny.make_manifest(0)
    sections = {name: getattr(manifest, name) for name in ("teacher", "views", "codec", "environment")}
    shards = tuple(SourceShard(name, 1, 1, "h") for name in ("a b.tar", "A_b.tar"))
    with pytest.raises(SourceError, match=r"'a b\.tar' and 'A_b\.tar'"):
        CacheWriter.open(tmp_path / "cache", Manifest(source=shards, num_views=1, **sections))
    assert not (tmp_path / "cache").exists()
