"""Caches that jobs share, that jobs are killed over, that lie in an object store or below a root."""

import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from tinymim.configs.errors import CacheMismatch, CheckpointError, RecipeError, UserError
from tinymim.configs.schema import CacheTeacherRecipe
from tinymim.stages import cache_teacher, train_student
from tinymim.storage.layout import UnitId
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import open_store
from tinymim.tests.s3_server import BUCKET
from tinymim.tests.stages import jobs
from tinymim.tests.stages.tiny import cache_recipe, losses, student_recipe, write_set, write_teacher

SHARDS = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a teacher, the cache that one job made of them without interruption, and a student's losses from it."""
    root = write_set(tmp_path_factory.mktemp("shared"), 6 * SHARDS, 6)
    cache_teacher.run(recipe(root))
    train_student.run(student_recipe(root))
    return root


def recipe(root: Path, **changes: object) -> CacheTeacherRecipe:
    return cache_recipe(root, **{"lease_s": 2.0, **changes})


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
    assert len(there) == len(set(there)) and done.isdisjoint(there) and len(done) + len(there) == SHARDS
    assert tree(place) == tree(made / "cache")
    shutil.copytree(made / "shards", tmp_path / "shards")
    train_student.run(student_recipe(tmp_path, cache=place))
    assert losses(tmp_path) == losses(made)


def run(folder: Path, name: str) -> dict[str, object]:
    return {"folder": folder / f"run-{name}", "device": "cpu", "threads": 1}


def kill_and_resume(made: Path, tmp_path: Path, kills: int, longest_s: float) -> None:
    """Kill the job at random moments until a cache is whole, and begin the next one, `kills` times in all."""
    rng, done, number = random.Random(1), 0, 0
    committed: set[UnitId] = set()
    while done < kills:
        process, connection = jobs.start(recipe(made, cache=tmp_path / f"cache-{number}", run=run(tmp_path, "k")))
        time.sleep(rng.uniform(0.0, longest_s))
        process.kill()
        process.join()
        done += process.exitcode == -9
        messages = [message for message in jobs.said(connection) if message != "open"]
        assert not committed & {unit for what, unit in messages if what == "claimed"}, "computed again"
        cache = tmp_path / f"cache-{number}"
        if (cache / "zarr.json").exists():
            reader = CacheReader(cache)
            for info in reader.units():
                reader.read_unit(info, verify=True)
            committed = {info.unit for info in reader.units()}
            if len(committed) == SHARDS:
                cache_teacher.run(recipe(made, cache=cache, run=run(tmp_path, "k")))
                assert tree(cache) == tree(made / "cache")
                number, committed = number + 1, set()
    cache_teacher.run(recipe(made, cache=tmp_path / f"cache-{number}", run=run(tmp_path, "k")))
    assert tree(tmp_path / f"cache-{number}") == tree(made / "cache")


def test_a_killed_job_continues_to_the_same_bytes(made: Path, tmp_path: Path) -> None:
    kill_and_resume(made, tmp_path, 6, 1.0)


@pytest.mark.slow  # a minute; the storage tests kill writers 50 times in seconds, this adds the teacher and the loader
def test_a_job_killed_at_50_random_moments_continues_to_the_same_bytes(made: Path, tmp_path: Path) -> None:
    kill_and_resume(made, tmp_path, 50, 1.5)


def test_a_root_finds_the_cache_of_the_same_spec(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "caches"
    shared = recipe(made, cache=None, cache_root=root, run=run(tmp_path, "a"))
    cache_teacher.run(shared)
    [folder] = root.iterdir()
    assert tree(folder) == tree(made / "cache") and folder.name == CacheReader(folder).manifest.spec_id
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json") if "leases" not in path.parts}
    capsys.readouterr()
    cache_teacher.run(recipe(made, cache=None, cache_root=root, run=run(tmp_path, "b")))
    assert "nothing to do" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.json") if "leases" not in path.parts}
    cache_teacher.run(recipe(made, cache=None, cache_root=root, num_views=3, run=run(tmp_path, "c")))
    cache_teacher.run(recipe(made, cache=None, cache_root=root, codec={"rows": 4}, run=run(tmp_path, "d")))
    assert len(list(root.iterdir())) == 2
    assert CacheReader(folder).manifest.num_views == 3
    with pytest.raises(ValueError, match="give cache or cache_root"):
        recipe(made, cache_root=root)


def test_a_student_uses_the_views_it_names_while_the_cache_grows(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "cache", tmp_path / "cache")
    shutil.copytree(made / "shards", tmp_path / "shards")
    cache_teacher.run(recipe(made, cache=tmp_path / "cache", num_views=3, run=run(tmp_path, "a")))
    train_student.run(student_recipe(tmp_path, num_views=2))
    assert losses(tmp_path) == losses(made)
    # One that began before the cache grew goes on when it is told what it began with.
    shutil.copytree(made / "run-student", tmp_path / "begun")
    began = {"run": {"folder": tmp_path / "begun", "device": "cpu", "threads": 1}}
    with pytest.raises(CheckpointError, match="order of samples"):
        train_student.run(student_recipe(tmp_path, **began))
    train_student.run(student_recipe(tmp_path, num_views=2, **began))
    with pytest.raises(RecipeError, match="num_views is more than the cache is for"):
        train_student.run(student_recipe(tmp_path, num_views=4))


def test_missing_records_are_refused_by_key_or_left_out_and_counted(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], unit_without: Callable[[Path, int], str]
) -> None:
    shutil.copytree(made / "shards", tmp_path / "shards")
    key = unit_without(tmp_path / "cache", 2)
    with pytest.raises(CacheMismatch, match=r"no record of 1 image\(s\) of shard shard-000000\.tar") as caught:
        train_student.run(student_recipe(tmp_path))
    assert key in str(caught.value.got)
    train_student.run(student_recipe(tmp_path, on_missing="skip"))
    assert "1 images of the others" in capsys.readouterr().err


@pytest.fixture
def unit_without(made: Path) -> Callable[[Path, int], str]:
    """Writes the cache of `made` anew, the first unit without one of its images; says its key."""
    from tinymim.storage.writer import CacheWriter

    def write(place: Path, image: int) -> str:
        reader = CacheReader(made / "cache")
        lost = ""
        with CacheWriter.open(place, reader.manifest) as writer:
            for number, info in enumerate(reader.units()):
                records = reader.read_unit(info)
                keys, arrays = records.keys, records.arrays
                if number == 0:
                    lost = keys[image]
                    rows = [row for row in range(info.num_records) if row // info.unit.num_views != image]
                    keys = [key for key in keys if key != lost]
                    arrays = {name: values[rows] for name, values in arrays.items()}
                writer.write_unit(info.unit, keys, arrays, info.statistics)
        return lost

    return write


def test_changed_shards_and_other_teachers_are_refused_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "cache", tmp_path / "cache")
    shutil.copytree(made / "shards", tmp_path / "shards")
    before = tree(tmp_path / "cache")
    write_teacher(tmp_path / "other.safetensors", seed=1)
    other = cache_recipe(tmp_path).teacher.model_copy(update={"weights": str(tmp_path / "other.safetensors")})
    again = {"cache": tmp_path / "cache", "run": run(tmp_path, "a")}
    for changes, field in (
        ({"teacher": other}, r"teacher\.weights_sha256"),
        ({"codec": {"rows": 5}}, r"codec\.parameters"),
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
