"""`tinymim cache list | verify | repair | copy | remove` on real caches of tiny teachers."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinymim import cli
from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.configs.load import dump_recipe
from tinymim.configs.schema import CacheTeacherRecipe
from tinymim.models.teacher import Teacher
from tinymim.pipeline.views import RandomViews, View
from tinymim.stages import (
    cache_copy,
    cache_list,
    cache_remove,
    cache_repair,
    cache_teacher,
    cache_verify,
    deep_check,
    make_shards,
    train_student,
    unit_draft,
)
from tinymim.stages.cache_info import describe, format_info
from tinymim.stages.calibrate import calibrated
from tinymim.stages.interrupt import Interrupted
from tinymim.storage.layout import METADATA
from tinymim.storage.leases import Leases
from tinymim.storage.manifest import Manifest
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import LocalStore, open_store
from tinymim.storage.writer import CacheWriter
from tinymim.tests.stages.tiny import cache_recipe, student_recipe, tree, write_teacher
from tinymim.tests.storage.tiny import lease_of_the_dead

HIDDEN: dict[str, Any] = {"name": "hidden", "calibration_views": 8}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 24 images in three tars; a cache of two views that grew by a third; a hidden cache of two."""
    root = tmp_path_factory.mktemp("made")
    make_shards.run("drawn", root / "shards", make_shards.Options(count=24, images_per_shard=8, seed=5))
    write_teacher(root / "teacher.safetensors")
    cache_teacher.run(recipe(root, num_views=2))
    cache_teacher.run(recipe(root))
    cache_teacher.run(hidden(root))
    return root


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all that, under a name that does not show in the bytes of a cache."""
    monkeypatch.chdir(made)
    for name in ("cache", "hidden"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def recipe(root: Path, **changes: Any) -> CacheTeacherRecipe:
    return cache_recipe(root, **({"num_views": 3, "audit_views": 4} | changes))


def hidden(root: Path, **changes: Any) -> CacheTeacherRecipe:
    return recipe(root, **({"codec": HIDDEN, "num_views": 2, "cache": root / "hidden"} | changes))


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x20
    path.write_bytes(data)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.run_command([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


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
    whole = Teacher(of(made).teacher).describe()
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
    assert "box and flip are" in report["examples"][0]


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


# ---------------------------------------------------------------- repair


def repaired(root: Path, made: Path, **changes: Any) -> dict[str, Any]:
    return cache_repair.run(recipe(made, **({"cache": root / "cache", "run": {"folder": root / "run"}} | changes)))


def test_a_repaired_cache_has_the_bytes_that_it_had(home: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cache = tree(home / "cache"), home / "cache"
    flip(cache / METADATA, 200)
    (cache / "units" / METADATA).unlink()
    # Both units of one shard: they must not come back as one.
    (cache / "units/shard-000000/v0-1/box/c/0/0").unlink()
    flip(cache / "units/shard-000000/v2-2/digest/c/0")
    flip(cache / "commits/shard-000001.v2-2.json", 80)
    (cache / "units/shard-000001" / METADATA).write_text("{}")
    (cache / "commits/shard-000002.v0-1.json").unlink()
    shutil.copytree(cache / "units/shard-000002/v2-2", cache / "units/shard-000002/v3-3")
    encoded = []
    encode = unit_draft.encode

    def counted(*args: Any) -> Any:
        encoded.append(len(args[2].keys))
        return encode(*args)

    monkeypatch.setattr("tinymim.stages.teacher_job.encode", counted)
    report = repaired(home, made)
    assert tree(cache) == whole
    # 8 images of shard 0 in three views, one view of shard 1, two of shard 2.
    assert sum(encoded) == 24 + 8 + 16
    assert report["computed"] == [
        f"shard-00000{unit}" for unit in ("0.tar v0-1", "0.tar v2-2", "1.tar v2-2", "2.tar v0-1")
    ]
    assert report["rewritten"][0] == METADATA and "units/shard-000001/zarr.json" in report["rewritten"]
    assert report["removed"] == ["units/shard-000002/v0-1/", "units/shard-000002/v3-3/"]
    encoded.clear()
    assert repaired(home, made)["findings"] == 0 and not encoded and tree(cache) == whole


def test_a_recipe_that_the_cache_was_not_made_by_touches_nothing(home: Path, made: Path) -> None:
    flip(home / "cache/units/shard-000000/v2-2/digest/c/0")
    write_teacher(home / "other.safetensors", seed=1)
    before = tree(home / "cache")
    for changes in (
        {"codec": {"rows": 5}},
        {"teacher": recipe(made).teacher.model_dump() | {"weights": str(home / "other.safetensors")}},
        {"views": {"size": 32, "scaled_decode": False, "seed": 1}},
    ):
        with pytest.raises(CacheMismatch):
            repaired(home, made, **changes)
    (home / "cache" / METADATA).unlink()
    with pytest.raises(CacheMismatch, match="cannot be rebuilt"):
        repaired(home, made, codec={"rows": 5})
    before.pop(METADATA)
    assert tree(home / "cache") == before
    with pytest.raises(UserError, match="there is no cache"):
        repaired(home, made, cache=home / "nowhere")
    assert not (home / "nowhere").exists()


def test_views_beyond_the_recipes_and_shards_outside_its_source_are_not_lost(home: Path, made: Path) -> None:
    whole = tree(home / "cache")
    flip(home / "cache/units/shard-000002/v2-2/digest/c/0")
    with pytest.raises(CacheCorrupt, match="shards that the recipe's source lacks"):
        repaired(home, made, source={"shards": made / "shards", "pattern": "*[01].tar"})
    assert (home / "cache/commits/shard-000002.v2-2.json").exists()
    repaired(home, made, num_views=2)
    assert tree(home / "cache") == whole


def test_a_shard_that_somebody_is_writing_is_left_alone(home: Path, made: Path) -> None:
    flip(home / "cache/units/shard-000002/v2-2/digest/c/0")
    leases = Leases(open_store(home / "cache"))
    assert leases.claim("units/shard-000002")
    with pytest.raises(UserError, match="a writer is at work"):
        repaired(home, made)
    leases.close()
    assert (home / "cache/commits/shard-000002.v2-2.json").exists()


def rehidden(root: Path, made: Path) -> dict[str, Any]:
    return cache_repair.run(hidden(made, cache=root / "hidden", run={"folder": root / "run"}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda cache: flip(cache / "constants/qkv_weight/c/0/0"),
        lambda cache: flip(cache / "constants.json", 30),
        lambda cache: (cache / "constants.json").unlink(),
        lambda cache: [shutil.move(cache / name, cache.parent) for name in ("constants", "constants.json")],
    ],
)
def test_constants_are_made_again(home: Path, made: Path, damage: Callable[[Path], object]) -> None:
    whole = tree(home / "hidden")
    damage(home / "hidden")
    flip(home / "hidden/units/shard-000002/v0-1/digest/c/0")
    assert rehidden(home, made)["computed"] == ["shard-000002.tar v0-1"]
    assert tree(home / "hidden") == whole


def test_constants_that_come_out_otherwise_are_not_written(
    home: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(home / "hidden/constants/qkv_weight/c/0/0")
    before = tree(home / "hidden")
    monkeypatch.setattr(
        "tinymim.stages.cache_repair.calibrated", lambda *a: {n: v * 2 for n, v in calibrated(*a).items()}
    )
    with pytest.raises(CacheCorrupt, match="cannot be made again"):
        rehidden(home, made)
    assert tree(home / "hidden") == before


def test_repair_prints_what_it_did(home: Path, made: Path, run: Run) -> None:
    flip(home / "cache/units/shard-000002/v2-2/digest/c/0")
    (home / "recipe.yaml").write_text(dump_recipe(recipe(made, cache=home / "cache", run={"folder": home / "run"})))
    code, out, err = run("cache", "repair", home / "recipe.yaml", "--json")
    assert code == 0 and json.loads(out)["computed"] == ["shard-000002.tar v2-2"] and "digest/c/0" in err
    code, text, _ = run("cache", "repair", home / "recipe.yaml")
    assert code == 0 and "0 finding(s)" in text


# ---------------------------------------------------------------- copy


@pytest.mark.parametrize("name", ["cache", "hidden"])
def test_a_copy_has_the_same_bytes_and_doing_it_again_does_nothing(home: Path, name: str, run: Run) -> None:
    (home / name / "mine.txt").touch()
    shutil.copytree(home / name / "units/shard-000000/v0-1", home / name / "units/shard-000000/v7-7")
    code, out, _ = run("cache", "copy", home / name, home / "copies" / name, "--json")
    report = json.loads(out)
    assert code == 0 and report["copied"] == report["units"] > 0
    (home / name / "mine.txt").unlink()
    shutil.rmtree(home / name / "units/shard-000000/v7-7")
    assert tree(home / "copies" / name) == tree(home / name)
    code, text, _ = run("cache", "copy", (home / name).as_uri(), (home / "copies" / name).as_uri())
    assert code == 0 and f"0 of {report['units']} units copied" in text
    assert tree(home / "copies" / name) == tree(home / name)


def test_an_interrupted_copy_continues(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = CacheWriter.put_unit
    done = []

    def interrupted(self: CacheWriter, *args: Any) -> Any:
        done.append(put(self, *args))
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return done[-1]

    monkeypatch.setattr(CacheWriter, "put_unit", interrupted)
    with pytest.raises(Interrupted):
        cache_copy.run(home / "cache", home / "copy")
    assert len(done) == 2 and len(list((home / "copy" / "commits").iterdir())) == 2
    report = cache_copy.run(home / "cache", home / "copy")
    assert (report["copied"], report["already_there"]) == (4, 2)
    assert tree(home / "copy") == tree(home / "cache")


def test_a_cache_that_grew_is_copied_into_its_older_copy(home: Path, made: Path) -> None:
    cache_teacher.run(recipe(made, num_views=2, cache=home / "small", run={"folder": home / "run"}))
    report = cache_copy.run(home / "cache", home / "small")
    assert (report["copied"], report["already_there"]) == (3, 3)
    assert tree(home / "small") == tree(home / "cache")


def test_damaged_units_are_not_copied_and_all_others_are(home: Path, made: Path) -> None:
    whole = tree(home / "cache")
    path = "units/shard-000001/v0-1/vv_tail_gap"
    flip(next((home / "cache" / path / "c").rglob("0/0/0/0")))
    with pytest.raises(CacheCorrupt, match="1 unit") as caught:
        cache_copy.run(home / "cache", home / "copy")
    assert "vv_tail_gap" in str(caught.value) and "shard-000001.tar v0-1" in str(caught.value)
    missing = {name for name in whole if "shard-000001" in name and "v0-1" in name}
    assert tree(home / "copy") == {name: data for name, data in whole.items() if name not in missing}
    repaired(home, made)
    cache_copy.run(home / "cache", home / "copy")
    assert tree(home / "copy") == whole


def test_a_copy_waits_for_what_another_copy_is_at(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CacheWriter.open(home / "copy", manifest_of(home / "cache")) as other:
        units = CacheReader(home / "cache").units()
        assert other.claim(units[0].unit)
        waits = []

        def finish(seconds: float) -> None:
            waits.append(seconds)
            other.put_unit(units[0], cache_copy._parts(CacheReader(home / "cache"), units[0]))

        monkeypatch.setattr(time, "sleep", finish)
        report = cache_copy.run(home / "cache", home / "copy")
    # Two units lie in the shard that the other holds.
    assert len(waits) == 1 and (report["copied"], report["already_there"]) == (5, 1)
    assert tree(home / "copy") == tree(home / "cache")


def manifest_of(cache: Path) -> Manifest:
    return CacheReader(cache).manifest


def test_what_a_copy_must_not_overwrite_is_refused(home: Path, made: Path) -> None:
    other = tree(home / "hidden")
    with pytest.raises(CacheMismatch, match="made by something else"):
        cache_copy.run(home / "cache", home / "hidden")
    assert tree(home / "hidden") == other
    with pytest.raises(UserError, match="not empty and not a tinymim cache"):
        cache_copy.run(home / "cache", home)
    with pytest.raises(UserError, match="onto itself"):
        cache_copy.run(home / "cache", home / "cache")
    cache_teacher.run(recipe(made, cache=home / "own", run={"folder": home / "run"}))  # the same views in other units
    own = tree(home / "own")
    with pytest.raises(CacheMismatch, match="records of its own"):
        cache_copy.run(home / "cache", home / "own")
    assert tree(home / "own") == own


def test_constants_of_another_calibration_are_not_mixed(home: Path, made: Path) -> None:
    with CacheWriter.open(home / "other", manifest_of(home / "hidden")) as writer:
        writer.write_constants({"scale": np.ones(3)})
    with pytest.raises(CacheMismatch, match="other constants"):
        cache_copy.run(home / "hidden", home / "other")


def test_to_an_object_store_and_back_and_all_commands_there(
    home: Path, seaweedfs: dict[str, str], monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    for name, value in seaweedfs.items():
        monkeypatch.setenv(name, value)
    root = f"s3://bucket/{home.name}"
    assert run("cache", "copy", home / "hidden", f"{root}/hidden")[0] == 0
    assert run("cache", "copy", f"{root}/hidden", home / "back")[0] == 0
    assert tree(home / "back") == tree(home / "hidden")
    assert run("cache", "verify", f"{root}/hidden")[0] == 0
    assert run("cache", "info", root)[0] == 0  # the only one there
    code, out, _ = run("cache", "list", root, "--json")
    assert code == 0 and [row["path"] for row in json.loads(out)] == [f"{root}/hidden"]
    assert json.loads(run("cache", "info", root, "--json")[1])["history"]["units_by_owner"] == {}
    store = open_store(f"{root}/hidden")
    store.write("units/shard-000001/v0-1/digest/c/0", b"damaged")
    store.write("mine.txt", b"mine")
    code, out, _ = run("cache", "verify", f"{root}/hidden", "--json")
    assert code == 2 and [found["path"] for found in json.loads(out)["findings"]] == [
        "units/shard-000001/v0-1/digest/c/0"
    ]
    code, out, _ = run("cache", "remove", f"{root}/hidden", "--yes", "--json")
    assert code == 0 and json.loads(out)["foreign"] == ["mine.txt"]
    assert [entry.path for entry in store.list()] == ["mine.txt"]


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
                cache_remove.run(again, confirmed=True)
        if (again / METADATA).exists():
            stopped += 1
            assert {found["kind"] for found in cache_verify.run(again)["findings"]} <= {"stray"}
            cache_remove.run(again, confirmed=True)
            assert not again.exists()
        else:
            assert tree(again) == {}
    assert steps > 20 and stopped > 2


def test_a_link_to_a_cache_is_followed_and_stays(home: Path) -> None:
    (home / "link").symlink_to(home / "cache")
    cache_remove.run(home / "link", confirmed=True)
    assert not (home / "cache").exists() and (home / "link").is_symlink()
