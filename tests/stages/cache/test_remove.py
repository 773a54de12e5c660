"""`tinymim cache remove`: everything of the cache goes and nothing else, stopped at any step."""

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
from tinymim.storage.leases import Leases
from tinymim.storage.store import LocalStore, open_store
from tinymim.tests.stages.tiny import tree
from tinymim.tests.storage.tiny import lease_of_the_dead

Run = Callable[..., tuple[int, str, str]]


def test_remove_asks_first_then_removes_all_of_it(home: Path, run: Run) -> None:
    before = tree(home / "cache")
    code, out, err = run("cache", "remove", home / "cache")
    assert (code, out) == (2, "") and "6 units" in err and "--yes" in err and tree(home / "cache") == before
    code, out, _ = run("cache", "remove", home / "cache", "--yes", "--json")
    assert code == 0 and json.loads(out)["units"] == 6 and json.loads(out)["bytes"] == sum(map(len, before.values()))
    assert not (home / "cache").exists() and (home / "hidden").exists()
    code, _, err = run("cache", "remove", home / "cache", "--yes")
    assert code == 2 and "there is no cache" in err


def test_files_of_others_are_named_and_left(home: Path, run: Run) -> None:
    cache = home / "hidden"
    foreign = ["README.md", "units/shard-000001/v0-1/notes.txt", "commits/list.txt", "units/mine/data.bin"]
    for path in foreign:
        (cache / path).parent.mkdir(exist_ok=True)
        (cache / path).write_text("mine")
    lease_of_the_dead(cache, "units/shard-000001")
    (cache / ".lock").touch()
    code, text, _ = run("cache", "remove", cache, "--yes")
    assert code == 0 and all(f"left alone  {path}" in text for path in foreign)
    assert sorted(tree(cache)) == sorted(foreign)


@pytest.mark.parametrize("what", ["shards", ".", "hidden/units"])
def test_what_is_no_cache_is_not_removed(home: Path, made: Path, what: str, run: Run) -> None:
    place = made / what if what == "shards" else home / what
    before = tree(place)
    assert run("cache", "remove", place, "--yes")[0] == 2 and tree(place) == before


def test_a_cache_with_a_living_writer_is_not_removed(home: Path, run: Run) -> None:
    leases = Leases(open_store(home / "cache"))
    assert leases.claim("units/shard-000001")
    before = tree(home / "cache")
    code, _, err = run("cache", "remove", home / "cache", "--yes")
    assert code == 2 and f"process {os.getpid()}" in err and tree(home / "cache") == before
    leases.close()
    assert run("cache", "remove", home / "cache", "--yes")[0] == 0


def test_stopped_at_any_step_no_unit_lacks_data_and_it_can_be_run_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    steps, stopped = 0, 0
    for stop_at in range(0, 40, 4):
        again = Path(shutil.copytree(home / "hidden", home / f"again-{stop_at}"))
        left = stop_at

        def counted(call: Callable[..., None]) -> Callable[..., None]:
            def step(*args: Any) -> None:
                nonlocal left, steps
                if left == 0:
                    raise Stopped
                left, steps = left - 1, steps + 1
                call(*args)

            return step

        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "remove", counted(LocalStore.remove))
            patch.setattr(LocalStore, "remove_tree", counted(LocalStore.remove_tree))
            with suppress(Stopped):
                remove.run(again, confirmed=True)
        if (again / METADATA).exists():
            stopped += 1
            assert {found["kind"] for found in verify.run(again)["findings"]} <= {"stray"}
            remove.run(again, confirmed=True)
            assert not again.exists()
        else:
            assert tree(again) == {}
    assert steps > 20 and stopped > 2


def test_a_link_to_a_cache_is_followed_and_stays(home: Path) -> None:
    (home / "link").symlink_to(home / "cache")
    remove.run(home / "link", confirmed=True)
    assert not (home / "cache").exists() and (home / "link").is_symlink()
