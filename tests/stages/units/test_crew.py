"""Stage one on a Ray cluster of several nodes on this machine: workers, nodes and the driver are killed on the way."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import pytest
import ray
from ray.cluster_utils import Cluster

from tinymim.configs.errors import CacheMismatch, LoaderKilled, RecipeError, UnitsFailed
from tinymim.configs.load import dump_recipe
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.pipeline.shards import ShardSet
from tinymim.stages import cache_teacher
from tinymim.stages.run.folder import read_metrics
from tinymim.stages.units import crew
from tinymim.stages.units.crew import CacheWorker
from tinymim.storage.layout import UnitId
from tinymim.tests.stages.tiny import cache_recipe, tree, write_set, write_teacher

SHARDS, IMAGES = 20, 10
STORE_BYTES = 80 * 2**20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes with room for one worker each; this process is the driver."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a teacher, and the cache that one process makes of them."""
    root = write_set(tmp_path_factory.mktemp("cluster"), IMAGES * SHARDS, IMAGES)
    cache_teacher.run(recipe(root, root, cluster=None))
    return root


def recipe(made: Path, folder: Path, **changes: Any) -> CacheTeacherRecipe:
    fields: dict[str, Any] = {
        "lease_s": 3.0,
        "cache": folder / "cache",
        "cluster": {"gpus_per_worker": 0, "cpus_per_worker": 1},
        "run": {"folder": folder / "run", "device": "cpu", "threads": 1},
    }
    return cache_recipe(made, **fields | changes)


def committed(folder: Path) -> int:
    """Units of the target layer."""
    return len(list((folder / "cache" / "layers").glob("*/*/v*.json")))


def until(true: Callable[[], bool], within_s: float = 300.0) -> None:
    end_s = time.monotonic() + within_s
    while not true():
        if time.monotonic() > end_s:
            pytest.fail(f"it does not come true within {within_s:g} s")
        time.sleep(0.01)


def owners(folder: Path) -> set[int]:
    """The processes that hold leases on shards: the workers that are at work."""
    found = set()
    for path in (folder / "cache" / "leases" / "shards").glob("*.json"):
        with suppress(FileNotFoundError, ValueError):
            found.add(int(json.loads(path.read_text())["pid"]))
    return found


@contextmanager
def meanwhile(*deeds: Callable[[], None]) -> Iterator[None]:
    """Do them one after the other in another thread: the run itself needs the one that gets the signals."""
    thread = threading.Thread(target=lambda: [deed() for deed in deeds])
    thread.start()
    yield
    thread.join(300)


def test_workers_on_two_nodes_make_the_bytes_of_one_process_but_for_a_broken_shard(
    cluster: Cluster, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "shards", tmp_path / "shards")
    broken = tmp_path / "shards" / "shard-000001.tar"
    broken.write_bytes(b"no tar" + bytes(broken.stat().st_size - 6))  # of the size that the index says
    seen: set[int] = set()

    def done() -> bool:
        seen.update(owners(tmp_path))
        return committed(tmp_path) == SHARDS - 1

    source = {"shards": tmp_path / "shards"}
    with (
        meanwhile(lambda: until(done)),
        pytest.raises(UnitsFailed, match=r"1 unit\(s\) of .*\n  shard-000001.tar v0-1: "),
    ):
        cache_teacher.run(recipe(made, tmp_path, source=source, retries=1))
    whole = {path: data for path, data in tree(made / "cache").items() if "shard-000001" not in path}
    # A worker that starts late may find nothing left to do, or release its only lease between two looks.
    assert tree(tmp_path / "cache") == whole and 1 <= len(seen) <= 2
    err = capsys.readouterr().err
    assert "2 workers on 2 nodes" in err and err.count("unit shard-000001.tar v0-1 failed") == 2
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, SHARDS))
    assert {"views_per_s", "images_per_s", "gib_written", "eta_s", "units_left", "decode_share"} <= lines[0].keys()
    assert lines[-1]["gib_written"] > 0


@pytest.mark.slow  # 13 s; test_one_pass has the same without Ray
def test_workers_write_several_layers_and_only_those_that_lack(cluster: Cluster, made: Path, tmp_path: Path) -> None:
    targets = {"first": {"codec": {"rows": 6, "head_k": 1, "tail_k": 3}}, "cls": {"codec": {"kind": "cls"}}}
    both: dict[str, Any] = {"codec": None, "targets": targets}
    cache_teacher.run(recipe(made, tmp_path / "one", cluster=None, **both))
    cache_teacher.run(recipe(made, tmp_path, cluster=None, codec={"kind": "cls"}, layer="cls"))
    cache_teacher.run(recipe(made, tmp_path, **both))
    assert tree(tmp_path / "cache") == tree(tmp_path / "one" / "cache")


@pytest.mark.slow
def test_a_worker_is_killed_and_a_node_leaves(cluster: Cluster, made: Path, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_a_worker() -> None:
        at_work: set[int] = set()  # a lease may be gone when it is looked at again

        def seen() -> bool:
            at_work.update(owners(tmp_path))
            return committed(tmp_path) >= 1 and bool(at_work)

        until(seen)
        killed.append(min(at_work))
        os.kill(killed[0], signal.SIGKILL)

    def take_a_node_away() -> None:
        until(lambda: committed(tmp_path) >= 4)
        node = cluster.list_all_nodes()[-1]  # type: ignore[no-untyped-call]
        cluster.remove_node(node, allow_graceful=False)

    with meanwhile(kill_a_worker, take_a_node_away):
        cache_teacher.run(recipe(made, tmp_path))
    cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)  # for the tests that follow
    assert killed and tree(tmp_path / "cache") == tree(made / "cache")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, -9),
        # 20 s, and what one process does at SIGTERM is tested in test_teacher_job.py
        pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow),
    ],
)
def test_a_driver_is_killed_or_stopped_and_the_next_one_finishes(
    cluster: Cluster, made: Path, tmp_path: Path, number: int, code: int
) -> None:
    own = {"gpus_per_worker": 0, "cpus_per_worker": 1, "address": cluster.address}
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(made, tmp_path, cluster=own)))
    script = shutil.which("tinymim", path=str(Path(sys.executable).parent))
    assert script
    with subprocess.Popen([script, "cache-teacher", "recipe.yaml"], cwd=tmp_path, stderr=subprocess.PIPE) as driver:
        until(lambda: committed(tmp_path) > 0 or driver.poll() is not None)
        driver.send_signal(number)
        _, err = driver.communicate(timeout=300)
    assert driver.returncode == code, err.decode()
    if number == signal.SIGTERM:
        assert b"committed units are safe" in err and not owners(tmp_path)
    assert 0 < committed(tmp_path) < SHARDS
    cache_teacher.run(recipe(made, tmp_path))
    assert tree(tmp_path / "cache") == tree(made / "cache")


@pytest.mark.parametrize(("gpus", "asked", "used"), [(0, "auto", "cpu"), (1, "auto", "auto"), (0, "cuda", "cuda")])
def test_workers_without_gpus_compute_on_the_cpu_where_the_device_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, asked: str, used: str
) -> None:
    """Ray hides no GPU from an actor that asked for none."""
    seen: list[str] = []

    def prepare(recipe: CacheTeacherRecipe, source: Any) -> None:
        seen.append(recipe.run.device)
        raise RecipeError("far enough")

    monkeypatch.setattr(crew, "prepare", prepare)
    own = {"gpus_per_worker": gpus, "cpus_per_worker": 1}
    wanted = recipe(tmp_path, tmp_path, cluster=own, run={"folder": tmp_path, "device": asked})
    answer = CacheWorker().open(wanted, ShardSet(()))
    assert isinstance(answer, RecipeError) and seen == [used]


def test_a_cluster_without_room_and_one_that_is_not_there_are_refused(
    cluster: Cluster, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="no room for a worker"):
        cache_teacher.run(recipe(made, tmp_path, cluster={"gpus_per_worker": 0.5}))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: (_ for _ in ()).throw(ConnectionError("no such cluster")))
    with pytest.raises(RecipeError, match="cannot join the Ray cluster: no such cluster"):
        cache_teacher.run(recipe(made, tmp_path))


@pytest.mark.slow  # workers take 10 s to begin; errors as values are tested elsewhere
def test_what_a_worker_refuses_ends_the_run(cluster: Cluster, made: Path, tmp_path: Path) -> None:
    """The teacher's file changes between the driver's look and the workers': theirs is another cache."""
    write_teacher(tmp_path / "teacher.safetensors")
    teacher = recipe(made, tmp_path).teacher.model_copy(update={"weights": str(tmp_path / "teacher.safetensors")})

    def exchange() -> None:
        until(lambda: (tmp_path / "cache" / "zarr.json").exists())
        write_teacher(tmp_path / "teacher.safetensors", seed=1)

    with meanwhile(exchange), pytest.raises(CacheMismatch, match=r"teacher\.weights_sha256"):
        cache_teacher.run(recipe(made, tmp_path, teacher=teacher))


@pytest.mark.parametrize(
    ("error", "ends_run"), [(CacheMismatch("another cache"), True), (LoaderKilled("a loader worker was killed"), False)]
)
def test_a_killed_loader_worker_replaces_the_cache_worker_and_ends_no_run(error: Exception, ends_run: bool) -> None:
    class Job:
        def run(self, *_: Any) -> None:
            raise error

    job: Any = Job()
    worker, unit = CacheWorker(), UnitId("shard-000000.tar", 0, 1)
    promise = worker._promised[unit] = Future()
    worker._work(job, cast(Any, nullcontext()))
    if ends_run:  # the driver raises an answer, and replaces the worker of an exception
        assert promise.result() is error is worker.compute(unit)
    else:
        with pytest.raises(LoaderKilled):
            promise.result()
        with pytest.raises(LoaderKilled):
            worker.compute(unit)
