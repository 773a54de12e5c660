"""Stage one in one process: batches of any size, threads behind the teacher, failures, signals, numbers."""

import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinymim import cli
from tinymim.configs.errors import RecipeError, SourceError, UnitsFailed, UserError
from tinymim.configs.load import dump_recipe
from tinymim.pipeline import dataset
from tinymim.stages import cache_teacher
from tinymim.stages.run.folder import read_metrics
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.units import batch_size, draft
from tinymim.stages.units.fill import fill
from tinymim.stages.units.prepare import prepare
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.reader import CacheReader
from tinymim.storage.writer import UnitDraft, UnitTaken
from tinymim.tests.stages.tiny import STATED, cache_recipe, tree, write_set

SHARDS, IMAGES = 5, 7


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a teacher, and the caches, one with audits, that a process makes of them, eight images at a time."""
    root = write_set(tmp_path_factory.mktemp("job"), IMAGES * SHARDS, IMAGES)
    cache_teacher.run(recipe(root, root))
    cache_teacher.run(recipe(root, root, cache=root / "audited", audit_views=4))
    return root


def recipe(made: Path, folder: Path, **changes: Any) -> Any:
    run = {"folder": folder / "run", "device": "cpu", "threads": 1}
    return cache_recipe(made, **{"cache": folder / "cache", "run": run} | changes)


def broken(made: Path, folder: Path, *numbers: int) -> dict[str, Any]:
    """A copy of the source in which these shards are no tars; the index does not know."""
    shutil.copytree(made / "shards", folder / "shards")
    for number in numbers:
        path = folder / "shards" / f"shard-{number:06d}.tar"
        path.write_bytes(b"no tar" + bytes(path.stat().st_size - 6))
    return {"shards": folder / "shards"}


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 1},
        {"batch_size": 3},
        {"batch_size": "auto"},
        {"batch_size": 3, "loader": {"workers": 2, "prefetch": 2}},
        {"views_per_decode": 1},
    ],
)
def test_neither_batches_nor_loaders_change_a_byte(made: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    cache_teacher.run(recipe(made, tmp_path, audit_views=4, **changes))
    assert tree(tmp_path / "cache") == tree(made / "audited")


def test_ray_is_not_imported_without_a_cluster(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "tinymim.stages.units.crew", None)
    cache_teacher.run(recipe(made, tmp_path))


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_that_fail_are_listed_and_the_others_are_made(
    made: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"source": broken(made, tmp_path, 1, 3), "retries": 1, "loader": {"workers": workers}}
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(made, tmp_path, **changes)))
    assert cli.run_command(["cache-teacher", str(tmp_path / "recipe.yaml")]) == 3
    err = capsys.readouterr().err
    assert "2 unit(s) of" in err and "\n  shard-000001.tar v0-1: " in err and "\n  shard-000003.tar v0-1: " in err
    for number in (1, 3):
        assert [f"shard-00000{number}.tar v0-1 failed, {then}" in err for then in ("to be tried again", "given up")]
    assert [info.unit.shard for info in CacheReader(tmp_path / "cache").units()] == [
        f"shard-00000{number}.tar" for number in (0, 2, 4)
    ]
    assert not list((tmp_path / "cache" / "leases").rglob("*.json"))
    cache_teacher.run(recipe(made, tmp_path))  # the same cache, with the shards mended
    assert tree(tmp_path / "cache") == tree(made / "cache")


def test_a_failure_that_passes_is_made_good(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render, fails = dataset.render_items, iter([False, True, False, True])

    def sometimes(*args: Any) -> Any:
        if next(fails, False):
            raise SourceError("a network file system is away")
        return render(*args)

    monkeypatch.setattr("tinymim.pipeline.dataset.render_items", sometimes)
    cache_teacher.run(recipe(made, tmp_path))
    assert tree(tmp_path / "cache") == tree(made / "cache")


def test_a_teacher_that_overflows_is_refused_behind_the_device_and_nothing_is_committed(
    made: Path, tmp_path: Path
) -> None:
    tensors = load_file(made / "teacher.safetensors")
    tensors["blocks.1.attn.qkv.weight"][0, 0] = float("inf")
    save_file(tensors, tmp_path / "broken.safetensors", STATED)
    teacher = recipe(made, tmp_path).teacher.model_copy(update={"weights": str(tmp_path / "broken.safetensors")})
    with pytest.raises(RecipeError, match="the teacher's tensors are not finite"):
        cache_teacher.run(recipe(made, tmp_path, teacher=teacher))
    assert not list((tmp_path / "cache").rglob("v*.json"))


def test_a_full_disk_ends_the_run_at_once(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def full(self: UnitDraft, *_: Any) -> None:
        calls.append(self.unit)
        raise UserError("cannot write the cache: no space left on device")

    monkeypatch.setattr(UnitDraft, "add", full)
    with pytest.raises(UserError, match="no space left"):
        cache_teacher.run(recipe(made, tmp_path, batch_size=2))
    assert len(calls) == 1
    assert not list((tmp_path / "cache" / "leases").rglob("*.json"))


@pytest.mark.parametrize(("number", "requeue"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_stopped_job_commits_what_is_whole_and_says_whether_to_come_back(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, requeue: bool
) -> None:
    encode, calls = draft.encode, iter(range(100))

    def stop_in_the_third_unit(*args: Any) -> Any:
        if next(calls) == 2:
            os.kill(os.getpid(), number)
        return encode(*args)

    monkeypatch.setattr("tinymim.stages.units.job.encode", stop_in_the_third_unit)
    with pytest.raises(Interrupted) as caught:
        cache_teacher.run(recipe(made, tmp_path, audit_views=4))
    assert caught.value.requeue is requeue
    # The third is whole as well: its only batch was at hand.
    assert len(CacheReader(tmp_path / "cache").units()) == 3
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]
    monkeypatch.undo()
    cache_teacher.run(recipe(made, tmp_path, audit_views=4))
    assert tree(tmp_path / "cache") == tree(made / "audited")


def test_sigterm_is_exit_code_75(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tinymim.stages.cache_teacher.run", lambda _: (_ for _ in ()).throw(Interrupted("stopped", requeue=True))
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(made, tmp_path)))
    assert cli.run_command(["cache-teacher", str(tmp_path / "recipe.yaml")]) == 75


def test_progress_says_units_rates_gib_and_what_limits(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tinymim.stages.run.progress._PLAIN_EVERY_S", 0.0)
    cache_teacher.run(recipe(made, tmp_path, audit_views=4))
    shares = r"start \d+ % decode \d+ % teacher \d+ % encode \d+ % audit \d+ % write \d+ %"
    line = rf"cache-teacher: 70/70 views, [\d.]+/s, ETA 0m00s 5/5 units, [\d.]+ images/s, 0\.00 GiB, {shares}"
    assert re.search(line, capsys.readouterr().err)
    lines = read_metrics(tmp_path / "run")
    assert [line["units_left"] for line in lines] == [4, 3, 2, 1, 0]
    assert sum(line["records"] for line in lines) == 2 * SHARDS * IMAGES
    reader = CacheReader(tmp_path / "cache")
    stored = sum(info.size_bytes for layer in (VIEWS, *reader.layers) for info in reader.units(layer))
    assert lines[-1]["gib_written"] == pytest.approx(stored / 2**30)
    phases = ("start", "decode", "teacher", "encode", "audit", "write")
    assert 0.1 < sum(lines[-1][f"{phase}_share"] for phase in phases) <= 1.01


# ---------------------------------------------------------------- batch_size: auto


@pytest.mark.parametrize(("fitting_views", "images"), [(2, 1), (9, 4), (10**9, 8)])
def test_the_batch_is_the_largest_power_of_two_that_fits(
    made: Path, monkeypatch: pytest.MonkeyPatch, fitting_views: int, images: int
) -> None:
    tried: list[int] = []

    def fits(_teacher: object, _codec: object, views: int, *_: object) -> bool:
        tried.append(views)
        return views <= fitting_views

    monkeypatch.setattr(batch_size, "_fits", fits)
    auto = recipe(made, made, batch_size="auto")
    nobody: Any = None
    found = batch_size.find_images_per_batch(nobody, nobody, auto, IMAGES, torch.device("cuda"))
    assert found == images and tried == sorted(tried)


def test_the_loader_bounds_the_batch_by_the_machines_memory(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody: Any = None
    views_bytes = 2 * 3 * 32 * 32  # of an image
    monkeypatch.setattr(batch_size, "_free_host_bytes", lambda: 4.0 * (2 * 4 + 2) * views_bytes * 5)
    auto = recipe(made, made, batch_size="auto", loader={"workers": 2, "prefetch": 4})
    assert batch_size.find_images_per_batch(nobody, nobody, auto, 1000, torch.device("cpu")) == 4
    monkeypatch.undo()
    assert batch_size.find_images_per_batch(nobody, nobody, auto, 1000, torch.device("cpu")) == 32


@pytest.mark.gpu
def test_a_batch_is_found_on_a_gpu(made: Path, tmp_path: Path) -> None:
    run = {"folder": tmp_path / "run", "device": "cuda"}
    cache_teacher.run(recipe(made, tmp_path, batch_size="auto", run=run))
    assert len(CacheReader(tmp_path / "cache").units()) == SHARDS


# ---------------------------------------------------------------- writing beside the claims


def test_three_units_of_a_shard_are_claimed_and_written_side_by_side(made: Path, tmp_path: Path) -> None:
    """One is claimed while the one before is written; all must be there in the end, under one lease."""
    cut_like = [UnitId(f"shard-00000{number}.tar", 1, 1) for number in range(SHARDS)]
    wanted = recipe(made, tmp_path, num_views=3, loader={"workers": 1, "prefetch": 8})
    fill(wanted, prepare(wanted), cut_like)
    assert len(CacheReader(tmp_path / "cache").units()) == 3 * SHARDS
    assert not list((tmp_path / "cache" / "leases").rglob("*.json"))


def test_what_is_taken_over_is_dropped_and_not_tried_again(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another job commits a unit while this one computes it."""
    add = UnitDraft.add
    taken: list[UnitId] = []

    def late(self: UnitDraft, arrays: Any) -> None:
        if not taken:
            taken.append(self.unit)
            for part in ("views", "layers"):
                places = made / "cache" / part, tmp_path / "cache" / part
                shutil.copytree(*places, dirs_exist_ok=True, ignore=others(self.unit))
            raise UnitTaken(f"unit {self.unit} is another writer's")
        add(self, arrays)

    monkeypatch.setattr(UnitDraft, "add", late)
    cache_teacher.run(recipe(made, tmp_path, views_per_decode=1))
    assert "what was computed of it is dropped" in capsys.readouterr().err
    assert tree(tmp_path / "cache") == tree(made / "cache")
    assert len(read_metrics(tmp_path / "run")) == SHARDS - 1


def others(unit: UnitId) -> Any:
    """For copytree: the shards that are not the unit's, and the descriptions, which the job reads meanwhile."""
    own = unit.shard.removesuffix(".tar")
    return lambda _folder, names: [n for n in names if n == "zarr.json" or (n.startswith("shard-") and n != own)]


def test_units_failed_is_no_success(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UnitsFailed, match=r"5 unit\(s\)") as caught:
        cache_teacher.run(recipe(made, tmp_path, source=broken(made, tmp_path, *range(SHARDS)), retries=0))
    assert caught.value.exit_code == 3
