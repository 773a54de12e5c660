"""Caches that jobs share, that jobs are killed over, that lie in an object store or below a root."""

import random
import shutil
import time
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from tinymim.configs.errors import CacheMismatch, UserError
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.stages import cache_teacher, train_student
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import open_store
from tinymim.tests.s3_server import BUCKET
from tinymim.tests.stages import jobs
from tinymim.tests.stages.tiny import cache_recipe, losses, student_recipe, write_set, write_teacher

SHARDS = 8
LAYER = cache_recipe(Path()).layer_name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a teacher, the cache that one job after the other made of them without interruption: `cache` holds one
    layer, `both` two. And a student's losses from the first layer."""
    root = write_set(tmp_path_factory.mktemp("shared"), 6 * SHARDS, 6)
    cache_teacher.run(recipe(root))
    shutil.copytree(root / "cache", root / "both")
    cache_teacher.run(recipe(root, cache=root / "both", **SECOND))
    train_student.run(student_recipe(root))
    return root


SECOND: dict[str, object] = {"layer": "second", "codec": {"name": "dense", "relations": ["vv"]}}


def recipe(root: Path, **changes: object) -> CacheTeacherRecipe:
    """Two units of each shard: views 0 to 2 in two parts, and 3 and 4 in one."""
    parts = {"num_views": 5, "views_per_unit": 3, "views_per_decode": 2}
    return cache_recipe(root, **{"lease_s": 2.0, **parts, **changes})


UNITS = 2 * SHARDS


def tree(place: Path | str) -> dict[str, bytes]:
    store = open_store(place)
    return store.read_all({entry.path: entry.size_bytes for entry in store.list()})


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path | str:
    """Where a new cache may be."""
    if request.param == "folder":
        return tmp_path / "cache"
    for name, value in request.getfixturevalue("seaweedfs").items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{tmp_path.name}"


def test_two_jobs_share_a_cache_one_is_killed_and_students_read_the_same(
    made: Path, tmp_path: Path, place: Path | str
) -> None:
    both = [jobs.start(recipe(made, cache=place, run=run(tmp_path, name))) for name in "ab"]
    assert [connection.recv() for _, connection in both] == ["open", "open"]
    quicker = wait([connection for _, connection in both])[0]  # on a busy machine either may get all the units
    first, second = sorted(both, key=lambda job: job[1] is not quicker)
    claimed = first[1].recv()
    first[0].kill()
    first[0].join()
    assert claimed[0] == "claimed"
    done = {unit for what, unit in jobs.said(first[1]) if what == "committed"}
    there = [unit for what, unit in jobs.said(second[1], to_the_end=True) if what == "committed"]
    second[0].join(300)
    assert second[0].exitcode == 0
    assert len(there) == len(set(there)) and done.isdisjoint(there) and len(done) + len(there) == UNITS
    assert tree(place) == tree(made / "cache")
    shutil.copytree(made / "shards", tmp_path / "shards")
    train_student.run(student_recipe(tmp_path, cache=place))
    assert losses(tmp_path) == losses(made)


def run(folder: Path, name: str) -> dict[str, object]:
    return {"folder": folder / f"run-{name}", "device": "cpu", "threads": 1}


def kill_and_resume(made: Path, tmp_path: Path, kills: int, longest_s: float) -> None:
    """Kill jobs at random moments until both layers of a cache are whole, and begin the next cache, `kills` times."""
    rng, done, number = random.Random(1), 0, 0
    committed: dict[str, set[UnitId]] = {}
    while done < kills:
        cache = tmp_path / f"cache-{number}"
        second = len(committed.get(LAYER, ())) == UNITS
        job = recipe(made, cache=cache, run=run(tmp_path, "k"), **(SECOND if second else {}))
        process, connection = jobs.start(job)
        time.sleep(rng.uniform(0.0, longest_s))
        process.kill()
        process.join()
        done += process.exitcode == -9
        claimed = {message[1] for message in jobs.said(connection) if message[0] == "claimed"}
        assert not committed.get(job.layer_name, set()) & claimed, "computed again"
        if (cache / "zarr.json").exists():
            reader = CacheReader(cache)
            for layer in (VIEWS, *reader.layers):
                for info in reader.units(layer):
                    reader.read_views(info)
            committed = {layer: {info.unit for info in reader.units(layer)} for layer in reader.layers}
            if len(committed.get("second", ())) == UNITS:
                whole(made, tmp_path, cache)
                number, committed = number + 1, {}
    whole(made, tmp_path, tmp_path / f"cache-{number}")


def whole(made: Path, tmp_path: Path, cache: Path) -> None:
    """Complete both layers, and compare every byte."""
    cache_teacher.run(recipe(made, cache=cache, run=run(tmp_path, "k")))
    cache_teacher.run(recipe(made, cache=cache, run=run(tmp_path, "k"), **SECOND))
    assert tree(cache) == tree(made / "both")


def test_a_killed_job_continues_to_the_same_bytes(made: Path, tmp_path: Path) -> None:
    kill_and_resume(made, tmp_path, 6, 1.0)


@pytest.mark.slow  # a minute; the storage tests kill writers 50 times in seconds, this adds the teacher and the loader
def test_a_job_killed_at_50_random_moments_continues_to_the_same_bytes(made: Path, tmp_path: Path) -> None:
    kill_and_resume(made, tmp_path, 50, 1.5)


def test_two_jobs_add_two_layers_at_once(made: Path, tmp_path: Path, place: Path | str) -> None:
    layers: tuple[dict[str, object], ...] = ({}, SECOND)
    both = [
        jobs.start(recipe(made, cache=place, run=run(tmp_path, f"job-{number}"), **layers[number])) for number in (0, 1)
    ]
    said = [jobs.said(connection, to_the_end=True) for _, connection in both]
    for process, _ in both:
        process.join(300)
        assert process.exitcode == 0
    assert [sum(message[0] == "committed" for message in messages) for messages in said] == [UNITS, UNITS]
    assert tree(place) == tree(made / "both")


def test_a_root_finds_the_cache_of_the_same_spec(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "caches"
    shared = recipe(made, cache=None, cache_root=root, run=run(tmp_path, "a"))
    cache_teacher.run(shared)
    [folder] = root.iterdir()
    assert tree(folder) == tree(made / "cache") and folder.name == CacheReader(folder).layer().spec_id
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json") if "leases" not in path.parts}
    capsys.readouterr()
    cache_teacher.run(recipe(made, cache=None, cache_root=root, run=run(tmp_path, "b")))
    assert "nothing to do" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.json") if "leases" not in path.parts}
    cache_teacher.run(recipe(made, cache=None, cache_root=root, num_views=6, run=run(tmp_path, "c")))
    cache_teacher.run(recipe(made, cache=None, cache_root=root, codec={"rows": 4}, run=run(tmp_path, "d")))
    assert len(list(root.iterdir())) == 2
    assert CacheReader(folder).coverage(LAYER).complete_views == 6
    with pytest.raises(ValueError, match="give cache or cache_root"):
        recipe(made, cache_root=root)


def test_changed_shards_and_other_teachers_are_refused_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "cache", tmp_path / "cache")
    shutil.copytree(made / "shards", tmp_path / "shards")
    before = tree(tmp_path / "cache")
    write_teacher(tmp_path / "other.safetensors", seed=1)
    other = cache_recipe(tmp_path).teacher.model_copy(update={"weights": str(tmp_path / "other.safetensors")})
    again = {"cache": tmp_path / "cache", "run": run(tmp_path, "a")}
    for changes, field in (
        ({"teacher": other}, r"teacher\.weights_sha256"),
        ({"codec": {"rows": 5}}, r"target\.parameters"),
        ({"views": {"size": 32, "scaled_decode": False, "seed": 3}}, r"views\.seed"),
    ):
        with pytest.raises(CacheMismatch, match=field):
            cache_teacher.run(recipe(made, **again, **changes))
    shard = tmp_path / "shards" / "shard-000003.tar"
    shutil.copy(tmp_path / "shards" / "shard-000004.tar", shard)
    (tmp_path / "shards" / "index.json").unlink()
    with pytest.raises((CacheMismatch, UserError), match=r"shard-000003\.tar"):
        cache_teacher.run(recipe(made, source={"shards": tmp_path / "shards"}, **again))
    assert tree(tmp_path / "cache") == before
