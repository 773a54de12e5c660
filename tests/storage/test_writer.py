"""I7: a unit is committed whole or not at all, whatever happens to the writer."""

import errno
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from tinymim.configs.errors import InternalError, SourceError, UserError
from tinymim.storage import blocks
from tinymim.storage.atomic import _machine_digest
from tinymim.storage.commit import encode_commit
from tinymim.storage.layout import VIEWS, UnitId, shard_stem
from tinymim.storage.local import LocalStore
from tinymim.storage.manifest import Manifest, SourceShard
from tinymim.storage.reader import CacheReader
from tinymim.storage.writer import CacheGone, CacheWriter, UnitTaken
from tinymim.tests.storage import tiny, workers
from tinymim.tests.storage.tiny import CLS, REL

A, B = UnitId("train-000.tar", 0, 2), UnitId("train-001.tar", 0, 2)


class Killed(BaseException):
    """Stands for the death of the process: no `except Exception` or `except OSError` sees it."""


def opened(path: Path, manifest: Manifest | None = None, *names: str) -> CacheWriter:
    """A writer of the view layer and of `rel`, or of the named layers."""
    manifest = manifest or tiny.make_manifest()
    return CacheWriter.open(path, manifest, [tiny.make_layer(manifest, name) for name in names or (REL,)])


def test_a_unit_is_the_same_bytes_whatever_its_parts(tmp_path: Path) -> None:
    unit, found = UnitId(A.shard, 0, 7), []
    for parts in (1, 2, 3, 7, 100):
        with opened(tmp_path / str(parts)) as writer:
            tiny.write_units(writer, [unit], views_per_part=parts)
        found.append(tiny.tree(tmp_path / str(parts)))
    assert all(each == found[0] for each in found)


def test_writing_holds_one_block_in_memory(tmp_path: Path) -> None:
    """The file grows part by part, and the writer keeps no view that it has written."""
    manifest, unit = tiny.make_manifest(num_samples=1000), UnitId(A.shard, 0, 64)
    with opened(tmp_path, manifest) as writer, writer.begin(REL, unit, tiny.make_keys(A.shard, 1000)) as draft:
        sizes = []
        for view in range(64):
            draft.add(tiny.make_arrays(REL, UnitId(A.shard, view, 1), 1000))
            [partial] = tmp_path.glob("layers/rel/train-000/*.partial")
            draft._file.file.flush()
            sizes.append(partial.stat().st_size)
            assert len(draft._out._window._held) == 0
        assert min(np.diff(sizes)) > 10_000
        draft.commit({})


def test_chunks_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of more than CHUNK_BYTES a view are split by images; the last chunk is padded, as zarr wants it."""
    for limit in (1, 24, 100, 240, 241, 2**26):
        monkeypatch.setattr(blocks, "CHUNK_BYTES", limit)
        path, unit = tmp_path / str(limit), UnitId(A.shard, 0, 2)
        with opened(path, tiny.make_manifest(num_samples=30)) as writer:
            tiny.write_units(writer, [unit], num_images=25)
        reader = CacheReader(path)
        [info] = reader.units(REL)
        stored = reader.read_views(info)
        group = zarr.open_group(ZipStore(path / info.path, mode="r"), mode="r")
        for name, values in tiny.make_arrays(REL, unit, 25).items():
            np.testing.assert_array_equal(stored[name], values)
            found = group[name]
            assert isinstance(found, zarr.Array)
            np.testing.assert_array_equal(np.asarray(found[...]), values)
            per_image = values[0, 0].nbytes
            assert found.chunks == (1, min(25, max(1, limit // per_image)), *values.shape[2:])


def test_sigkill_and_resume_is_byte_identical(tmp_path: Path) -> None:
    manifest = tiny.make_manifest(num_shards=40)
    whole = tiny.make_whole_cache(tmp_path / "whole", manifest)
    rng, place = random.Random(0), tmp_path / "killed"
    counts: list[int] = []
    for _ in range(8):
        process, connection = workers.start(workers.write_all, place, manifest, 60.0)
        assert connection.recv() == "open"
        time.sleep(rng.uniform(0.0, 0.12))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL or len(counts) > 2
        connection.close()
        reader = CacheReader(place)
        units = [*reader.units(), *reader.units(REL)]
        for info in units:
            reader.read_views(info)
        assert {info.unit for info in reader.units(REL)} <= {info.unit for info in reader.units()}
        counts.append(len(units))
    assert counts == sorted(counts)
    assert tiny.make_whole_cache(place, manifest) == whole


def test_sigkill_between_any_two_files_and_takeover_by_another_process(tmp_path: Path) -> None:
    """Zip of the views, its commit, zip of the target, its commit, and all files before them."""
    manifest = tiny.make_manifest(num_shards=2)
    process, connection = workers.start(workers.die_at_create, tmp_path / "whole", manifest, -1)
    total = connection.recv()
    process.join()
    whole, states = tiny.tree(tmp_path / "whole"), set()
    for die_at in range(total):
        place = tmp_path / f"killed-{die_at}"
        process, _ = workers.start(workers.die_at_create, place, manifest, die_at)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        states.add(tuple(sorted(path for path in tiny.tree(place) if "train-000" in path and "partial" not in path)))
        if (place / "zarr.json").exists():
            reader = CacheReader(place)
            committed = [*reader.units(), *(reader.units(REL) if reader.layers else [])]
            assert all(reader.read_views(info) for info in committed)
        assert tiny.make_whole_cache(place, manifest) == whole, die_at
    leases = {"leases/shards/train-000.g1.json"}
    seen = {tuple(path for path in state if path not in leases) for state in states}
    stem = "train-000/v0-2"
    views, target = (
        [f"views/{stem}.json", f"views/{stem}.zip"],
        [f"layers/{REL}/{stem}.json", f"layers/{REL}/{stem}.zip"],
    )
    for files in ([], views[1:], views, [target[1], *views], [*target, *views]):
        assert tuple(sorted(files)) in seen, files


def test_death_at_any_durable_step_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = tiny.make_manifest(num_shards=1)
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
            for name in ("fsync", "replace", "link"):
                patch.setattr(os, name, dying(getattr(os, name)))
            tiny.make_whole_cache(path, manifest)
        return steps

    total = run(tmp_path / "whole", -1)
    expected = tiny.tree(tmp_path / "whole")
    for die_at in range(total):
        path = tmp_path / str(die_at)
        with pytest.raises(Killed):
            run(path, die_at)
        run(path, -1)
        assert tiny.tree(path) == expected, die_at


@pytest.mark.parametrize("call", ["fsync", "link", "write"])
def test_a_full_disk_at_any_write_is_explained_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    expected: dict[str, bytes] = {}
    steps, message = 0, ""
    for fail_at in range(60):
        path, count = tmp_path / f"{fail_at}", 0

        def failing(function: Any, fail_at: int = fail_at) -> Any:
            def step(*args: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count > fail_at:
                    raise full
                return function(*args, **options)

            return step

        with opened(path) as writer:
            tiny.write_units(writer, [A])
            before, failed = tiny.tree(path), True
            with monkeypatch.context() as patch:
                if call == "write":
                    patch.setattr(blocks._Window, "take", failing(blocks._Window.take))
                else:
                    patch.setattr(os, call, failing(getattr(os, call)))
                try:
                    tiny.write_units(writer, [B])
                    failed = False
                except UserError as error:
                    message = str(error)
            assert not failed or ("No space left" in message and "hint: free some space" in message)
            assert before.items() <= tiny.tree(path).items()
            assert writer.committed(REL) <= writer.committed(VIEWS) and A in writer.committed(REL)
            assert {A} <= {info.unit for info in CacheReader(path).units(REL)}
            assert not list(path.rglob("*.partial"))
            # No record without its file. A file without record remains only where the record's removal is not durable.
            zips, records = ({item.with_suffix("") for item in path.rglob(f"v*.{kind}")} for kind in ("zip", "json"))
            assert records <= zips if call == "fsync" else records == zips
            tiny.write_units(writer, [B])
            writer.give_back(B)
        expected = expected or tiny.tree(path)
        assert tiny.tree(path) == expected
        steps += failed
        if not failed:
            break
    assert not failed and steps >= {"fsync": 8, "link": 4, "write": 8}[call], steps


def test_leftovers_are_never_read_and_removed(tmp_path: Path) -> None:
    tiny.make_tiny_cache(tmp_path)
    expected = tiny.tree(tmp_path)
    dead = f"{_machine_digest()}-{2**22 + 1}-0.partial"  # an id that no process has
    elsewhere = "0badcafe-1-0.partial"  # a process of another machine
    leftovers = [
        "layers/rel/train-000/v7-8.zip",
        f"layers/cls/train-000/v7-8.zip.{dead}",
        f"layers/rel/train-000/v7-8.json.{elsewhere}",  # whoever holds the lease of its shard may remove it
        f"views/train-000/v7-8.json.{dead}",
        f"layers/rel/zarr.json.{dead}",
        f"zarr.json.{dead}",
    ]
    for leftover in leftovers:
        (tmp_path / leftover).write_bytes(b"dead")
    lease = tiny.lease_of_the_dead(tmp_path, "shards/train-000")
    assert lease.exists()
    reader = CacheReader(tmp_path)
    assert [len(reader.units(layer)) for layer in (VIEWS, REL, CLS)] == [3, 3, 1]
    opened(tmp_path).close()
    assert tiny.tree(tmp_path) == expected


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty and not a tinymim cache"):
        opened(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_growth_by_views_shards_and_layers_rewrites_no_unit(tmp_path: Path) -> None:
    small, large = tiny.make_manifest(1), tiny.make_manifest(2)
    with opened(tmp_path, small) as writer:
        tiny.write_units(writer, [A])
        with pytest.raises(InternalError, match="not in the manifest"):
            tiny.write_units(writer, [B])
    before = {path: data for path, data in tiny.tree(tmp_path).items() if path != "zarr.json"}
    with opened(tmp_path, large) as writer:
        assert writer.committed(VIEWS) == writer.committed(REL) == {A}
        tiny.write_units(writer, [UnitId(A.shard, 2, 1), UnitId(B.shard, 0, 3)])
    with opened(tmp_path, small, CLS) as writer:
        assert writer.manifest == large and writer.committed(CLS) == set()
        tiny.write_units(writer, [A])
        assert list(writer.layers) == [CLS]
    assert before.items() <= tiny.tree(tmp_path).items()
    reader = CacheReader(tmp_path)
    assert reader.manifest == large
    for layer in (VIEWS, REL):
        names = [str(info.unit) for info in reader.units(layer)]
        assert names == ["train-000.tar v0-1", "train-000.tar v2-2", "train-001.tar v0-2"]
        assert reader.coverage(layer).complete
    assert not reader.coverage(CLS).complete


def test_bad_units_are_refused(tmp_path: Path) -> None:
    keys, arrays = tiny.make_keys(A.shard), tiny.make_arrays(REL, A)
    with opened(tmp_path) as writer:
        for bad, text in (
            (["b", "a", "b"], r"more than once in shard train-000\.tar\n  got: 'b'"),
            (["\udcff"], "not Uni"),
        ):
            with pytest.raises(SourceError, match=text):
                writer.begin(REL, A, bad)
        with writer.begin(REL, A, keys) as draft:
            for name, values in {
                "qk_index": arrays["qk_index"].astype(np.int64),
                "qk_scale": arrays["qk_scale"][:, :-1],
                "a/b": np.zeros(6),
                "key_ends": np.zeros(6),
            }.items():
                with pytest.raises(InternalError, match=name):
                    draft.add(arrays | {name: values})
            with pytest.raises(InternalError, match="qk_scale is missing"):
                draft.add({"qk_index": arrays["qk_index"]})
            with pytest.raises(InternalError, match=r"do not fit: {.*} views"):
                draft.add(arrays | {"qk_index": arrays["qk_index"][:1]})
            draft.add({name: values[:1] for name, values in arrays.items()})
            with pytest.raises(InternalError, match="more views than it has"):
                draft.add(arrays)
            with pytest.raises(InternalError, match="1 views were added"):
                draft.commit({})
            with pytest.raises(InternalError, match="statistics"):
                draft.commit({"kl": float("nan")})
            draft.add({name: values[1:] for name, values in arrays.items()})
            draft.commit({})
        for unit in (UnitId(A.shard, -1, 2), UnitId(A.shard, 0, 0), UnitId(A.shard, 2**31 - 1, 2)):
            with pytest.raises(InternalError, match="impossible views"):
                writer.claim(REL, unit)
        with pytest.raises(UnitTaken, match=r"v1-2[\s\S]*committed"), writer.begin(REL, UnitId(A.shard, 1, 2), keys):
            pass
        assert not writer.claim(REL, UnitId(A.shard, 1, 2)) and writer.claim(REL, UnitId(A.shard, 2, 2))
    assert {path.name for path in (tmp_path / "layers/rel/train-000").iterdir()} == {"v0-1.json", "v0-1.zip"}


def test_an_abandoned_unit_leaves_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        before = set(tiny.tree(tmp_path))
        with suppress(RuntimeError), writer.begin(REL, A, tiny.make_keys(A.shard)) as draft:
            draft.add(tiny.make_arrays(REL, A))
            raise RuntimeError
        writer.give_back(A)
        assert set(tiny.tree(tmp_path)) == before
        tiny.write_units(writer, [A])


def test_shard_names_become_safe_and_collisions_are_refused(tmp_path: Path) -> None:
    stems = [shard_stem(name) for name in ("a-0.tar", "../x y.tar", "zarr.json", ".tar")]
    assert stems == ["a-0", "s___x_y", "zarr_json", "s"]
    manifest = tiny.make_manifest(0)
    shards = tuple(SourceShard(name, 1, 1, "h") for name in ("a b.tar", "A_b.tar"))
    with pytest.raises(SourceError, match=r"'a b\.tar' and 'A_b\.tar'"):
        CacheWriter.open(tmp_path / "cache", Manifest(shards, manifest.views, manifest.environment))
    assert not (tmp_path / "cache").exists()


def test_a_copied_unit_is_the_unit(tmp_path: Path) -> None:
    tiny.make_tiny_cache(tmp_path / "source")
    reader = CacheReader(tmp_path / "source")
    layers = [reader.layers[name] for name in (REL, CLS)]
    with CacheWriter.open(tmp_path / "goal", reader.manifest, layers) as writer:
        writer.write_constants(CLS, tiny.make_constants())
        for info in (info for layer in (VIEWS, REL, CLS) for info in reader.units(layer)):
            data = (tmp_path / "source" / info.path).read_bytes()
            writer.copy_unit(info, [data[:100], data[100:]])
            with pytest.raises(UnitTaken):
                writer.copy_unit(info, [data])
            assert encode_commit(info) == (tmp_path / "goal" / f"{info.path[:-4]}.json").read_bytes()
    assert tiny.tree(tmp_path / "goal") == tiny.tree(tmp_path / "source")


# ---- the folder goes away under a writer (the store contract has the cases that hold for object stores too)


@pytest.mark.parametrize("step", ["begin", "add", "commit"])
def test_a_renamed_cache_ends_the_writer_and_is_not_made_anew(tmp_path: Path, step: str) -> None:
    place, moved = tmp_path / "cache", tmp_path / "moved"
    with opened(place) as writer:
        tiny.write_units(writer, [A])
        assert writer.claim(VIEWS, B)

        def write() -> None:
            if step == "begin":
                place.rename(moved)
            with writer.begin(VIEWS, B, tiny.make_keys(B.shard)) as draft:
                if step == "add":
                    place.rename(moved)
                draft.add(tiny.make_arrays(VIEWS, B))
                if step == "commit":
                    place.rename(moved)
                draft.commit({})

        with pytest.raises(CacheGone, match="is gone"):
            write()
        with pytest.raises(CacheGone):
            writer.claim(VIEWS, UnitId(A.shard, 2, 1))
        assert not place.exists()
    assert not place.exists()
    assert [info.unit for info in CacheReader(moved).units()] == [A]
    opened(moved).close()


def test_beats_do_not_bring_a_renamed_cache_back(tmp_path: Path) -> None:
    place, manifest = tmp_path / "cache", tiny.make_manifest()
    with CacheWriter.open(place, manifest, [tiny.make_layer()], lease_s=0.02) as writer:
        assert writer.claim(VIEWS, A)
        for round_ in range(20):
            place.rename(tmp_path / "moved")
            time.sleep(0.02)
            assert not place.exists(), round_
            (tmp_path / "moved").rename(place)


def test_a_draft_that_cannot_be_written_is_named(
    tmp_path: Path, limited: Callable[[int], AbstractContextManager[None]]
) -> None:
    def write() -> None:
        with LocalStore(tmp_path).draft("layers/unit") as draft:
            draft.file.write(bytes(4000))
            draft.create()

    with pytest.raises(OSError, match="File too large") as caught, limited(1000):
        write()
    assert caught.value.filename == str(tmp_path / "layers" / "unit")
