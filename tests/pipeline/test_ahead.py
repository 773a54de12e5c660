"""Reading ahead of a plan: equal batches, early downloads, and never more than the budget."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch

from tinymim.configs.errors import RecipeError, StoreError
from tinymim.configs.sections.loader import LoaderConfig, OrderConfig
from tinymim.configs.sections.source import SourceConfig, SpoolConfig
from tinymim.configs.sections.views import ViewConfig
from tinymim.pipeline import ahead
from tinymim.pipeline.ahead import spooling
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import Items, SampleOrder, view_batches
from tinymim.pipeline.shards import ShardSet, open_shards
from tinymim.pipeline.spool import SpooledTar
from tinymim.pipeline.views import RandomViews
from tinymim.stages import make_shards
from tinymim.tests import s3_server
from tinymim.tests.s3_server import Log

HERE = LoaderConfig(workers=0)


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of four images."""
    folder = tmp_path_factory.mktemp("six") / "shards"
    make_shards.run("drawn", folder, make_shards.Options(count=24, images_per_shard=4))
    return folder


def remote(folder: Path, spool: Path, num_shards: float = 6) -> ShardSet:
    """The shards in S3, with room for `num_shards` of the largest ones."""
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    config = SpoolConfig(folder=spool, gib=num_shards * largest / 2**30)
    return open_shards(SourceConfig(shards=f"s3://{s3_server.BUCKET}{folder}", spool=config))


def views(source: ShardSet) -> ImageViews:
    return ImageViews(source.shards, RandomViews(ViewConfig(size=32)), 0)


def in_order(source: ShardSet, order: list[int]) -> Iterator[Items]:
    """Two batches a shard."""
    return itertools.chain.from_iterable(view_batches(number, 4, (0,), 2) for number in order)


def spooled(source: ShardSet) -> list[int]:
    return [
        n for n, each in enumerate(source.shards) if isinstance(each.place, SpooledTar) and each.place.path.exists()
    ]


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it does not come true")


@pytest.mark.parametrize("workers", [0, 2])
def test_spooling_changes_no_batch(six: Path, tmp_path: Path, s3: Log, workers: int) -> None:
    local, far = open_shards(SourceConfig(shards=six)), remote(six, tmp_path, 4)
    order = SampleOrder(local.counts, OrderConfig(shuffle_units=2, views_per_decode=2, views_per_epoch=2), 4, None)
    plan = list(order.plan(24))
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # workers see the environment of this test
    ours = batches(views(far), iter(plan), LoaderConfig(workers=workers), batches_per_entry=2)
    theirs = batches(views(local), iter(plan), HERE, batches_per_entry=2)
    largest = 0
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.pixels, other.pixels) and mine.keys == other.keys
        assert np.array_equal(mine.items, other.items)
        with suppress(FileNotFoundError):  # a download that has ended since it was listed
            largest = max(largest, sum(path.stat().st_size for path in tmp_path.glob("*.tar*")))
    assert 0 < largest <= 4 * max(shard.size_bytes for shard in far.shards)
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def test_the_next_shards_are_there_before_their_need(six: Path, tmp_path: Path, s3: Log) -> None:
    source = remote(six, tmp_path, 3)
    order = [4, 1, 5, 0, 2, 3]
    with closing(batches(views(source), in_order(source, order), HERE)) as stream:
        next(stream)
        until(lambda: spooled(source) == [1, 4, 5])  # all that the budget allows
        time.sleep(0.05)
        assert {get.key.rpartition("/")[2] for get in s3.of(".tar")} == {source.shards[n].name for n in (4, 1, 5)}
        next(stream)
        next(stream)  # the first of shard 1: shard 4 is no longer needed and makes room
        until(lambda: spooled(source) == [0, 1, 5])
        s3.clear()
        list(stream)
    assert len(s3.of(".tar")) == 2  # no shard was downloaded twice


def test_a_plan_that_must_not_be_read_ahead_is_not(six: Path, tmp_path: Path, s3: Log) -> None:
    source = remote(six, tmp_path)
    asked = []

    def plan() -> Iterator[Items]:
        for number, items in enumerate(in_order(source, [0, 1, 2])):
            asked.append(number)
            yield items

    with closing(batches(views(source), plan(), HERE, look_ahead=False)) as stream:
        for number in range(4):
            next(stream)
            assert asked == list(range(number + 1))


def test_a_plan_is_read_ahead_within_bounds(
    six: Path, tmp_path: Path, s3: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "LOOK_ITEMS", 20)
    source = remote(six, tmp_path)
    asked = []

    def plan() -> Iterator[Items]:
        for number, items in enumerate(in_order(source, [0, 1] * 500)):
            asked.append(number)
            yield items

    with closing(batches(views(source), plan(), HERE)) as stream:
        for _ in range(100):
            next(stream)
        assert 100 < len(asked) < 100 + 20 / 2 + ahead._LOOK_ENTRIES + 2


def test_local_shards_need_no_thread(six: Path) -> None:
    source = open_shards(SourceConfig(shards=six))
    plan = in_order(source, [0])
    with spooling(source.shards, plan, True) as (followed, done):
        assert followed is plan
        done()


def test_a_store_that_fails_is_raised_where_its_shard_is_needed(six: Path, tmp_path: Path, s3: Log) -> None:
    source = remote(six, tmp_path)
    s3.fault = lambda number, get: "403" if get.key.endswith(source.shards[1].name) else None
    with closing(batches(views(source), in_order(source, [0, 1]), HERE)) as stream:
        next(stream)
        next(stream)
        with pytest.raises(StoreError, match="refuses access"):
            next(stream)


def test_a_batch_of_more_shards_than_the_spool_holds_is_refused_before_it_comes(
    six: Path, tmp_path: Path, s3: Log
) -> None:
    source = remote(six, tmp_path, 2)
    items = np.array([[shard, 0, 0] for shard in range(4)], dtype=np.int64)
    with pytest.raises(RecipeError, match=r"source\.spool\.gib is less than the 4 shards of one batch") as caught:
        next(batches(views(source), [*in_order(source, [0]), items], HERE))
    assert caught.value.got and caught.value.expected and caught.value.hint


def test_nobody_evicts_what_is_begun(six: Path, tmp_path: Path, s3: Log) -> None:
    source, others = remote(six, tmp_path, 2), remote(six, tmp_path, 2)
    with closing(batches(views(source), in_order(source, [0, 0, 0]), HERE)) as stream:
        next(stream)
        time.sleep(0.3)  # until it is held
        for number in (1, 2, 3, 4):
            others.shards[number].read(0)
            assert spooled(source) == [0, number]
        next(stream)
    until(lambda: bool(others.shards[1].read(0) and others.shards[2].read(0)) and spooled(source) == [1, 2])
