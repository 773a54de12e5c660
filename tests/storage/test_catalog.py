"""Finding caches below a root."""

import os
import re
from pathlib import Path

import pytest

from tinymim.configs.errors import UserError
from tinymim.storage import layout
from tinymim.storage.catalog import caches_below, resolve
from tinymim.storage.layout import METADATA, plain_group
from tinymim.storage.writer import CacheWriter
from tinymim.tests.storage import tiny


def make_cache(path: Path, seed: int = 0) -> Path:
    with CacheWriter.open(path, tiny.make_manifest(views={"seed": seed})):
        pass
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two caches, another zarr group, a folder and a file."""
    make_cache(tmp_path / "a")
    make_cache(tmp_path / "b", seed=1)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / METADATA).write_bytes(plain_group())
    (tmp_path / "d" / "deeper").mkdir(parents=True)
    make_cache(tmp_path / "d" / "deeper" / "cache")
    (tmp_path / "e.txt").write_text("no cache")
    return tmp_path


def test_caches_directly_below_a_root_are_found_and_nothing_else(root: Path) -> None:
    found = caches_below(root)
    assert [cache.place for cache in found] == [root / "a", root / "b"]
    assert [cache.manifest for cache in found] == [tiny.make_manifest(views={"seed": seed}) for seed in (0, 1)]


def test_a_root_may_be_a_url(root: Path) -> None:
    url = root.as_uri()
    assert [cache.place for cache in caches_below(url)] == [f"{url}/a", f"{url}/b"]
    assert resolve(f"{url}/a") == f"{url}/a"


def test_a_cache_is_found_by_itself(root: Path) -> None:
    assert [cache.place for cache in caches_below(root / "a")] == [root / "a"]
    assert resolve(root / "a") == root / "a"


def test_a_damaged_cache_is_listed_with_its_problem(root: Path) -> None:
    (root / "a" / METADATA).write_text("{")
    (root / "b" / METADATA).write_bytes((root / "b" / METADATA).read_bytes().replace(b'version": 2', b'version": 9'))
    damaged, newer = caches_below(root)
    assert damaged.manifest is None and "is damaged" in str(damaged)
    assert newer.manifest is None and "format_version" in str(newer)


def test_a_root_of_one_cache_stands_for_it(tmp_path: Path) -> None:
    make_cache(tmp_path / "only")
    (tmp_path / "folder").mkdir()
    assert resolve(tmp_path) == tmp_path / "only"


def test_a_root_of_several_caches_is_refused_and_they_are_listed(root: Path) -> None:
    ids = [tiny.make_manifest(views={"seed": seed}).spec_id for seed in (0, 1)]
    with pytest.raises(UserError, match="holds 2 caches") as caught:
        resolve(root)
    assert all(re.search(f"spec {spec_id}, layers none", str(caught.value)) for spec_id in ids)


@pytest.mark.parametrize("name", ["c", "nowhere", "e.txt", "d"])
def test_where_there_is_no_cache_that_is_said(root: Path, name: str) -> None:
    if name == "c":  # the error comes when it is read
        assert resolve(root / name) == root / name
        return
    with pytest.raises(UserError, match="there is no cache at"):
        resolve(root / name)


def test_a_cache_that_cannot_be_looked_at_is_listed_and_a_root_is_not_taken_for_empty(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(root))

    monkeypatch.setattr(layout, "read_manifest", refused)
    assert ["Permission denied" in str(cache) for cache in caches_below(root)] == [True] * 3
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError):
        caches_below(root)
