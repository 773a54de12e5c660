"""`tinymim cache list`: a line per layer; a cache that cannot be read does not stop the list."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tinymim.stages.cache.info import describe
from tinymim.storage.layout import METADATA
from tinymim.storage.local import LocalStore
from tinymim.storage.writer import CacheWriter
from tinymim.tests.storage import tiny
from tinymim.tests.storage.tiny import tree

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cache of two layers, and one without units."""
    tiny.make_tiny_cache(tmp_path / "one")
    with CacheWriter.open(tmp_path / "two", tiny.make_manifest(views={"seed": 1})):
        pass
    return tmp_path


def test_a_line_per_layer(root: Path, run: Run) -> None:
    code, text, _ = run("cache", "list", root)
    assert code == 0
    head, _, first, second, third = text.splitlines()
    assert head.split()[:3] == ["spec", "layer", "codec"]
    assert all(word in first for word in ("cls", "sketch", "6 x 2", "1 of 2", str(root / "one")))
    assert all(word in second for word in ("rel", "6 x 2 to 3", "2 of 2")) and str(root) not in second
    assert "views" in third and "0 of 2" in third and str(root / "two") in third
    rows = json.loads(run("cache", "list", root, "--json")[1])
    for row in rows:
        info = describe(row["path"])
        assert [layer["bytes"] for layer in row["layers"]] == [
            sum(len(data) for path, data in tree(Path(row["path"])).items() if path.startswith(folder))
            for folder in ("views/", *(f"layers/{layer['name']}/" for layer in info["layers"][1:]))
        ]
    assert run("cache", "list", root / "one" / "views")[1].startswith("there is no cache")
    assert run("cache", "list", root / "nowhere")[0] == 2


def test_what_cannot_be_read_does_not_stop_the_list(root: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    for name in ("bad-json", "bad-layer", "not-mine", "stale"):
        shutil.copytree(root / "one", root / name)
    (root / "bad-json" / METADATA).write_text("{")
    (root / "bad-layer" / "layers" / "rel" / METADATA).write_text("{")
    os.mkfifo(root / "fifo")
    (root / "dangling").symlink_to(root / "nowhere")
    read, listing = LocalStore.read, LocalStore.list

    def refused(self: LocalStore, path: str, limit: int) -> bytes:
        if self.place.name == "not-mine":
            raise PermissionError(13, "Permission denied", str(self.place))
        return read(self, path, limit)

    def gone(self: LocalStore, prefix: str = "") -> object:
        if self.place.name == "stale":
            raise OSError(116, "Stale file handle", str(self.place))
        return listing(self, prefix)

    monkeypatch.setattr(LocalStore, "read", refused)
    monkeypatch.setattr(LocalStore, "list", gone)
    code, text, _ = run("cache", "list", root)
    assert code == 0 and text.count("unreadable") == 4 and str(root / "one") in text
    assert "Permission denied" in text and "Stale file handle" in text
