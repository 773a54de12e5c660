"""One contract for folders and object stores: files, leases, readers, and writers that share work, die and return."""

import itertools
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from obstore.exceptions import PermissionDeniedError
from zarr.storage import ObjectStore

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.storage.layout import UnitId
from tinymim.storage.leases import Leases
from tinymim.storage.objects import connect, store_error
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import Store, TooLarge, open_store
from tinymim.storage.writer import CacheWriter, UnitTaken
from tinymim.tests.s3_server import BUCKET
from tinymim.tests.storage import tiny, workers

A, B = UnitId("train-000.tar", 0, 3), UnitId("train-001.tar", 0, 3)
LIMIT = 2**20
_numbers = itertools.count()


def tree(store: Store) -> dict[str, bytes]:
    """Every file of a store."""
    return store.read_all({entry.path: entry.size_bytes for entry in store.list()})


class StoreContract:
    """The contract of all stores; subclasses provide the place."""

    @pytest.fixture
    def place(self) -> Path | str:
        raise NotImplementedError

    @pytest.fixture
    def store(self, place: Path | str) -> Store:
        return open_store(place)

    # ---- files

    def test_files_are_created_once_and_replaced_at_will(self, store: Store) -> None:
        assert store.create_all({"a/b.json": b"1", "c": b""}) == []
        assert store.create_all({"a/b.json": b"2", "a/d": b"3", "c": b""}) == ["a/b.json"]
        assert tree(store) == {"a/b.json": b"1", "a/d": b"3", "c": b""}
        store.write("a/b.json", b"22")
        assert store.read("a/b.json", LIMIT) == b"22"
        assert store.exists("a/d") and not store.exists("a") and not store.exists("x/y")

    def test_a_file_that_another_writer_removes_while_it_is_created_is_returned(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def vanished(*_: object) -> bytes:
            raise FileNotFoundError

        store.create_all({"a": b"1"})
        monkeypatch.setattr(type(store), "read", vanished)
        assert store.create_all({"a": b"1"}) == ["a"]

    def test_missing_and_large_files_are_errors(self, store: Store) -> None:
        store.write("a", b"12345")
        with pytest.raises(FileNotFoundError):
            store.read("b", LIMIT)
        with pytest.raises(FileNotFoundError):
            store.read_all({"a": 5, "x/b": 5})
        with pytest.raises(TooLarge, match="a has 5 bytes, expected at most 4"):
            store.read("a", 4)
        assert store.read("a", 5) == b"12345"

    def test_listing_and_removing(self, store: Store) -> None:
        assert list(store.list()) == [] and store.folders() == set()
        store.create_all({name: b"x" * 3 for name in ("f", "a/1", "a/2", "a/b/3", "ab/4")})
        assert {entry.path for entry in store.list("a")} == {"a/1", "a/2", "a/b/3"}
        assert {entry.size_bytes for entry in store.list()} == {3}
        assert store.folders() == {"a", "ab"} and store.folders("a") == {"b"} and store.folders("x") == set()
        [entry] = store.list("ab")
        assert abs(entry.modified.timestamp() - time.time()) < 60
        store.remove(["f", "nothing", "a/1"])
        store.remove_tree("a/b")
        store.remove_tree("nothing")
        assert {entry.path for entry in store.list()} == {"a/2", "ab/4"}

    def test_of_several_processes_one_creates_and_one_gets_the_lease(self, place: Path | str) -> None:
        names = [f"race/{number}" for number in range(20)]
        racers = [workers.start(workers.race_for, place, names, bytes([65 + who])) for who in range(3)]
        for _, connection in racers:
            assert connection.recv() == "ready"
        for _, connection in racers:
            connection.send("go")
        results = [connection.recv() for _, connection in racers]
        for process, connection in racers:
            connection.send("end")
            process.join()
        assert sorted(name for won, _ in results for name in won) == sorted(names)
        assert sorted(lease for _, lease in results) == [False, False, True]
        found = tree(open_store(place))
        for who, (won, _) in enumerate(results):
            assert all(found[name] == bytes([65 + who]) for name in won)

    # ---- caches

    def test_a_cache_is_the_same_bytes_everywhere_and_plain_zarr_reads_it(
        self, place: Path | str, store: Store
    ) -> None:
        tiny.make_tiny_cache(place)
        if zarr.__version__ == tiny.MADE_WITH_ZARR:
            assert tree(store) == tiny.tree(tiny.COMMITTED_CACHE)
        reader = CacheReader(place)
        for info in reader.units():
            keys, arrays = tiny.make_unit(info.unit)
            records = reader.read_unit(info)
            assert records.keys == keys
            assert all((records.arrays[name] == values).all() for name, values in arrays.items())
        root = zarr.open_group(self.zarr_store(place), mode="r")
        box = root["units/train-000/v0-1/box"]
        assert isinstance(box, zarr.Array)
        assert np.array_equal(np.asarray(box[...]), tiny.make_unit(UnitId(A.shard, 0, 2))[1]["box"])

    def zarr_store(self, place: Path | str) -> Path | ObjectStore[Any]:
        return place if isinstance(place, Path) else ObjectStore(connect(place), read_only=True)

    def test_growth_touches_nothing_and_other_caches_are_refused(self, place: Path | str, store: Store) -> None:
        with CacheWriter.open(place, tiny.make_manifest(1, 2)) as writer:
            tiny.write_units(writer, [UnitId(A.shard, 0, 2)])
        before = {path: data for path, data in tree(store).items() if path != "zarr.json"}
        for difference in (
            {"teacher": {"weights_sha256": "cd" * 32}},
            {"teacher": {"block": 1}},
            {"codec": {"parameters": {"rows": 5}}},
            {"views": {"seed": 1}},
        ):
            with pytest.raises(CacheMismatch, match=f"{next(iter(difference))}\\."):
                CacheWriter.open(place, tiny.make_manifest(1, 2, **difference))
        with pytest.raises(CacheMismatch, match=r"source\.train-000\.tar\.num_samples"):
            CacheWriter.open(place, tiny.make_manifest(1, 2, num_samples=4))
        with CacheWriter.open(place, tiny.make_manifest(2, 3)) as writer:
            tiny.write_units(writer, [UnitId(A.shard, 2, 1), B])
        after = tree(store)
        assert before.items() <= after.items() and CacheReader(place).coverage().complete

    def test_a_place_with_something_else_is_left_alone(self, place: Path | str, store: Store) -> None:
        store.write("thesis.tex", b"precious")
        with pytest.raises(UserError, match="not empty and not a tinymim cache"):
            CacheWriter.open(place, tiny.make_manifest())
        assert tree(store) == {"thesis.tex": b"precious"}
        with pytest.raises(UserError, match="there is no cache"):
            CacheReader(place)

    def test_two_processes_share_the_units_and_one_outlives_the_other(
        self, place: Path | str, store: Store, tmp_path: Path
    ) -> None:
        manifest = tiny.make_manifest(num_shards=6)
        first, second = (workers.start(workers.write_all, place, manifest, 1.0) for _ in range(2))
        for _, connection in (first, second):
            assert connection.recv() == "open"
        assert first[1].recv()[0] == "claimed"
        assert first[0].pid is not None
        os.kill(first[0].pid, signal.SIGKILL)
        first[0].join()
        done = _messages(second[1])
        second[0].join(60)
        assert second[0].exitcode == 0 and done[-1] == "done"
        with CacheWriter.open(tmp_path / "alone", manifest) as writer:
            tiny.write_units(writer, tiny.units_of(manifest))
        assert tree(store) == tiny.tree(tmp_path / "alone")
        written = [message[1] for message in done if message[0] == "written"]
        assert len(written) == len(set(written))

    def test_both_of_two_living_processes_work_and_none_does_what_the_other_did(
        self, place: Path | str, store: Store, tmp_path: Path
    ) -> None:
        manifest = tiny.make_manifest(num_shards=12)
        jobs = [workers.start(workers.write_all, place, manifest, 60.0) for _ in range(2)]
        written = [
            [message[1] for message in _messages(connection) if message[0] == "written"] for _, connection in jobs
        ]
        for process, _ in jobs:
            process.join(60)
            assert process.exitcode == 0
        assert sorted(itertools.chain(*written)) == sorted(tiny.units_of(manifest))
        with CacheWriter.open(tmp_path / "alone", manifest) as writer:
            tiny.write_units(writer, tiny.units_of(manifest))
        assert tree(store) == tiny.tree(tmp_path / "alone")

    def test_a_killed_writer_is_resumed_to_the_same_bytes(
        self, place: Path | str, store: Store, tmp_path: Path
    ) -> None:
        manifest = tiny.make_manifest(num_shards=4)
        process, connection = workers.start(workers.claim_and_hang, place, manifest, A, 60.0)
        assert connection.recv() == "claimed"
        assert CacheReader(place).units() == []
        with CacheWriter.open(place, manifest) as writer:
            assert not writer.claim(A)  # the owner lives
            assert [holder.pid for holder in writer.holders([A, B])] == [process.pid]
        process.kill()
        process.join()
        with CacheWriter.open(place, manifest) as writer:
            tiny.write_units(writer, tiny.units_of(manifest))
        with CacheWriter.open(tmp_path / "alone", manifest) as writer:
            tiny.write_units(writer, tiny.units_of(manifest))
        assert tree(store) == tiny.tree(tmp_path / "alone")

    def test_a_writer_believed_dead_changes_nothing_that_its_heir_committed(
        self, place: Path | str, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifest = tiny.make_manifest()
        with CacheWriter.open(place, manifest) as sleeper, CacheWriter.open(place, manifest) as heir:
            assert sleeper.claim(A) and not heir.claim(A)
            with monkeypatch.context() as patch:
                tiny.bury_the_dead(patch)
                assert heir.claim(A)
            with pytest.raises(UnitTaken, match="another writer's"):
                tiny.write_units(sleeper, [A])
            tiny.write_units(heir, [A])
            before = tree(store)
            # Even a writer that no longer checks its lease cannot replace a file.
            assert len(store.create_all({path: b"other" for path in before})) == len(before)
            with pytest.raises(UnitTaken):
                tiny.write_units(sleeper, [A])
            assert tree(store) == before
        assert len(CacheReader(place).units()) == 1

    def test_damage_is_found_and_named(self, place: Path | str, store: Store) -> None:
        tiny.make_tiny_cache(place)
        path = "units/train-000/v0-1/qk_index/c/0/0/0/0"
        data = bytearray(store.read(path, LIMIT))
        data[len(data) // 2] ^= 4
        store.write(path, bytes(data))
        reader = CacheReader(place)
        with pytest.raises(CacheCorrupt, match=r"unit train-000\.tar v0-1 .*qk_index/c/0/0/0/0"):
            reader.read_unit(reader.units()[0])
        store.remove([path])
        with pytest.raises(CacheCorrupt, match=r"unit train-000\.tar v0-1 .*qk_index/c/0/0/0/0"):
            reader.read_unit(reader.units()[0])

    # ---- leases

    def test_a_silent_owner_is_taken_over_and_a_beating_one_is_not(self, store: Store) -> None:
        silent, beating, watcher = Leases(store, 1.0), Leases(store, 1.0), Leases(store, 60.0)
        assert silent.claim("silent") and beating.claim("beating")
        silent._stop.set()  # the owner lives, but is stuck
        began_s = time.monotonic()
        while not watcher.claim("silent"):
            assert time.monotonic() - began_s < 30
            time.sleep(0.05)
        assert time.monotonic() - began_s > 1.0
        assert not watcher.claim("beating")
        assert not silent.holds("silent") and watcher.holds("silent") and beating.holds("beating")
        silent.release("silent")  # others have taken the lease
        assert watcher.holds("silent")
        for leases in (silent, beating, watcher):
            leases.close()
        assert watcher.names() == set()


def _messages(connection: Connection) -> list[Any]:
    """All messages of a process until it ends."""
    found = []
    while True:
        try:
            found.append(connection.recv())
        except EOFError:
            return found


class TestFolder(StoreContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Path | str:
        return tmp_path / "cache"


class TestObjectStore(StoreContract):
    @pytest.fixture
    def place(self, seaweedfs: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path | str:
        for name, value in seaweedfs.items():
            monkeypatch.setenv(name, value)
        return f"s3://{BUCKET}/caches/{next(_numbers)}"


@pytest.mark.parametrize(
    ("url", "variable"),
    [("s3://b/x", "AWS_ACCESS_KEY_ID"), ("gs://b/x", "GOOGLE_"), ("az://b/x", "AZURE_"), ("abfss://c@a/x", "AZURE_")],
)
def test_a_refusal_names_the_variables_of_its_own_store(url: str, variable: str) -> None:
    hint = str(store_error(url, PermissionDeniedError("no")).hint)
    assert variable in hint and sum(word in hint for word in ("AWS_", "GOOGLE_", "AZURE_")) == 1
