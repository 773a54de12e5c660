"""The places of shards: a folder, a file:// URL, our small S3 server, and a real one if it is installed."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import obstore
import pytest

from tinymim.configs.sections.source import SourceConfig
from tinymim.pipeline.shards import ShardSet, open_shards
from tinymim.storage.objects import connect
from tinymim.tests import s3_server

Opened = Callable[..., ShardSet]
_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_of_everything() -> Iterator[tuple[str, s3_server.Log]]:
    """Our S3 server, with every file of this machine in its bucket."""
    with s3_server.served(Path("/")) as (endpoint, log):
        yield endpoint, log


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder instead of ~/.cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def s3(
    s3_of_everything: tuple[str, s3_server.Log], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[s3_server.Log]:
    """The log of our S3 server, empty; `s3://bucket` + an absolute path is a URL there."""
    endpoint, log = s3_of_everything
    for name, value in s3_server.environment(endpoint).items():
        monkeypatch.setenv(name, value)
    log.clear()
    yield log
    log.clear()


@pytest.fixture(params=["folder", "file-url", "s3", "seaweedfs"])
def opened(request: pytest.FixtureRequest, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Opens the shards of a folder, or of that folder's copy in an object store."""

    def local(folder: Path, pattern: str = "*.tar") -> ShardSet:
        return open_shards(SourceConfig(shards=folder, pattern=pattern))

    def at_url(folder: Path, pattern: str = "*.tar") -> ShardSet:
        return open_shards(SourceConfig(shards=folder.as_uri(), pattern=pattern))

    def in_s3(folder: Path, pattern: str = "*.tar") -> ShardSet:
        return open_shards(SourceConfig(shards=f"s3://{s3_server.BUCKET}{folder}", pattern=pattern))

    def uploaded(folder: Path, pattern: str = "*.tar") -> ShardSet:
        url = f"s3://{s3_server.BUCKET}/copies/{next(_numbers)}"
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            obstore.put(connect(url), str(path.relative_to(folder)), path.read_bytes())
        return open_shards(SourceConfig(shards=url, pattern=pattern))

    if request.param == "s3":
        request.getfixturevalue("s3")
    if request.param == "seaweedfs":
        for name, value in request.getfixturevalue("seaweedfs").items():
            monkeypatch.setenv(name, value)
    made: dict[str, Opened] = {"folder": local, "file-url": at_url, "s3": in_s3, "seaweedfs": uploaded}
    return made[request.param]
