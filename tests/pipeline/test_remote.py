"""Shards in an object store: allowed places, requested ranges, and every way a store can fail."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinymim.configs.errors import RecipeError, StoreError, UserError
from tinymim.configs.load import dump_recipe, load_recipe
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.views import ViewConfig
from tinymim.pipeline import remote, spool
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.index import INDEX_NAME
from tinymim.pipeline.shards import ShardSet, open_shards
from tinymim.pipeline.spool import SpooledTar
from tinymim.pipeline.views import RandomViews
from tinymim.storage import objects
from tinymim.tests import s3_server
from tinymim.tests.s3_server import Log

SHIPPED = Path("tinyimagenet40-mae")


@pytest.fixture
def source(drawn_shards: Path, s3: Log) -> ShardSet:
    """The drawn shards in S3; the spool is empty."""
    return open_at(drawn_shards)


def open_at(folder: Path) -> ShardSet:
    return open_shards(SourceConfig(shards=f"s3://{s3_server.BUCKET}{folder}"))


def local_bytes(folder: Path) -> list[list[bytes]]:
    return [[s.read(i) for i in range(s.num_samples)] for s in open_shards(SourceConfig(shards=folder)).shards]


def fetched_bytes(log: Log, suffix: str = ".tar") -> int:
    return sum(get.end - get.start for get in log.of(suffix))


# ---------------------------------------------------------------- requests


def test_a_shard_is_fetched_once_in_parts(
    drawn_shards: Path, s3: Log, source: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "PART_BYTES", 4096)
    s3.latency_s = 0.01
    try:
        for shard, wanted in zip(source.shards, local_bytes(drawn_shards), strict=True):
            order = np.random.default_rng(0).permutation(shard.num_samples).tolist()
            assert [shard.read(i) for i in order] == [wanted[i] for i in order]
            gets = s3.of(shard.name)
            assert sum(get.end - get.start for get in gets) == shard.size_bytes
            assert {get.start % 4096 for get in gets} == {0} and len(gets) == -(-shard.size_bytes // 4096)
        assert 1 < max(get.open_gets for get in s3.gets) <= spool.REQUESTS
    finally:
        s3.latency_s = 0.0


def test_without_an_index_every_shard_is_streamed_once_and_it_is_said(
    drawn_shards: Path, tmp_path: Path, s3: Log, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in drawn_shards.glob("*.tar"):
        shutil.copy(path, tmp_path)
    indexed = open_shards(SourceConfig(shards=drawn_shards)).shards
    found = open_at(tmp_path).shards
    assert [(s.name, s.size_bytes, s.num_samples, s.content_hash) for s in found] == [
        (s.name, s.size_bytes, s.num_samples, s.content_hash) for s in indexed
    ]
    assert "index.json does not know 3 of 3 shards" in capsys.readouterr().err
    assert fetched_bytes(s3) == sum(s.size_bytes for s in indexed)
    s3.clear()
    for path in (own_cache / "tinymim" / "spool").glob("*.tar"):
        path.unlink()
    assert [s.content_hash for s in open_at(tmp_path).shards] == [s.content_hash for s in indexed]
    assert s3.of(".tar") == []


def test_members_are_kept_when_a_shard_is_evicted(drawn_shards: Path, s3: Log, own_cache: Path) -> None:
    wanted = [s.members().keys for s in open_shards(SourceConfig(shards=drawn_shards)).shards]
    assert [s.members().keys for s in open_at(drawn_shards).shards] == wanted
    s3.clear()
    for path in (own_cache / "tinymim" / "spool").glob("*.tar"):
        path.unlink()
    assert [s.members().keys for s in open_at(drawn_shards).shards] == wanted  # as in another process
    assert s3.of(".tar") == []
    kept = sorted(own_cache.rglob("*.json"))
    assert len(kept) == 3
    kept[0].write_text("{")
    kept[1].write_text("[]")
    assert [s.members().keys for s in open_at(drawn_shards).shards] == wanted
    assert kept[0].stat().st_size > 100 < kept[1].stat().st_size


def test_a_shard_is_pickled_without_its_store(source: ShardSet) -> None:
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source and copy.shards[0].read(3) == source.shards[0].read(3)
    assert len(pickle.dumps(source.shards[0])) < 1000


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", ["503", "cut", "short"])
def test_passing_faults_are_retried(drawn_shards: Path, s3: Log, source: ShardSet, fault: str) -> None:
    s3.fault = lambda number, get: fault if number in (1, 3) else None
    shard = source.shards[0]
    assert [shard.read(i) for i in range(shard.num_samples)] == local_bytes(drawn_shards)[0]


@pytest.mark.parametrize(("fault", "message"), [("403", "refuses access"), ("404", "does not exist")])
def test_refusals_are_errors_at_once(s3: Log, source: ShardSet, fault: str, message: str) -> None:
    s3.fault = lambda number, get: fault
    with pytest.raises(StoreError, match=message) as caught:
        source.shards[0].read(0)
    error, tar = caught.value, source.shards[0].place
    assert isinstance(tar, SpooledTar)
    assert error.exit_code == 2 and error.hint and str(tar.source) in error.what
    assert len(s3.of(".tar")) == 1
    s3.clear()
    assert source.shards[0].read(0)


@pytest.mark.parametrize(("fault", "message"), [("503", "be reached"), ("cut", "be reached"), ("short", "few")])
def test_lasting_faults_end_in_an_error(
    s3: Log, source: ShardSet, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    monkeypatch.setitem(objects.RETRIES, "max_retries", 2)
    objects._connect.cache_clear()
    s3.fault = lambda number, get: fault
    with pytest.raises(StoreError, match=message) as caught:
        source.shards[0].read(0)
    assert caught.value.hint and len(s3.of(".tar")) == 3
    objects._connect.cache_clear()


def test_a_store_that_fails_is_not_an_unreadable_image(s3: Log, source: ShardSet) -> None:
    s3.fault = lambda number, get: "403"
    views = ImageViews(source.shards, RandomViews(ViewConfig(size=32)))
    with pytest.raises(StoreError):
        views.batch(np.array([[0, 0, 0]], dtype=np.int64))


def test_an_object_that_was_replaced_is_refused(
    drawn_shards: Path, tmp_path: Path, s3: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "PART_BYTES", 4096)
    monkeypatch.setattr(spool, "REQUESTS", 1)
    shutil.copytree(drawn_shards, tmp_path, dirs_exist_ok=True)
    first, second, third = open_at(tmp_path).shards
    before = first.read(0)

    def replace(name: str, cut: int = 0) -> None:
        data = bytearray((tmp_path / name).read_bytes())
        data[-1] ^= 1
        (tmp_path / name).write_bytes(data[: len(data) - cut])

    def while_reading(number: int, get: s3_server.Get) -> None:
        if get.start == 5 * 4096:
            replace(second.name)  # by an object of equal size

    s3.fault = while_reading
    with pytest.raises(StoreError, match=f"{second.name} was replaced while it was being read") as caught:
        second.read(0)
    assert caught.value.hint and caught.value.got != caught.value.expected
    replace(third.name, cut=512)
    with pytest.raises(StoreError, match=f"{third.name} was replaced"):
        third.members()
    shutil.copy(drawn_shards / third.name, tmp_path)
    replace(first.name)
    assert first.read(0) == before  # the listed version is in the spool
    with pytest.raises(StoreError, match=r"is not the shard that index\.json describes"):
        open_at(tmp_path).shards[0].read(0)  # a new listing has another version, hence another file


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
        ("s3:/bucket/x", r"no local path(.|\n)*such as s3://bucket/x"),
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
