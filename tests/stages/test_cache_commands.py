"""`tinymim cache list | info | verify | remove` on real caches of tiny teachers."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tinymim.configs.errors import CacheMismatch
from tinymim.configs.load import dump_recipe
from tinymim.configs.schema import CacheTeacherRecipe
from tinymim.configs.taps import Tap
from tinymim.models.teacher import Teacher
from tinymim.pipeline.views import RandomViews, View
from tinymim.stages import cache_teacher, train_student
from tinymim.stages.cache import deep as deep_check
from tinymim.stages.cache import list as cache_list
from tinymim.stages.cache import remove, verify
from tinymim.stages.cache.info import describe, format_info
from tinymim.storage.layout import METADATA
from tinymim.storage.leases import Leases
from tinymim.storage.store import LocalStore, open_store
from tinymim.tests.stages.caches import flip, hidden, recipe
from tinymim.tests.stages.tiny import student_recipe, tree, write_teacher
from tinymim.tests.storage.tiny import lease_of_the_dead

Run = Callable[..., tuple[int, str, str]]


# ---------------------------------------------------------------- list, info


def test_list_shows_a_line_per_cache_and_what_is_damaged(home: Path, made: Path, run: Run) -> None:
    code, text, _ = run("cache", "list", home)
    assert code == 0
    head, first, second = text.splitlines()
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


def test_info_says_who_when_and_what_more_views_would_take(home: Path, run: Run) -> None:
    os.utime(next((home / "cache" / "commits").glob("*v0-1.json")), (0, 0))
    info = describe(home / "cache", more_views=100)
    assert info["history"]["first_commit"] == "1970-01-01T00:00:00+00:00" < info["history"]["last_commit"]
    assert sum(info["history"]["units_by_owner"].values()) == 6
    each = info["bytes_per_further_view_of_all_images"]
    assert info["more_views"]["views"] == 100 and abs(info["more_views"]["bytes"] - 100 * each) <= 100
    text = format_info(info)
    assert "committed 1970-01-01" in text and "; 100 are " in text and "(6 units)" in text
    code, out, _ = run("cache", "info", (home / "cache").as_uri(), "--more-views", "7", "--json")
    assert code == 0 and json.loads(out)["more_views"]["views"] == 7
    assert run("cache", "info", home / "cache", "--more-views", "0")[0] == 2


def test_info_names_writers_at_work(home: Path) -> None:
    leases = Leases(open_store(home / "cache"))
    assert describe(home / "cache")["writers"] == [] and leases.claim("units/x")
    [writer] = describe(home / "cache")["writers"]
    leases.close()
    assert writer["lease"] == "units/x" and f"process {os.getpid()}" in writer["holder"]
    assert "holds units/x" in format_info(describe(home / "cache") | {"writers": [writer]})


def test_a_root_of_one_cache_stands_for_it_and_a_root_of_two_is_refused(home: Path, made: Path, run: Run) -> None:
    code, out, err = run("cache", "info", home)
    assert (code, out) == (2, "") and "holds 2 caches" in err and "sketch" in err
    shutil.rmtree(home / "hidden")
    assert run("cache", "info", home)[0] == 0
    short = {"optim": {"batch_size": 8, "steps": 1}, "run": {"folder": home / "run", "device": "cpu", "threads": 1}}
    train_student.run(student_recipe(made, cache=home, **short))
    assert (home / "run" / "student.safetensors").exists()


# ---------------------------------------------------------------- verify


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


def deep(place: Path, of: CacheTeacherRecipe, **options: Any) -> dict[str, Any]:
    return deep_check.run(of, place, **options)


@pytest.mark.parametrize(("name", "of"), [("cache", recipe), ("hidden", hidden)])
def test_the_teacher_gives_the_stored_records_again(home: Path, made: Path, name: str, of: Any) -> None:
    report = deep(home / name, of(made), sample=20)
    assert report["passed"] and report["agreement"] > 0.999 and report["records"] == 20
    assert report["units"] >= 3 and min(report["agreement_by_array"].values()) > 0.99
    assert report["wrong_views"] == report["wrong_pixels"] == report["unreadable"] == 0


def test_all_records_are_sampled_where_there_are_fewer(home: Path, made: Path) -> None:
    assert deep(home / "cache", recipe(made), sample=10**6)["records"] == 72


def test_the_sample_is_spread_and_a_function_of_its_seed() -> None:
    counts = [100, 1, 50, 200]
    chosen = deep_check.spread_records(counts, 64, "a/0")
    assert [rows.tolist() for rows in chosen] == [
        rows.tolist() for rows in deep_check.spread_records(counts, 64, "a/0")
    ]
    assert [rows.tolist() for rows in chosen] != [
        rows.tolist() for rows in deep_check.spread_records(counts, 64, "a/1")
    ]
    assert sum(map(len, chosen)) == 64 and 17 <= len(chosen[0]) <= 20
    for rows, count in zip(chosen, counts, strict=True):
        assert sorted(set(rows.tolist())) == rows.tolist() and all(0 <= row < count for row in rows)


@pytest.mark.parametrize(("name", "of"), [("cache", recipe), ("hidden", hidden)])
def test_a_cache_of_another_teacher_under_the_same_manifest_fails(
    home: Path, made: Path, name: str, of: Any, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    shutil.rmtree(home / name)
    write_teacher(home / "other.safetensors", seed=1)
    whole = Teacher(of(made).teacher, [Tap("qkv", 2)]).describe()
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "describe", lambda self: whole)
        teacher = of(made).teacher.model_copy(update={"weights": str(home / "other.safetensors")})
        cache_teacher.run(
            of(made, cache=home / name, run={"folder": home / "run"}).model_copy(update={"teacher": teacher})
        )
    yaml = home / "recipe.yaml"
    yaml.write_text(dump_recipe(of(made)))
    assert run("cache", "verify", home / name)[0] == 0  # every byte is as it was written
    code, out, err = run("cache", "verify", home / name, "--deep", yaml, "--json", "--sample", "24")
    report = json.loads(out)["deep"]
    assert code == 2 and "not what this teacher gives" in err
    assert report["agreement"] < 0.9 and report["wrong_views"] == report["wrong_pixels"] == 0
    line = ["cache", "verify", home / name, "--deep", yaml, "--sample", "24"]
    assert run(*line, "--min-agreement", f"{report['agreement'] - 1e-6}")[0] == 0
    assert run(*line, "--min-agreement", f"{report['agreement'] + 1e-6}")[0] == 2


def test_boxes_that_the_law_does_not_draw_and_other_pixels_fail(
    home: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = RandomViews.__call__

    def mirrored(*args: Any) -> View:
        return law(*args)._replace(flip=not law(*args).flip)

    monkeypatch.setattr(RandomViews, "__call__", mirrored)
    report = deep(home / "cache", recipe(made), sample=6)
    assert not report["passed"] and report["wrong_views"] == report["wrong_pixels"] == 6
    assert "stored is View(top=" in report["examples"][0]


def test_a_deep_check_by_another_recipe_is_refused(home: Path, made: Path, run: Run) -> None:
    with pytest.raises(CacheMismatch, match=r"views\.seed"):
        deep(home / "cache", recipe(made, views={"size": 32, "scaled_decode": False, "seed": 1}))
    yaml = home / "recipe.yaml"
    yaml.write_text(dump_recipe(recipe(made)))
    code, text, _ = run("cache", "verify", home / "cache", "--deep", yaml)
    assert code == 0 and "64 of 64 have the stored digest" in text
    assert run("cache", "verify", home / "cache", "--deep", yaml, "--set", "views.seed=1")[0] == 2
    assert run("cache", "verify", home / "cache", "--sample", "0")[0] == 2
    assert run("cache", "verify", home / "cache", "--set", "views.seed=1")[0] == 2


# ---------------------------------------------------------------- remove


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
