"""`tinymim cache verify`: every byte is checked, and findings are data."""

import json
from collections.abc import Callable
from pathlib import Path

from tinymim.storage.layout import METADATA
from tinymim.tests.stages.cache.caches import flip
from tinymim.tests.stages.tiny import tree

Run = Callable[..., tuple[int, str, str]]


def test_a_whole_cache_verifies_as_text_and_json(home: Path, run: Run) -> None:
    for name in ("cache", "hidden"):
        code, text, _ = run("cache", "verify", home / name)
        assert code == 0 and text.rstrip().endswith("verdict   sound")
    code, out, err = run("cache", "verify", home / "cache", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "") and report["sound"] and report["findings"] == [] and report["units"] == 6
    assert report["covered_views"] == report["num_views"] == 72
    assert report["bytes"] == sum(len(d) for p, d in tree(home / "cache").items() if p.count("/") > 2 or "/v" in p)


def test_findings_are_data_and_the_exit_code_is_2(home: Path, run: Run) -> None:
    flip(next((home / "cache/units/shard-000001/v0-1/vv_tail_gap/c").rglob("0/0/0/0")))
    (home / "cache/commits/shard-000000.v2-2.json").write_text("{}")
    (home / "cache/mine.txt").touch()
    code, text, err = run("cache", "verify", home / "cache")
    assert code == 2 and "NOT SOUND" in text and "vv_tail_gap/c/0" in text and "foreign   mine.txt" in text
    assert err.startswith("error: 2 finding(s)") and "hint: `tinymim cache repair" in err
    code, out, _ = run("cache", "verify", home / "cache", "--json")
    report = json.loads(out)
    assert code == 2 and not report["sound"] and report["foreign"] == ["mine.txt"]
    assert {found["kind"] for found in report["findings"]} == {"unit", "commit"}
    (home / "cache" / METADATA).write_text("{")
    assert run("cache", "verify", home / "cache")[0] == 2
    assert run("cache", "verify", home / "nowhere")[0] == 2
