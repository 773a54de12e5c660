"""Both stages from shards in an object store give what they give from the same shards on disk, byte for byte."""

import shutil
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest

from tinymim.stages import cache_teacher, train_student
from tinymim.storage import objects
from tinymim.storage.reader import CacheReader
from tinymim.tests import s3_server
from tinymim.tests.stages.tiny import cache_recipe, losses, stored, student_recipe


@pytest.fixture
def url(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The shards in S3; loader workers that start from now on see this environment."""
    with s3_server.served(made) as (endpoint, _):
        for name, value in s3_server.environment(endpoint).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
        objects._connect.cache_clear()  # it knows the server of the test before
        yield f"s3://{s3_server.BUCKET}/shards"
        objects._connect.cache_clear()
        forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [0, 1])
def test_both_stages_from_an_object_store(made: Path, tmp_path: Path, url: str, workers: int) -> None:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(made / "teacher.safetensors", home)
    common = {"source": {"shards": url}, "loader": {"workers": workers}}
    cache_teacher.run(cache_recipe(home, **common))
    assert stored(home) == stored(made)
    ours, theirs = CacheReader(home / "cache").manifest, CacheReader(made / "cache").manifest
    assert (ours.source, ours.spec_id) == (theirs.source, theirs.spec_id)
    train_student.run(student_recipe(home, **common))
    assert losses(home) == losses(made)
    assert f"shards: {url}" in (home / "run-student" / "recipe.yaml").read_text()
    assert len(list((tmp_path / "xdg").rglob("*.json"))) == 3  # every shard was scanned once
