"""`tinymim cache pack`: a few tars and a card; unpacked, the same bytes; hostile ones are refused."""

import hashlib
import io
import json
import os
import signal
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.stages.cache import copy, pack, verify
from tinymim.stages.run.interrupt import Interrupted
from tinymim.storage.atomic import digest_hex
from tinymim.storage.packed import INDEX, _compact, open_cache_store
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages.cache.caches import flip
from tinymim.tests.storage import tiny
from tinymim.tests.storage.tiny import REL, tree

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    tiny.make_tiny_cache(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def packed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache in several tars."""
    monkeypatch.setattr(pack, "TAR_BYTES", 20_000)
    pack.run(cache, cache.parent / "packed")
    return cache.parent / "packed"


def test_packed_and_unpacked_it_has_the_same_bytes(cache: Path, run: Run) -> None:
    packed, back = cache.parent / "packed", cache.parent / "back"
    code, out, _ = run("cache", "pack", cache, packed, "--json")
    report = json.loads(out)
    assert code == 0 and report["files"] == len(tree(cache)) and len(report["tars"]) == 1
    [tar] = report["tars"]
    assert hashlib.sha256((packed / tar["name"]).read_bytes()).hexdigest() == tar["sha256"]
    assert run("cache", "copy", packed, back)[0] == 0 and tree(back) == tree(cache)
    before = tree(packed)
    assert json.loads(run("cache", "pack", cache, packed, "--json")[1])["kept"] == 1 and tree(packed) == before
    assert run("cache", "pack", back, cache.parent / "again")[0] == 0
    assert {p: d for p, d in tree(cache.parent / "again").items()} == before  # deterministic


def test_plain_tar_unpacks_it_too(cache: Path, packed: Path) -> None:
    tars = sorted(packed.glob("*.tar"))
    assert len(tars) > 1 and tars[0].name == f"cache-00000-of-{len(tars):05d}.tar"
    (cache.parent / "plain").mkdir()
    for path in tars:
        subprocess.run(["tar", "-xf", path, "-C", cache.parent / "plain"], check=True)
        with tarfile.open(path) as tar:
            assert all(member.isfile() and member.mtime == 0 for member in tar)
    assert tree(cache.parent / "plain") == tree(cache)


def test_a_packed_cache_is_read_where_it_lies(cache: Path, packed: Path, run: Run) -> None:
    reader, whole = CacheReader(packed), CacheReader(cache)
    for info in whole.units(REL):
        again = reader.read_views(info)
        assert all((values == again[name]).all() for name, values in whole.read_views(info).items())
    assert reader.keys("train-001.tar") == whole.keys("train-001.tar")
    assert verify.run(packed)["sound"]
    assert run("cache", "info", packed)[0] == 0 and "rel" in run("cache", "list", cache.parent)[1]
    with pytest.raises(UserError, match="cannot be changed"):
        open_cache_store(packed).write("zarr.json", b"")
    assert run("cache", "remove", packed, "--yes")[0] == 2


def test_the_card_has_front_matter_and_the_facts(packed: Path) -> None:
    text = (packed / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "apache-2.0" and "tinymim" in front["tags"]
    for words in ("vit_tiny_patch16_224", "apache-2.0", "kept_mass", "cache copy", "train-student", "| rel |"):
        assert words in text


def test_a_stopped_pack_and_a_stopped_unpacking_continue(
    cache: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar_of, calls = pack._tar, 0

    def stopped(*args: Any) -> Any:
        nonlocal calls
        for data in tar_of(*args):
            calls += 1
            if calls == 80:
                os.kill(os.getpid(), signal.SIGINT)
            yield data

    with monkeypatch.context() as patch:
        patch.setattr(pack, "_tar", stopped)
        with pytest.raises(Interrupted):
            pack.run(cache, cache.parent / "half")
    assert not (cache.parent / "half" / INDEX).exists()
    assert pack.run(cache, cache.parent / "half")["kept"] > 0 and tree(cache.parent / "half") == tree(packed)
    # A tar that is cut off: what lies before it arrives, and the same command continues with a whole one.
    last = sorted(packed.glob("*.tar"))[-1]
    data = last.read_bytes()
    last.write_bytes(data[: len(data) // 2])
    with pytest.raises(CacheCorrupt):
        copy.run(packed, cache.parent / "back")
    last.write_bytes(data)
    copy.run(packed, cache.parent / "back")
    assert tree(cache.parent / "back") == tree(cache)


def test_damage_and_other_contents_of_the_target_are_refused(cache: Path, packed: Path) -> None:
    flip(next(packed.glob("*.tar")), 700)
    with pytest.raises(CacheMismatch, match="something else"):
        pack.run(cache, packed)
    (cache.parent / "mine").mkdir()
    (cache.parent / "mine" / "photo.jpg").touch()
    with pytest.raises(UserError, match="not empty"):
        pack.run(cache, cache.parent / "mine")
    flip(cache / "layers/rel/train-000/v0-1.zip", 1100)
    with pytest.raises(CacheCorrupt, match="cannot be packed"):
        pack.run(cache, cache.parent / "new")


def forge(packed: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((packed / INDEX).read_bytes())
    content.pop("digest")
    change(content)
    (packed / INDEX).write_bytes(_compact(content | {"digest": digest_hex(_compact(content))}))


def renamed(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["tars"][0]["files"][0].__setitem__(0, name)


@pytest.mark.parametrize(
    "change",
    [
        renamed("../../etc/passwd"),
        renamed("/etc/passwd"),
        renamed("views/../../x/v0-1.zip"),
        renamed("layers/../zarr.json"),
        renamed("views/train-000/v0-1.zip"),  # twice
        renamed("mine.txt"),
        lambda content: content["tars"][0].update(name="../cache.tar"),
        lambda content: content["tars"][0].update(name="/dev/zero"),
        lambda content: content["tars"][0].update(size_bytes=2**62),
        lambda content: content["tars"][0]["files"][0].__setitem__(1, 2**62),
        lambda content: content["tars"][0]["files"][0].__setitem__(1, -1),
        lambda content: content["tars"][0]["files"][0].append(0),
        lambda content: content["tars"].append(content["tars"][0]),
        lambda content: content.update(tars=None),
        lambda content: content.update(tars=[[]]),
    ],
)
def test_a_hostile_index_is_refused(cache: Path, packed: Path, change: Callable[[dict[str, Any]], object]) -> None:
    forge(packed, change)
    with pytest.raises(CacheCorrupt, match="damaged"):
        copy.run(packed, cache.parent / "back")
    assert not (cache.parent / "back").exists()


def test_links_and_other_members_in_a_tar_are_not_followed(cache: Path, packed: Path) -> None:
    first = sorted(packed.glob("*.tar"))[0]
    whole = first.read_bytes()
    link = tarfile.TarInfo("layers/cls/constants.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(link)
    first.write_bytes(out.getvalue()[:512] + whole[512:])
    with pytest.raises(CacheCorrupt, match="does not hold"):
        copy.run(packed, cache.parent / "back")
    assert not any(path.is_symlink() for path in cache.parent.rglob("*"))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format":"other"}', '{"format":"tinymim packed cache","format_version":9}']
)
def test_another_index_is_refused(packed: Path, text: str, run: Run) -> None:
    (packed / INDEX).write_text(text)
    assert run("cache", "info", packed)[0] == 2
