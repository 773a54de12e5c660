"""The same views for any workers and order, one decode per image, and errors that reach the main process."""

import errno
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinymim.configs.errors import LoaderKilled, UserError
from tinymim.configs.sections.loader import LoaderConfig, OrderConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.views import ViewConfig
from tinymim.pipeline import dataset, loader
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.decode import decode, pixel_digest
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import Items, view_batches
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews, View, view_key
from tinymim.tests.pipeline.plans import training_batches

SEED = 3


def image_views(folder: Path) -> ImageViews:
    return ImageViews(
        open_shards(SourceConfig(shards=folder)).shards, RandomViews(ViewConfig(size=32, seed=SEED)), SEED
    )


def by_view(loaded: list[ViewBatch]) -> dict[tuple[str, int], tuple[View, int, int, int]]:
    """(key, view) -> box, digest, label, identity."""
    return {
        (key, int(item[2])): (view, int(digest), int(label), int(identity))
        for batch in loaded
        for key, item, view, digest, label, identity in zip(
            batch.keys, batch.items, batch.views, batch.digests(), batch.labels, batch.view_keys, strict=True
        )
    }


def tar_order(views: ImageViews, images_per_batch: int) -> list[Items]:
    counts = [shard.num_samples for shard in views.shards]
    return [plan for unit, n in enumerate(counts) for plan in view_batches(unit, n, (0, 1), images_per_batch)]


@pytest.fixture(scope="module")
def reference(drawn_shards: Path) -> dict[tuple[str, int], tuple[View, int, int, int]]:
    views = image_views(drawn_shards)
    return by_view(list(batches(views, tar_order(views, 8), LoaderConfig(workers=0))))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # four workers on two cores
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_workers_and_batch_size_change_nothing(
    workers: int, drawn_shards: Path, reference: dict[tuple[str, int], tuple[View, int, int, int]]
) -> None:
    views = image_views(drawn_shards)
    plan = tar_order(views, 5)
    loaded = list(batches(views, plan, LoaderConfig(workers=workers, prefetch=1)))
    assert len(loaded) == len(plan)
    for batch, items in zip(loaded, plan, strict=True):  # in the plan's order
        np.testing.assert_array_equal(batch.items, items)
        assert batch.pixels.shape == (len(items), 3, 32, 32) and batch.pixels.dtype == torch.uint8
    assert by_view(loaded) == reference and len(reference) == 120


def test_the_order_of_items_changes_nothing(
    drawn_shards: Path, reference: dict[tuple[str, int], tuple[View, int, int, int]]
) -> None:
    views = image_views(drawn_shards)
    counts = [shard.num_samples for shard in views.shards]
    plan = training_batches(counts, OrderConfig(shuffle_units=3), 7, 2, 0, 16)  # epochs of both views
    found = by_view(list(batches(views, plan, LoaderConfig(workers=0))))
    assert found == {name: reference[name] for name in found} and len(found) == 112


def test_boxes_and_identities_are_the_laws(
    drawn_shards: Path, reference: dict[tuple[str, int], tuple[View, int, int, int]]
) -> None:
    law = RandomViews(ViewConfig(size=32, seed=SEED))
    for (key, index), (view, _, _, identity) in reference.items():
        assert view == law(key, index, 80, 80) and identity == view_key(SEED, key, index)


def test_one_decode_per_image_when_its_views_are_adjacent(drawn_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(data: bytes, *how: int) -> torch.Tensor:
        calls.append(len(data))
        return decode(data, *how)

    monkeypatch.setattr(dataset, "decode", counted)
    views = image_views(drawn_shards)
    monkeypatch.setattr(views.law, "scaled_decode", False)  # otherwise one decode per size
    [batch] = batches(views, view_batches(2, 10, (0, 1, 2), 10), LoaderConfig(workers=0))
    assert len(batch.keys) == 30 and len(calls) == 10


def test_unreadable_images_are_left_out_and_listed(drawn_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = image_views(drawn_shards)
    broken = views.shards[2].read(1)
    monkeypatch.setattr(dataset, "decode", lambda data, *how: decode(b"?" if data == broken else data, *how))
    plan = np.array([[2, 0, 0], [2, 1, 0], [2, 1, 1], [2, 2, 0]])
    batch = views.batch(plan)
    key = views.shards[2].members().keys[1]
    assert [name for name, _ in batch.unreadable] == [key] and "cannot be decoded" in batch.unreadable[0][1]
    assert batch.items.tolist() == [[2, 0, 0], [2, 2, 0]] and len(batch.pixels) == len(batch.labels) == 2
    assert [pixel_digest(view) for view in batch.pixels] == batch.digests().tolist()
    nothing = views.batch(plan[1:3])
    assert nothing.keys == [] and nothing.pixels.shape == (0, 3, 32, 32) and nothing.items.shape == (0, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_keep_their_kind_and_fields(workers: int, drawn_shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(drawn_shards, tmp_path / "copied"))
    views = image_views(folder)
    views.shards[0].path.unlink()
    with pytest.raises(UserError) as caught:
        list(batches(views, tar_order(views, 50)[:1], LoaderConfig(workers=workers)))
    assert type(caught.value) is UserError
    assert caught.value.what == f"shard {views.shards[0].name} cannot be read any more"
    assert caught.value.hint == "restore it and run the same command again"


def test_workers_leave_the_global_generator_alone(drawn_shards: Path) -> None:
    views = image_views(drawn_shards)
    before = torch.get_rng_state()
    list(batches(views, tar_order(views, 50)[:1], LoaderConfig(workers=1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sigterm_to_all_processes_costs_no_batch(drawn_shards: Path) -> None:
    views = image_views(drawn_shards)
    plan = tar_order(views, 2)
    before = set(multiprocessing.active_children())  # of tests whose generators are not collected yet
    stream = batches(views, plan, LoaderConfig(workers=1, prefetch=1))
    loaded = [next(stream)]
    (worker,) = [child for child in multiprocessing.active_children() if child.daemon and child not in before]
    os.kill(worker.pid or 0, signal.SIGTERM)
    loaded += stream
    assert [batch.items.tolist() for batch in loaded] == [items.tolist() for items in plan] and len(plan) == 31
    stream.close()
    assert not worker.is_alive()  # ended by the loader


KILLED = """
import multiprocessing, os, signal, sys
from pathlib import Path
from tinymim.configs.sections.loader import LoaderConfig
from tinymim.pipeline.loader import batches
from tinymim.tests.pipeline.test_loader import image_views, tar_order

if __name__ == "__main__":
    views = image_views(Path(sys.argv[1]))
    stream = batches(views, tar_order(views, 2), LoaderConfig(workers=1))
    next(stream)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow  # imports torch twice, in a process and in its fork server
def test_no_worker_outlives_a_killed_training(drawn_shards: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    with subprocess.Popen([sys.executable, "-P", script, drawn_shards], stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout is not None
        worker = int(training.stdout.readline())
        assert training.wait(60) == -signal.SIGKILL
    deadline_s = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


CROWDED = """
import sys
from pathlib import Path
from tinymim.configs.errors import UserError
from tinymim.configs.sections.loader import LoaderConfig
from tinymim.pipeline.loader import batches
from tinymim.tests.pipeline.test_loader import image_views, tar_order
if __name__ == "__main__":
    views = image_views(Path(sys.argv[1]))
    try:
        list(batches(views, tar_order(views, 60), LoaderConfig(workers=1)))
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("size", "what"),
    [
        ("64k", "a loader worker found no shared memory for a batch"),  # torch loses such a batch and waits for it
        ("4k", "no loader worker can be started"),  # not even its semaphores fit
    ],
)
def test_a_small_shared_memory_is_named_and_nothing_waits(
    size: str, what: str, drawn_shards: Path, tmp_path: Path
) -> None:
    """Containers have 64 MB unless told otherwise."""
    (tmp_path / "crowded.py").write_text(CROWDED)
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces")
    command = f"{mount} && exec {sys.executable} {tmp_path}/crowded.py {drawn_shards}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.startswith(what), done.stderr
    assert "--shm-size" in done.stdout


class Ended:
    """A loader worker with this exit code."""

    def __init__(self, exitcode: int | None) -> None:
        self.exitcode, self.pid = exitcode, 77
        self.sentinel, self._open = os.pipe()
        if exitcode is not None:
            os.close(self._open)


@pytest.mark.parametrize(
    ("code", "named"),
    [
        (-signal.SIGKILL, r"killed by SIGKILL\n.*worker 2 of 2, process 77\n.*memory is short"),
        (-signal.SIGBUS, r"killed by SIGBUS\n.*\n.*--shm-size"),
        (255, "killed by the end of its fork server"),
    ],
)
def test_the_signal_that_ended_a_worker_decides_what_is_named(code: int, named: str) -> None:
    workers: list[Any] = [Ended(None), Ended(code)]
    assert re.search(named, str(loader._killed(workers)))


@pytest.mark.parametrize("code", [None, 0, 1])
def test_a_worker_that_ends_by_itself_was_not_killed(code: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_END_KNOWN_S", 0.1)
    workers: list[Any] = [Ended(code)]
    assert loader._killed(workers) is None


def test_too_many_open_files_are_not_too_little_shared_memory() -> None:
    for error in (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), RuntimeError("... : Too many open files (24)")):
        assert "ulimit -n" in str(loader._no_room("no", error)) and "shm" not in str(loader._no_room("no", error))


@pytest.mark.parametrize("lost", [ConnectionResetError(104, "Connection reset by peer"), EOFError(), RuntimeError("x")])
def test_a_connection_that_a_killed_worker_loses_is_its_killing(
    lost: Exception, drawn_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies while it hands over a batch breaks the connection before anybody knows that it died."""
    views, before = image_views(drawn_shards), set(multiprocessing.active_children())
    stream = batches(views, tar_order(views, 2), LoaderConfig(workers=1, prefetch=1))
    next(stream)
    (worker,) = [child for child in multiprocessing.active_children() if child.daemon and child not in before]

    def reset(_loader: object, timeout: float = 0) -> tuple[bool, object]:
        os.kill(worker.pid or 0, signal.SIGKILL)
        raise lost

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data", reset)
    with pytest.raises(LoaderKilled, match="killed by SIGKILL") as caught:
        list(stream)
    assert caught.value.__cause__ is lost
