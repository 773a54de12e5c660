"""`tinymim cache verify --deep`: a sample of records made again by the teacher."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinymim.configs.errors import CacheMismatch
from tinymim.configs.load import dump_recipe
from tinymim.configs.taps import Tap
from tinymim.models.teacher import Teacher
from tinymim.pipeline.views import RandomViews, View
from tinymim.stages import cache_teacher
from tinymim.stages.cache import deep
from tinymim.tests.stages.cache.caches import hidden, recipe
from tinymim.tests.stages.tiny import write_teacher

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("of", [recipe, hidden])
def test_the_teacher_gives_the_stored_records_again(home: Path, made: Path, of: Any) -> None:
    report = deep.run(of(made), home / "cache", sample=20)
    assert report["passed"] and report["agreement"] > 0.999 and report["records"] == 20
    assert report["units"] >= 3 and min(report["agreement_by_array"].values()) > 0.99
    assert report["wrong_pixels"] == report["unreadable"] == 0


def test_all_records_are_sampled_where_there_are_fewer(home: Path, made: Path) -> None:
    assert deep.run(recipe(made), home / "cache", sample=10**6)["records"] == 72


def test_the_sample_is_spread_and_a_function_of_its_seed() -> None:
    counts = [100, 1, 50, 200]
    chosen = deep.spread_records(counts, 64, "a/0")
    assert [rows.tolist() for rows in chosen] == [rows.tolist() for rows in deep.spread_records(counts, 64, "a/0")]
    assert [rows.tolist() for rows in chosen] != [rows.tolist() for rows in deep.spread_records(counts, 64, "a/1")]
    assert sum(map(len, chosen)) == 64 and 17 <= len(chosen[0]) <= 20
    for rows, count in zip(chosen, counts, strict=True):
        assert sorted(set(rows.tolist())) == rows.tolist() and all(0 <= row < count for row in rows)


@pytest.mark.parametrize("of", [recipe, hidden])
def test_a_cache_of_another_teacher_under_the_same_manifest_fails(
    home: Path, made: Path, of: Any, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    shutil.rmtree(home / "cache")
    write_teacher(home / "other.safetensors", seed=1)
    whole = Teacher(of(made).teacher, [Tap("qkv", 2)]).describe()
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "describe", lambda self, taps: whole)
        teacher = of(made).teacher.model_copy(update={"weights": str(home / "other.safetensors")})
        cache_teacher.run(
            of(made, cache=home / "cache", run={"folder": home / "run"}).model_copy(update={"teacher": teacher})
        )
    yaml = home / "recipe.yaml"
    yaml.write_text(dump_recipe(of(made)))
    assert run("cache", "verify", home / "cache")[0] == 0  # every byte is as it was written
    code, out, err = run("cache", "verify", home / "cache", "--deep", yaml, "--json", "--sample", "24")
    report = json.loads(out)["deep"]
    assert code == 2 and "differ from those of this teacher" in err
    assert report["agreement"] < 0.9 and report["wrong_pixels"] == 0
    line = ["cache", "verify", home / "cache", "--deep", yaml, "--sample", "24"]
    assert run(*line, "--min-agreement", f"{report['agreement'] - 1e-6}")[0] == 0
    assert run(*line, "--min-agreement", f"{report['agreement'] + 1e-6}")[0] == 2


def test_boxes_that_the_law_does_not_draw_and_other_pixels_fail(
    home: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = RandomViews.__call__

    def mirrored(*args: Any) -> View:
        return law(*args)._replace(flip=not law(*args).flip)

    monkeypatch.setattr(RandomViews, "__call__", mirrored)
    report = deep.run(recipe(made), home / "cache", sample=6)
    assert not report["passed"] and report["wrong_pixels"] == 6
    assert "stored is " in report["examples"][0]


def test_a_deep_check_by_another_recipe_is_refused(home: Path, made: Path, run: Run) -> None:
    with pytest.raises(CacheMismatch, match=r"views\.seed"):
        deep.run(recipe(made, views={"size": 32, "scaled_decode": False, "seed": 1}), home / "cache")
    yaml = home / "recipe.yaml"
    yaml.write_text(dump_recipe(recipe(made)))
    code, text, _ = run("cache", "verify", home / "cache", "--deep", yaml)
    assert code == 0 and "64 of 64 have the stored digest" in text
    assert run("cache", "verify", home / "cache", "--deep", yaml, "--set", "views.seed=1")[0] == 2
    assert run("cache", "verify", home / "cache", "--sample", "0")[0] == 2
    assert run("cache", "verify", home / "cache", "--set", "views.seed=1")[0] == 2
