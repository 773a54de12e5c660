"""One contract for folders and object stores: files, leases, readers, and writers that share work, die and return."""

import itertools
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from obstore.exceptions import PermissionDeniedError
from zarr.storage import ZipStore

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, StoreError, UserError
from tinymim.storage.commit import holds_keys
from tinymim.storage.entries import TooLarge
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.leases import Leases
from tinymim.storage.objects import store_error
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import Store, open_store
from tinymim.storage.writer import CacheGone, CacheWriter, UnitTaken
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

    def test_ranges_are_read_and_cut_where_the_file_ends(self, store: Store) -> None:
        store.write("a", bytes(range(100)))

        def read(*ranges: tuple[int, int], path: str = "a") -> list[bytes]:
            return [bytes(part) for part in store.read_ranges(path, ranges)]

        assert read() == [] and read((3, 5)) == [b"\3\4"] and read((5, 5)) == [b""]
        assert read((90, 92), (0, 1), (98, 100)) == [b"Z[", b"\0", b"bc"]
        assert read((3, 5), (5, 6), (6, 6), (6, 8), (9, 10)) == [b"\3\4", b"\5", b"", b"\6\7", b"\x09"]
        assert read((98, 2**62)) == [b"bc"]
        assert read((100, 104)) == [b""]
        assert read((97, 98), (98, 2**40), (2**40, 2**41)) == [b"a", b"bc", b""]
        assert read((2**61, 2**62), (0, 2), (99, 2**40)) == [b"", b"\0\1", b"c"]
        with pytest.raises(FileNotFoundError):
            read((0, 1), path="b")

    def test_a_draft_is_seen_whole_or_not_at_all(self, store: Store) -> None:
        with store.draft("a/b") as draft:
            draft.file.write(b"dropped")
        with store.draft("a/b") as draft, store.draft("a/b") as other, store.draft("a/b") as same:
            for each, data in ((draft, b"first"), (other, b"second"), (same, b"first")):
                each.file.write(data)
            assert list(store.list()) == []
            assert draft.create() and not other.create() and same.create()
        assert tree(store) == {"a/b": b"first"}

    # ---- caches

    def test_a_cache_is_the_same_bytes_everywhere_and_plain_zarr_reads_it(
        self, place: Path | str, store: Store, tmp_path: Path
    ) -> None:
        tiny.make_tiny_cache(place)
        if numcodecs.__version__ == tiny.MADE_WITH_NUMCODECS:
            assert tree(store) == tiny.tree(tiny.COMMITTED_CACHE)
        reader = CacheReader(place)
        counts = {layer: len(reader.units(layer)) for layer in (VIEWS, *reader.layers)}
        assert counts == {VIEWS: 3, tiny.REL: 3, tiny.CLS: 1}
        assert len(tree(store)) == 2 * sum(counts.values()) + 7  # 2 objects each; 5 groups and a layer's constants
        for info in itertools.chain(*map(reader.units, counts)):
            keys, arrays = tiny.make_keys(info.unit.shard), tiny.make_arrays(info.layer, info.unit)
            assert same(reader.read_views(info), arrays)
            assert reader.keys(info.unit.shard) == keys
            copy = tmp_path / "copy.zip"
            copy.write_bytes(store.read(info.path, LIMIT))
            root = zarr.open_group(ZipStore(copy, mode="r"), mode="r")
            assert set(root) == set(arrays) | (
                {"key_bytes", "key_ends"} if holds_keys(info.layer, info.unit) else set()
            )
            assert same({name: np.asarray(root[name][...]) for name in arrays}, arrays)  # type: ignore[index]

    def test_growth_touches_nothing_and_other_caches_are_refused(self, place: Path | str, store: Store) -> None:
        small = tiny.make_manifest(1)
        with CacheWriter.open(place, small, [tiny.make_layer()]) as writer:
            tiny.write_units(writer, [UnitId(A.shard, 0, 2)])
        before = {path: data for path, data in tree(store).items() if path != "zarr.json"}
        with pytest.raises(CacheMismatch, match=r"views\.seed"):
            CacheWriter.open(place, tiny.make_manifest(1, views={"seed": 1}))
        for difference in (
            {"teacher": {"weights_sha256": "cd" * 32}},
            {"target": {"taps": ["qkv@1"]}},
            {"target": {"parameters": {"rows": 5}}},
        ):
            with pytest.raises(CacheMismatch, match=f"{next(iter(difference))}\\."):
                CacheWriter.open(place, small, [tiny.make_layer(**difference)])
        with pytest.raises(CacheMismatch, match=r"source\.train-000\.tar\.num_samples"):
            CacheWriter.open(place, tiny.make_manifest(1, num_samples=4))
        with CacheWriter.open(place, tiny.make_manifest(2), [tiny.make_layer()]) as writer:
            tiny.write_units(writer, [UnitId(A.shard, 2, 1), B])
        with CacheWriter.open(place, small, [tiny.make_layer(name=tiny.CLS)]) as writer:  # another layer later
            tiny.write_units(writer, [UnitId(A.shard, 0, 2)])
        after = tree(store)
        reader = CacheReader(place)
        assert before.items() <= after.items() and reader.coverage(tiny.REL).complete
        assert list(reader.manifest.shards) == [A.shard, B.shard]

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
        message = first[1].recv()
        assert message == "done" or message[0] == "claimed"  # done, where the second one wrote all before it began
        first[0].kill()  # nothing, if it was so fast that all units are written
        first[0].join()
        done = _messages(second[1])
        second[0].join(60)
        assert second[0].exitcode == 0 and done[-1] == "done"
        assert tree(store) == tiny.make_whole_cache(tmp_path / "alone", manifest)
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
        assert tree(store) == tiny.make_whole_cache(tmp_path / "alone", manifest)

    def test_two_processes_with_layers_of_their_own_share_the_views(
        self, place: Path | str, store: Store, tmp_path: Path
    ) -> None:
        manifest = tiny.make_manifest(num_shards=6)
        jobs = [workers.start(workers.write_layer, place, manifest, name, 60.0) for name in (tiny.REL, tiny.CLS)]
        for process, connection in jobs:
            messages = _messages(connection)
            process.join(60)
            assert process.exitcode == 0 and messages[-1] == "done"
            assert not any(message[0] == "taken" for message in messages)
        layers = [tiny.make_layer(manifest, name) for name in (tiny.REL, tiny.CLS)]
        with CacheWriter.open(tmp_path / "alone", manifest, layers) as writer:
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
            assert not writer.claim(VIEWS, A)  # the owner lives
            assert [holder.pid for holder in writer.holders([A, B])] == [process.pid]
        process.kill()
        process.join()
        tiny.make_whole_cache(place, manifest)
        assert tree(store) == tiny.make_whole_cache(tmp_path / "alone", manifest)

    def test_a_writer_believed_dead_changes_nothing_that_its_heir_committed(
        self, place: Path | str, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifest, layers = tiny.make_manifest(), [tiny.make_layer()]
        with CacheWriter.open(place, manifest, layers) as sleeper, CacheWriter.open(place, manifest, layers) as heir:
            assert sleeper.claim(VIEWS, A) and not heir.claim(VIEWS, A)
            with monkeypatch.context() as patch:
                tiny.bury_the_dead(patch)
                assert heir.claim(VIEWS, A)
            with pytest.raises(UnitTaken, match="another writer's"):
                tiny.write_units(sleeper, [A])
            tiny.write_units(heir, [A], give_back=False)
            before = tree(store)
            # Even a writer that no longer checks its lease cannot replace a file.
            assert len(store.create_all({path: b"other" for path in before})) == len(before)
            with pytest.raises(UnitTaken), sleeper.begin(VIEWS, A, tiny.make_keys(A.shard)):
                pass
            assert tree(store) == before
        assert len(CacheReader(place).units()) == 1

    def test_a_writer_that_lost_its_shard_while_writing_commits_nothing(
        self, place: Path | str, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        manifest, layers = tiny.make_manifest(), [tiny.make_layer()]
        with CacheWriter.open(place, manifest, layers) as sleeper, CacheWriter.open(place, manifest, layers) as heir:
            with sleeper.begin(VIEWS, A, tiny.make_keys(A.shard)) as draft:
                draft.add(tiny.make_arrays(VIEWS, A))
                with monkeypatch.context() as patch:
                    tiny.bury_the_dead(patch)
                    tiny.write_units(heir, [UnitId(A.shard, 0, 2)])  # also removes the sleeper's unfinished file
                with pytest.raises(UnitTaken):
                    draft.commit({})
            tiny.write_units(heir, [UnitId(A.shard, 2, 1), B])
        reader = CacheReader(place)
        assert [info.unit.view_range for info in reader.units()] == ["v0-1", "v2-2", "v0-2"]
        for info in itertools.chain(reader.units(), reader.units(tiny.REL)):
            assert same(reader.read_views(info), tiny.make_arrays(info.layer, info.unit))

    def test_one_shard_has_one_writer_whatever_the_layer_and_the_views(self, place: Path | str) -> None:
        manifest, rel, cls = tiny.make_manifest(), tiny.make_layer(), tiny.make_layer(name=tiny.CLS)
        with CacheWriter.open(place, manifest, [rel]) as first, CacheWriter.open(place, manifest, [cls]) as second:
            tiny.write_units(first, [A], give_back=False)
            for unit in (A, UnitId(A.shard, 3, 1)):
                assert not second.claim(tiny.CLS, unit)
                with pytest.raises(UnitTaken, match="another writer's"), second.begin(tiny.CLS, unit, []):
                    pass
            assert second.claim(tiny.CLS, B) and not first.claim(tiny.REL, B)
            first.give_back(A)
            tiny.write_units(second, [A])
            second.give_back(B)
            tiny.write_units(first, [B])
        reader = CacheReader(place)
        assert [len(reader.units(layer)) for layer in (VIEWS, tiny.REL, tiny.CLS)] == [2, 2, 1]

    def test_damage_is_found_and_named(self, place: Path | str, store: Store) -> None:
        tiny.make_tiny_cache(place)
        info = CacheReader(place).units(tiny.REL)[0]
        places = info.parts.places()
        for at, view in ((places[0] + 60, 0), (places[2] - 1, 1)):
            intact = store.read(info.path, LIMIT)
            store.write(info.path, tiny.changed(intact, at))
            reader = CacheReader(place)
            with pytest.raises(CacheCorrupt, match=rf"unit train-000\.tar v0-1 of layer rel of .*: view {view} "):
                reader.read_views(info)
            reader.read_views(info, [1 - view])
            store.write(info.path, intact)
        store.remove([info.path])
        with pytest.raises(CacheCorrupt, match=r"unit train-000\.tar v0-1 of layer rel .*v0-1\.zip is missing"):
            reader.read_views(info)
        store.write(info.path, intact[: places[1] + 7])
        reader.read_views(info, [0])
        with pytest.raises(CacheCorrupt, match=r"view 1 is cut short\n  got: 7 bytes"):
            reader.read_views(info)
        store.write(info.path, b"")
        with pytest.raises(CacheCorrupt, match=r"view 1 is cut short\n  got: 0 bytes"):
            reader.read_views(info, [1])

    # ---- a cache that goes away under a writer

    def test_a_removed_manifest_ends_a_writer_at_its_next_step(self, place: Path | str, store: Store) -> None:
        manifest = tiny.make_manifest(3)
        first, second, third = tiny.units_of(manifest)
        with CacheWriter.open(place, manifest, [tiny.make_layer(manifest)]) as writer:
            tiny.write_units(writer, [first])
            assert writer.claim(VIEWS, second)
            with writer.begin(VIEWS, second, tiny.make_keys(second.shard)) as draft:
                draft.add(tiny.make_arrays(VIEWS, second))
                held = store.read("zarr.json", LIMIT)
                store.remove(["zarr.json"])
                before = set(tree(store))
                with pytest.raises(CacheGone, match=r"is gone[\s\S]*no zarr\.json"):
                    draft.commit({})
            for step in (
                lambda: writer.claim(VIEWS, third),
                lambda: writer.refresh(VIEWS),
                lambda: tiny.write_units(writer, [third]),
            ):
                with pytest.raises(CacheGone):
                    step()
            assert set(tree(store)) == before
            store.write("zarr.json", held)
            tiny.write_units(writer, [second, third])
        assert CacheReader(place).coverage(tiny.REL).complete

    def test_a_removed_layer_ends_its_writer(self, place: Path | str, store: Store) -> None:
        with CacheWriter.open(place, tiny.make_manifest(), [tiny.make_layer()]) as writer:
            tiny.write_units(writer, [A])
            store.remove_tree("layers/rel")
            with pytest.raises(CacheGone, match=r"or its layer rel[\s\S]*no layers/rel/zarr\.json"):
                writer.claim(tiny.REL, B)
            assert writer.claim(VIEWS, B)
        assert not any(path.startswith("layers/rel") for path in tree(store))

    @pytest.mark.parametrize("change", [{"views": {"seed": 1}}, {"target": {"parameters": {"rows": 9}}}])
    def test_another_cache_in_the_same_place_ends_a_writer(
        self, place: Path | str, store: Store, change: dict[str, Any]
    ) -> None:
        with CacheWriter.open(place, tiny.make_manifest(), [tiny.make_layer()]) as writer:
            tiny.write_units(writer, [A])
            store.remove_tree("")
            other = tiny.make_manifest(**change)
            with CacheWriter.open(place, other, [tiny.make_layer(other, **change)]) as theirs:
                tiny.write_units(theirs, [A])
                before = tree(store)
                with pytest.raises((CacheGone, CacheCorrupt), match=r"is gone|does not belong to this cache"):
                    writer.claim(tiny.REL, B)
                with pytest.raises((CacheGone, CacheCorrupt)):
                    writer.refresh(tiny.REL)
                assert tree(store) == before

    # ---- what it costs

    def test_claims_and_opening_cost_the_same_for_few_and_many_shards(
        self, place: Path | str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Requests to the store, by kind; 1,000 committed shards against 10."""
        costs = {}
        for shards in (10, 1000):
            manifest, here = tiny.make_manifest(shards), f"{place}-{shards}"
            layer = tiny.make_layer(manifest)
            with CacheWriter.open(here, manifest, [layer]) as writer:
                records = {}
                for unit in tiny.units_of(manifest)[1:]:  # records suffice: nothing reads their units here
                    for name in (VIEWS, tiny.REL):
                        records[f"{'layers/' * (name != VIEWS)}{name}/{unit.shard[:-4]}/v0-2.json"] = b"{}"
                if isinstance(place, Path):
                    monkeypatch.setattr("tinymim.storage.local.fsync_folder", lambda folder: None)
                writer.store.create_all(records)
                with monkeypatch.context() as patch:
                    claiming = counted(patch, writer.store)
                    assert writer.claim(tiny.REL, tiny.units_of(manifest)[0])
            with monkeypatch.context() as patch:
                opening = counted(patch, writer.store)
                reader = CacheReader(here)
            assert all(name != "list" for name, _ in opening), opening
            with monkeypatch.context() as patch:
                writing = counted(patch, writer.store)
                CacheWriter.open(here, manifest, [layer]).close()
            assert {path for name, path in writing if name in ("list", "folders")} == {"leases"}
            assert reader.layers == {tiny.REL: layer}
            costs[shards] = [claiming, opening, writing]
        assert costs[10] == costs[1000]
        assert len(costs[10][0]) <= 18, costs[10][0]

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


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether both hold the same arrays."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and np.array_equal(ours[name], theirs[name]) for name in ours
    )


def counted(patch: pytest.MonkeyPatch, store: Store) -> list[tuple[str, str]]:
    """A list that fills with the requests to all stores of this kind: method and path."""
    found: list[tuple[str, str]] = []

    def recorded(name: str, real: Any) -> Any:
        def method(self: Any, first: Any = "", *rest: Any) -> Any:
            paths = [first] if isinstance(first, str) else list(first)
            found.extend((name, path) for path in paths)
            return real(self, first if isinstance(first, str | dict) else paths, *rest)

        return method

    for name in ("read", "exists", "list", "folders", "write", "create_all", "remove", "read_ranges"):
        patch.setattr(type(store), name, recorded(name, getattr(type(store), name)))
    return found


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

    def test_a_unit_beyond_one_request_is_refused_with_its_size(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tinymim.storage.remote.PUT_BYTES", 2_000)
        with store.draft("v0-1.zip") as draft:
            draft.file.write(bytes(2_001))
            with pytest.raises(StoreError, match=r"v0-1.zip is too large(.|\n)*got: 2,001 bytes(.|\n)*views_per_unit"):
                draft.create()
        with store.draft("v0-1.zip") as draft:
            draft.file.write(bytes(2_000))
            assert draft.create()
        assert [entry.path for entry in store.list()] == ["v0-1.zip"]


@pytest.mark.parametrize(
    ("url", "variable"),
    [("s3://b/x", "AWS_ACCESS_KEY_ID"), ("gs://b/x", "GOOGLE_"), ("az://b/x", "AZURE_"), ("abfss://c@a/x", "AZURE_")],
)
def test_a_refusal_names_the_variables_of_its_own_store(url: str, variable: str) -> None:
    hint = str(store_error(url, PermissionDeniedError("no")).hint)
    assert variable in hint and sum(word in hint for word in ("AWS_", "GOOGLE_", "AZURE_")) == 1
