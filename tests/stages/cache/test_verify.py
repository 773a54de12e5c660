"""`tinymim cache verify`: every byte is checked, and findings are data."""

import json
from collections.abc import Callable
from pathlib import Path

from tinymim.storage.layout import METADATA
from tinymim.tests.stages.cache.caches import HIDDEN_LAYER, SKETCH_LAYER, flip
from tinymim.tests.stages.tiny import tree

Run = Callable[..., tuple[int, str, str]]


def test_a_whole_cache_verifies_as_text_and_json(home: Path, run: Run) -> None:
    code, text, _ = run("cache", "verify", home / "cache")
    assert code == 0 and text.rstrip().endswith("verdict   sound")
    code, out, err = run("cache", "verify", home / "cache", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "") and report["sound"] and report["findings"] == [] and report["units"] == 6 + 6 + 3
    assert {name: layer["records"] for name, layer in report["layers"].items()} == {
        "views": 72,
        SKETCH_LAYER: 72,
        HIDDEN_LAYER: 48,
    }
    assert report["bytes"] == sum(
        len(data) for path, data in tree(home / "cache").items() if "/shard-" in path and path.endswith("zip")
    )


def test_findings_are_data_and_the_exit_code_is_2(home: Path, run: Run) -> None:
    flip(home / f"cache/layers/{SKETCH_LAYER}/shard-000001/v0-1.zip", -1000)
    (home / "cache/views/shard-000000/v2-2.json").write_text("{}")
    (home / "cache/._x.json").touch()
    code, text, err = run("cache", "verify", home / "cache")
    assert code == 2 and "NOT SOUND" in text and "shard-000001/v0-1.zip: its tail" in text
    assert "foreign   ._x.json: not part of a cache, harmless" in text
    assert err.startswith("error: 2 finding(s)") and "hint: `tinymim cache repair" in err
    code, out, _ = run("cache", "verify", home / "cache", "--json")
    report = json.loads(out)
    assert code == 2 and not report["sound"] and report["foreign"] == ["._x.json"]
    assert {(found["kind"], found["layer"]) for found in report["findings"]} == {
        ("unit", SKETCH_LAYER),
        ("commit", "views"),
    }
    (home / "cache" / METADATA).write_text("{")
    assert run("cache", "verify", home / "cache")[0] == 2
    assert run("cache", "verify", home / "nowhere")[0] == 2
