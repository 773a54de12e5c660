"""`tinymim cache remove`: everything of the cache or a layer goes and nothing else, stopped at any step."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tinymim.stages.cache import remove, verify
from tinymim.storage.layout import METADATA
from tinymim.storage.leases import Leases, shard_lease
from tinymim.storage.local import LocalStore
from tinymim.storage.store import open_store
from tinymim.tests.storage import tiny
from tinymim.tests.storage.tiny import CLS, REL, lease_of_the_dead, tree

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    tiny.make_tiny_cache(tmp_path / "cache")
    return tmp_path / "cache"


def test_remove_asks_first_then_removes_all_of_it(cache: Path, run: Run) -> None:
    before = tree(cache)
    code, out, err = run("cache", "remove", cache)
    assert (code, out) == (2, "") and "7 units" in err and "--yes" in err and tree(cache) == before
    code, out, _ = run("cache", "remove", cache, "--yes", "--json")
    assert code == 0 and json.loads(out)["units"] == 7 and json.loads(out)["bytes"] == sum(map(len, before.values()))
    assert not cache.exists()
    code, _, err = run("cache", "remove", cache, "--yes")
    assert code == 2 and "there is no cache" in err


@pytest.mark.parametrize("layer", [REL, CLS])
def test_a_layer_goes_and_no_other_is_touched(cache: Path, layer: str, run: Run) -> None:
    whole = tree(cache)
    code, _, err = run("cache", "remove", cache, "--layer", layer)
    assert code == 2 and f"1 layer of {cache}: {layer}" in err and tree(cache) == whole
    assert run("cache", "remove", cache, "--layer", layer, "--yes")[0] == 0
    assert tree(cache) == {path: data for path, data in whole.items() if not path.startswith(f"layers/{layer}/")}
    assert not (cache / "layers" / layer).exists() and verify.run(cache)["sound"]
    assert run("cache", "remove", cache, "--layer", layer, "--yes")[0] == 2  # gone
    assert run("cache", "remove", cache, "--layer", "views", "--yes")[0] == 2


def test_files_of_others_are_named_and_left(cache: Path, run: Run) -> None:
    foreign = ["README.md", "layers/rel/train-001/notes.txt", "views/list.txt", "layers/rel/mine/data.bin"]
    for path in foreign:
        (cache / path).parent.mkdir(exist_ok=True)
        (cache / path).write_text("mine")
    lease_of_the_dead(cache, shard_lease("train-001.tar"))
    code, text, _ = run("cache", "remove", cache, "--layer", REL, "--yes")
    assert code == 0 and "left alone  layers/rel/train-001/notes.txt" in text and "README" not in text
    code, text, _ = run("cache", "remove", cache, "--yes")
    assert code == 0 and all(f"left alone  {path}" in text for path in foreign)
    assert sorted(tree(cache)) == sorted(foreign)


@pytest.mark.parametrize("what", [".", "cache/views"])
def test_what_is_no_cache_is_not_removed(cache: Path, what: str, run: Run) -> None:
    place = cache.parent / what
    before = tree(place)
    assert run("cache", "remove", place, "--yes")[0] == 2 and tree(place) == before


@pytest.mark.parametrize("more", [[], ["--layer", CLS]])
def test_a_cache_with_a_living_writer_is_not_removed(cache: Path, more: list[str], run: Run) -> None:
    leases = Leases(open_store(cache))
    assert leases.claim(shard_lease("train-001.tar"))
    before = tree(cache)
    code, _, err = run("cache", "remove", cache, "--yes", *more)
    assert code == 2 and f"process {os.getpid()}" in err and tree(cache) == before
    leases.close()
    assert run("cache", "remove", cache, "--yes", *more)[0] == 0


@pytest.mark.parametrize("layers", [None, [CLS], [REL, CLS]])
def test_stopped_at_any_step_no_unit_lacks_data_and_it_can_be_run_again(
    cache: Path, layers: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    stopped = 0
    for stop_at in range(0, 24, 2):
        again = Path(shutil.copytree(cache, cache.parent / f"again-{stop_at}"))
        left = stop_at

        def counted(call: Callable[..., None]) -> Callable[..., None]:
            def step(*args: Any) -> None:
                nonlocal left
                if left <= 0:
                    raise Stopped
                left -= 1
                call(*args)

            return step

        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "remove", counted(LocalStore.remove))
            patch.setattr(LocalStore, "remove_tree", counted(LocalStore.remove_tree))
            with suppress(Stopped):
                remove.run(again, confirmed=True, layers=layers)
                continue
        stopped += 1
        if (again / METADATA).exists():
            assert {found["kind"] for found in verify.run(again)["findings"]} <= {"stray", "group"}
            remove.run(again, confirmed=True)
        assert not again.exists() or tree(again) == {}
    assert stopped >= 2


def test_a_link_to_a_cache_is_followed_and_stays(cache: Path) -> None:
    (cache.parent / "link").symlink_to(cache)
    remove.run(cache.parent / "link", confirmed=True)
    assert not cache.exists() and (cache.parent / "link").is_symlink()
