"""`tinymim cache list`: a line per cache, damaged or not; a root of one cache stands for it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tinymim.stages import train_student
from tinymim.stages.cache import list as cache_list
from tinymim.stages.cache.info import describe
from tinymim.storage.layout import METADATA
from tinymim.tests.stages.cache.caches import flip
from tinymim.tests.stages.tiny import student_recipe

Run = Callable[..., tuple[int, str, str]]


def test_list_shows_a_line_per_cache_and_what_is_damaged(home: Path, made: Path, run: Run) -> None:
    code, text, _ = run("cache", "list", home)
    assert code == 0
    head, _, first, second = text.splitlines()
    assert head.split()[:3] == ["spec", "teacher", "codec"]
    assert all(word in first for word in ("vit_tiny_patch16_224 block 2", "sketch", "24 x 3", "100.0%", "cache"))
    assert "hidden" in second and "24 x 2" in second
    rows = json.loads(run("cache", "list", home, "--json")[1])
    assert [row["total_bytes"] for row in rows] == [
        describe(home / name)["total_bytes"] for name in ("cache", "hidden")
    ]
    assert rows[0]["covered_share"] == 1.0 and rows[0]["complete"]
    flip(next((home / "hidden" / "commits").iterdir()), 80)
    (home / "cache" / METADATA).write_text("{")
    code, text, _ = run("cache", "list", home)
    assert code == 0 and text.count("damaged") >= 2
    assert all("problem" in row for row in cache_list.run(home))
    assert run("cache", "list", made / "shards")[1].startswith("there is no cache")
    assert run("cache", "list", made / "nowhere")[0] == 2


def test_a_root_of_one_cache_stands_for_it_and_a_root_of_two_is_refused(home: Path, made: Path, run: Run) -> None:
    code, out, err = run("cache", "info", home)
    assert (code, out) == (2, "") and "holds 2 caches" in err and "sketch" in err
    shutil.rmtree(home / "hidden")
    assert run("cache", "info", home)[0] == 0
    short = {"optim": {"batch_size": 8, "steps": 1}, "run": {"folder": home / "run", "device": "cpu", "threads": 1}}
    train_student.run(student_recipe(made, cache=home, **short))
    assert (home / "run" / "student.safetensors").exists()
