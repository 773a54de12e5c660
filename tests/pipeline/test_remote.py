"""Shards in an object store: how many requests, how much memory, and every way a store can fail."""

import json
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinymim.configs.errors import RecipeError, StoreError, UserError
from tinymim.configs.load import dump_recipe, load_recipe
from tinymim.configs.sections import SourceConfig, ViewConfig
from tinymim.pipeline import remote, remote_members
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.remote import BlockReader, RemoteObject
from tinymim.pipeline.shards import INDEX_NAME, Shard, ShardSet, open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.storage import objects
from tinymim.tests import s3_server
from tinymim.tests.s3_server import Log

BLOCK = 16 * 1024
SHIPPED = Path("tinyimagenet40-mae")
UseReader = Callable[..., BlockReader]


@pytest.fixture
def use_reader(monkeypatch: pytest.MonkeyPatch) -> UseReader:
    """Puts a fresh reader with small blocks in the place of this process's."""

    def put(block_bytes: int = BLOCK, ahead_blocks: int = 4, budget_bytes: int = 10**9) -> BlockReader:
        reader = BlockReader(block_bytes, ahead_blocks, budget_bytes)
        monkeypatch.setattr(remote, "_reader", (os.getpid(), reader))
        return reader

    return put


@pytest.fixture
def source(drawn_shards: Path, s3: Log, use_reader: UseReader) -> ShardSet:
    """The drawn shards in S3, their members known; the log is empty and so is the reader."""
    use_reader()
    shards = open_at(drawn_shards)
    for shard in shards.shards:
        shard.members()
    s3.clear()
    use_reader()
    return shards


def open_at(folder: Path) -> ShardSet:
    return open_shards(SourceConfig(shards=f"s3://{s3_server.BUCKET}{folder}"))


def local_bytes(folder: Path) -> list[list[bytes]]:
    return [[s.read(i) for i in range(s.num_samples)] for s in open_shards(SourceConfig(shards=folder)).shards]


def place(shard: Shard) -> RemoteObject:
    assert isinstance(shard.place, RemoteObject)
    return shard.place


# ---------------------------------------------------------------- requests


def test_a_pass_makes_one_request_per_block(drawn_shards: Path, s3: Log, source: ShardSet) -> None:
    for shard, wanted in zip(source.shards, local_bytes(drawn_shards), strict=True):
        assert [shard.read(i) for i in range(shard.num_samples)] == wanted
        gets = s3.of(shard.name)
        assert len(gets) <= ceil(shard.size_bytes / BLOCK)
        starts = [get.start for get in gets]
        assert len(set(starts)) == len(starts) and all(start % BLOCK == 0 for start in starts)
        assert max(abs(i - start // BLOCK) for i, start in enumerate(starts)) < remote.REQUESTS  # nearly in order


def test_requests_overlap_with_each_other_and_the_reader(s3: Log, source: ShardSet, use_reader: UseReader) -> None:
    s3.latency_s = 0.02
    try:
        shard = source.shards[0]
        for i in range(shard.num_samples):
            shard.read(i)
        assert 1 < max(get.open_gets for get in s3.gets) <= remote.REQUESTS
        s3.clear()
        reader = use_reader(ahead_blocks=0)
        for i in range(shard.num_samples):
            shard.read(i)
        assert max(get.open_gets for get in s3.gets) <= 2 and reader.held_bytes > 0  # 2: a sample in two blocks
    finally:
        s3.latency_s = 0.0


def test_members_are_found_in_one_pass_and_kept(drawn_shards: Path, s3: Log, own_cache: Path) -> None:
    wanted = [s.members().keys for s in open_shards(SourceConfig(shards=drawn_shards)).shards]
    assert [s.members().keys for s in open_at(drawn_shards).shards] == wanted
    assert sum(get.end - get.start for get in s3.of(".tar")) == sum(s.size_bytes for s in open_at(drawn_shards).shards)
    s3.clear()
    assert [s.members().keys for s in open_at(drawn_shards).shards] == wanted  # as in another process
    assert s3.of(".tar") == []
    kept = sorted(remote_members.kept_folder().glob("*.json"))
    assert len(kept) == 3 and kept[0].is_relative_to(own_cache)
    kept[0].write_text("{")
    kept[1].write_text("[]")
    assert [s.members().keys for s in open_at(drawn_shards).shards] == wanted
    for path in kept:
        assert json.loads(path.read_text())["version"] == 1


def test_a_home_that_cannot_be_written_costs_nothing_but_time(
    drawn_shards: Path, s3: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [len(s.members().keys) for s in open_at(drawn_shards).shards] == [25, 25, 10]


def test_without_an_index_every_shard_is_streamed_once_and_it_is_said(
    drawn_shards: Path, tmp_path: Path, s3: Log, use_reader: UseReader, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in drawn_shards.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    indexed = open_shards(SourceConfig(shards=drawn_shards)).shards
    use_reader(budget_bytes=8 * BLOCK)
    found = open_at(tmp_path).shards
    assert [(s.name, s.size_bytes, s.num_samples, s.content_hash) for s in found] == [
        (s.name, s.size_bytes, s.num_samples, s.content_hash) for s in indexed
    ]
    assert "index.json does not know 3 of 3 shards" in capsys.readouterr().err
    assert sum(get.end - get.start for get in s3.of(".tar")) == sum(s.size_bytes for s in indexed)
    s3.clear()
    assert [s.content_hash for s in open_at(tmp_path).shards] == [s.content_hash for s in indexed]
    assert s3.of(".tar") == []


def shuffled_reads(source: ShardSet, wanted: list[list[bytes]], seed: int = 0) -> None:
    pairs = [(unit, sample) for unit, shard in enumerate(source.shards) for sample in range(shard.num_samples)]
    for row in np.random.default_rng(seed).permutation(len(pairs)):
        unit, sample = pairs[int(row)]
        assert source.shards[unit].read(sample) == wanted[unit][sample]


def whole_blocks(log: Log, source: ShardSet) -> list[tuple[str, int]]:
    """Key and start of the requests for whole blocks."""
    sizes = {shard.name: shard.size_bytes for shard in source.shards}
    return [
        (get.key, get.start)
        for get in log.gets
        if get.start % BLOCK == 0 and get.end == min(get.start + BLOCK, sizes[Path(get.key).name])
    ]


def test_shuffled_reads_fetch_every_block_once_where_the_group_fits(
    drawn_shards: Path, s3: Log, source: ShardSet
) -> None:
    wanted = local_bytes(drawn_shards)
    for seed in range(2):
        shuffled_reads(source, wanted, seed)
    blocks = whole_blocks(s3, source)
    assert len(set(blocks)) == len(blocks) <= sum(ceil(shard.size_bytes / BLOCK) for shard in source.shards)
    assert len(s3.gets) <= len(blocks) + 3 * 8  # the first reads do not know yet


def test_shuffled_reads_fetch_just_their_bytes_where_it_does_not(
    drawn_shards: Path, s3: Log, source: ShardSet, use_reader: UseReader
) -> None:
    use_reader(block_bytes=32 * 1024, budget_bytes=150_000)
    shuffled_reads(source, local_bytes(drawn_shards), seed=0)
    shuffled_reads(source, local_bytes(drawn_shards), seed=1)
    fetched = sum(get.end - get.start for get in s3.gets)
    needed = 2 * sum(int(shard.members().sizes.sum()) for shard in source.shards)
    assert fetched < 1.6 * needed  # the first reads do not know yet; whole blocks would be six times as much
    sizes = {int(size) for shard in source.shards for size in shard.members().sizes}
    assert sum(get.end - get.start in sizes for get in s3.gets) > 60


def test_a_worker_that_takes_every_fourth_batch_does_not_fetch_the_others(
    s3: Log, source: ShardSet, use_reader: UseReader, drawn_shards: Path
) -> None:
    use_reader(block_bytes=2048)
    shard, wanted = source.shards[0], local_bytes(drawn_shards)[0]
    for start in range(3, shard.num_samples, 12):
        assert [shard.read(i) for i in range(start, min(start + 3, 25))] == wanted[start : start + 3]
    fetched = sum(get.end - get.start for get in s3.gets)
    assert fetched < shard.size_bytes / 2


@pytest.mark.parametrize("budget", [0, 3 * BLOCK, 6 * BLOCK])
def test_the_budget_is_kept(drawn_shards: Path, source: ShardSet, use_reader: UseReader, budget: int) -> None:
    reader, wanted = use_reader(budget_bytes=budget), local_bytes(drawn_shards)
    held = 0
    for unit, shard in enumerate(source.shards):
        for sample in range(shard.num_samples):
            assert shard.read(sample) == wanted[unit][sample]
            held = max(held, reader.held_bytes)
    shuffled_reads(source, wanted)
    assert max(held, reader.held_bytes) <= budget
    assert reader.held_bytes == sum(len(future.result()) for future in reader._blocks.values())


@pytest.mark.parametrize("block", [1, 7, 512, 5000, 10**7])
def test_ranges_of_any_size_at_any_place(source: ShardSet, drawn_shards: Path, block: int) -> None:
    shard = source.shards[2]
    data = (drawn_shards / shard.name).read_bytes()
    reader = BlockReader(block, 4, 10**6)
    rng = np.random.default_rng(block)
    for _ in range(60):
        offset, size = int(rng.integers(0, len(data) + 10)), int(rng.integers(0, 40 if block < 512 else 9000))
        assert reader.read(place(shard), offset, size) == data[offset : offset + size]


def test_threads_share_a_reader(drawn_shards: Path, s3: Log, source: ShardSet, use_reader: UseReader) -> None:
    wanted = local_bytes(drawn_shards)
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(shuffled_reads, source, wanted, seed) for seed in range(8)]:
            done.result()
    blocks = whole_blocks(s3, source)
    assert len(set(blocks)) == len(blocks) > 20
    use_reader(block_bytes=4096, budget_bytes=50_000)
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(shuffled_reads, source, wanted, seed) for seed in range(8)]:
            done.result()


def test_a_shard_is_pickled_without_its_store(source: ShardSet) -> None:
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source and copy.shards[0].read(3) == source.shards[0].read(3)
    assert len(pickle.dumps(source.shards[0])) < 1000


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", ["503", "cut", "short"])
def test_passing_faults_are_retried(drawn_shards: Path, s3: Log, source: ShardSet, fault: str) -> None:
    s3.fault = lambda number, get: fault if number in (0, 2) else None
    shard = source.shards[0]
    assert [shard.read(i) for i in range(shard.num_samples)] == local_bytes(drawn_shards)[0]


@pytest.mark.parametrize(("fault", "message"), [("403", "refuses access"), ("404", "does not exist")])
def test_refusals_are_errors_at_once(s3: Log, source: ShardSet, fault: str, message: str) -> None:
    s3.fault = lambda number, get: fault
    with pytest.raises(StoreError, match=message) as caught:
        source.shards[0].read(0)
    error = caught.value
    assert error.exit_code == 2 and error.hint and str(place(source.shards[0])) in error.what
    assert len(s3.gets) <= 2  # the block and the one ahead, each once
    s3.clear()
    assert source.shards[0].read(0)  # the failed block is not kept


@pytest.mark.parametrize(("fault", "message"), [("503", "be reached"), ("cut", "be reached"), ("short", "few")])
def test_lasting_faults_end_in_an_error(
    s3: Log, source: ShardSet, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    monkeypatch.setitem(objects.RETRIES, "max_retries", 2)
    objects._connect.cache_clear()
    s3.fault = lambda number, get: fault
    with pytest.raises(StoreError, match=message) as caught:
        BlockReader(BLOCK, 0).read(place(source.shards[0]), 0, 100)
    assert caught.value.hint and len(s3.gets) == 3
    objects._connect.cache_clear()


def test_a_store_that_fails_is_not_an_unreadable_image(s3: Log, source: ShardSet) -> None:
    s3.fault = lambda number, get: "403"
    views = ImageViews(source.shards, RandomViews(ViewConfig(size=32)))
    with pytest.raises(StoreError):
        views.batch(np.array([[0, 0, 0]], dtype=np.int64))


def test_an_object_that_was_replaced_is_refused(drawn_shards: Path, tmp_path: Path, s3: Log) -> None:
    for path in drawn_shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    source = open_at(tmp_path)
    shard = source.shards[0]
    reader = BlockReader(BLOCK, 0)
    reader.read(place(shard), 0, 10)
    data = bytearray((tmp_path / shard.name).read_bytes())
    data[-1] ^= 1
    (tmp_path / shard.name).write_bytes(data)  # of the same size
    with pytest.raises(StoreError, match="was replaced while it was being read"):
        reader.read(place(shard), 5 * BLOCK, 10)
    with pytest.raises(StoreError, match="was replaced"):
        source.shards[0].members()
    (tmp_path / shard.name).write_bytes(data[:-512])
    with pytest.raises(StoreError, match="was replaced"):
        reader.read(place(shard), 7 * BLOCK, 10)


def test_no_store_there(monkeypatch: pytest.MonkeyPatch, drawn_shards: Path, s3: Log) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_shards(SourceConfig(shards="file:///nowhere/at/all"))
    with pytest.raises(UserError, match=r"cannot be reached|does not exist|no shards match"):
        open_shards(SourceConfig(shards=f"s3://no-such-bucket{drawn_shards}"))
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(StoreError, match="cannot be reached") as caught:
        open_shards(SourceConfig(shards="az://container/prefix"))
    assert caught.value.hint and "environment" in caught.value.hint


# ---------------------------------------------------------------- URLs


def test_a_plain_web_server_with_an_index(
    drawn_shards: Path, s3_of_everything: tuple[str, Log], own_cache: Path
) -> None:
    url = f"{s3_of_everything[0]}/{s3_server.BUCKET}{drawn_shards}"
    ours, theirs = open_shards(SourceConfig(shards=url)), open_shards(SourceConfig(shards=drawn_shards))
    assert [s.content_hash for s in ours.shards] == [s.content_hash for s in theirs.shards]
    assert ours.shards[1].read(4) == theirs.shards[1].read(4) and ours.classes == theirs.classes


def test_folders_below_and_odd_names(tmp_path: Path, drawn_shards: Path, s3: Log) -> None:
    data = (drawn_shards / "shard-000002.tar").read_bytes()
    for name in ("a b/x+1.tar", "ü/y%20.tar", "ü/deep/z.tar", "top.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    for pattern in ("*.tar", "*/*.tar", "ü/*.tar", "[a-z] b/?+1.tar"):
        url = f"s3://{s3_server.BUCKET}{tmp_path}"
        ours = open_shards(SourceConfig(shards=url, pattern=pattern)).shards
        theirs = open_shards(SourceConfig(shards=tmp_path, pattern=pattern)).shards
        assert [s.name for s in ours] == [s.name for s in theirs] and theirs
        assert [s.read(9) for s in ours] == [s.read(9) for s in theirs]


def test_recipes_keep_urls_as_they_are(tmp_path: Path) -> None:
    for text, wanted in {
        "s3://bucket/a/b/": "s3://bucket/a/b",
        "gs://b": "gs://b",
        "data/x": Path("data/x"),
        "/a//b/": Path("/a/b"),
    }.items():
        recipe: Any = load_recipe(SHIPPED, "pretrain-mae", [f"source.shards={text}", "run.folder=runs/x"])
        assert recipe.source.shards == wanted and type(recipe.source.shards) in (str, type(Path()))
        again = tmp_path / "again.yaml"
        again.write_text(dump_recipe(recipe))
        assert load_recipe(again, "pretrain-mae") == recipe


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ftp://host/x", "supported schemes are s3"),
        ("s3://key:secret@bucket/x", "credentials belong in the environment"),
        ("https://host/x?sig=1", "without a query"),
        ("s3://", "SCHEME://BUCKET"),
        ("5", "got 5; expected a folder"),
    ],
)
def test_urls_that_are_refused(value: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(SHIPPED, "pretrain-mae", [f"source.shards={value}"])
    assert "source.shards" in str(caught.value) and "secret" not in str(caught.value)


def test_the_index_name_is_no_shard(drawn_shards: Path, s3: Log) -> None:
    url = f"s3://{s3_server.BUCKET}{drawn_shards}"
    names = [found.name for found in remote.list_objects(url, "*", [])]
    assert INDEX_NAME in names and [n for n in names if n.endswith(".tar")] == sorted(n for n in names if n[0] == "s")
