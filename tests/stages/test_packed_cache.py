"""A student learns from a packed cache, in a folder or in an object store, as from the cache itself."""

from pathlib import Path

import pytest

from tinymim.stages import train_student
from tinymim.stages.cache import pack
from tinymim.storage import objects
from tinymim.tests import s3_server
from tinymim.tests.stages.tiny import losses, student_recipe


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "s3"])
def test_a_student_learns_from_a_packed_cache(
    made: Path, home: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    monkeypatch.setattr(pack, "TAR_BYTES", 10_000)
    pack.run(home / "cache", home / "packed")
    assert len(list((home / "packed").glob("*.tar"))) > 1
    if not remote:
        train_student.run(student_recipe(home, cache=home / "packed"))
    else:
        with s3_server.served(home) as (endpoint, log):
            for name, value in s3_server.environment(endpoint).items():
                monkeypatch.setenv(name, value)
            objects._connect.cache_clear()
            train_student.run(student_recipe(home, cache=f"s3://{s3_server.BUCKET}/packed"))
            objects._connect.cache_clear()
        assert log.gets  # it was read from there
    assert losses(home) == losses(made)
