"""A chain runs every step, goes on where it stopped, and is checked as a whole before it begins."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from tinymim.configs.errors import RecipeError
from tinymim.configs.load import dump_recipe
from tinymim.configs.schema.chain import ChainRecipe
from tinymim.stages import cache_teacher, chain
from tinymim.stages.run.interrupt import Interrupted
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages import finetunes
from tinymim.tests.stages.tiny import STUDENT, cache_recipe, student_recipe, tree

STEPS = {"batch_size": 8, "steps": 4, "base_lr": 0.1}


@pytest.fixture
def home(home: Path) -> Path:
    """Shards, a teacher, and the recipes of a chain: teacher, student, the student's cache, its student."""
    shutil.rmtree(home / "cache")
    first = run_folder(home, "first")
    recipes = {
        "1": cache_recipe(home),
        "2": student_recipe(home, optim=STEPS, run=first),
        "3": cache_recipe(
            home,
            cache=home / "next",
            teacher={**STUDENT, "block": 2, "weights": str(first["folder"] / "student.safetensors")},
            run=run_folder(home, "next-cache"),
        ),
        "4": student_recipe(home, optim=STEPS, cache=home / "elsewhere", run=run_folder(home, "second")),
    }
    for name, recipe in recipes.items():
        (home / f"{name}.yaml").write_text(dump_recipe(recipe))
    return home


def run_folder(home: Path, name: str) -> dict[str, Any]:
    return {"folder": home / f"run-{name}", "device": "cpu", "threads": 1}


def recipe(home: Path, **changes: Any) -> ChainRecipe:
    steps: list[dict[str, Any]] = [
        {"stage": stage, "recipe": home / f"{number}.yaml"}
        for number, stage in enumerate(("cache-teacher", "train-student") * 2, start=1)
    ]
    steps[3]["set"] = [f"cache={home / 'next'}"]
    return ChainRecipe.model_validate({"stage": "chain", "steps": steps, **changes})


def test_the_student_of_a_chain_teaches_the_next_and_nothing_is_done_twice(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chain.run(recipe(home))
    said = capsys.readouterr().err
    assert [line for line in said.splitlines() if line.startswith("chain ")] == [
        f"chain {n}/4: {stage} {home / f'{n}.yaml'}"
        for n, stage in enumerate(("cache-teacher", "train-student") * 2, start=1)
    ]
    taught_by = CacheReader(home / "next").layer().teacher
    assert taught_by["weights_origin"] == str(home / "run-first" / "student.safetensors")
    assert (home / "run-second" / "student.safetensors").exists()
    before = {name: tree(home / name) for name in ("cache", "next")}
    weights = [(home / run / "student.safetensors").read_bytes() for run in ("run-first", "run-second")]
    chain.run(recipe(home))
    assert capsys.readouterr().err.count("nothing to do") == 2
    assert before == {name: tree(home / name) for name in ("cache", "next")}
    assert weights == [(home / run / "student.safetensors").read_bytes() for run in ("run-first", "run-second")]


def test_a_chain_that_was_stopped_goes_on_in_its_step(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cache_teacher.run

    def interrupted(loaded: Any) -> None:
        if loaded.cache == home / "next":
            monkeypatch.setattr(cache_teacher, "run", run)
            os.kill(os.getpid(), signal.SIGINT)
        run(loaded)

    previous = signal.signal(signal.SIGINT, lambda number, frame: (_ for _ in ()).throw(Interrupted("stopped")))
    try:
        monkeypatch.setattr(cache_teacher, "run", interrupted)
        with pytest.raises(Interrupted):
            chain.run(recipe(home))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert (home / "run-first" / "student.safetensors").exists() and not (home / "next").exists()
    chain.run(recipe(home))
    assert (home / "run-second" / "student.safetensors").exists()


def test_a_chain_may_fine_tune(home: Path) -> None:
    sets = {part: {"shards": home / "shards", "pattern": f"*{n}.tar"} for n, part in enumerate(("train", "val"))}
    tune = finetunes.recipe(home, home / "run-tuned", **sets, optim={"batch_size": 4, "steps": 1})
    (home / "tune.yaml").write_text(dump_recipe(tune))
    chain.run(recipe(home, steps=[{"stage": "finetune", "recipe": home / "tune.yaml"}]))
    assert (home / "run-tuned" / "finetuned.json").exists()


def test_every_step_is_checked_before_the_first_begins(home: Path) -> None:
    last = yaml.safe_load((home / "4.yaml").read_text())
    last["optim"]["batch_sise"] = 8
    (home / "4.yaml").write_text(yaml.safe_dump(last))
    with pytest.raises(RecipeError, match="batch_sise"):
        chain.run(recipe(home))
    assert not (home / "cache").exists()


def test_fields_set_for_the_chain_reach_every_step_and_its_own_come_last(home: Path) -> None:
    other = run_folder(home, "other")["folder"]
    with pytest.raises(RecipeError, match="cache_root"):  # no field of train-student
        chain.run(recipe(home, set=["cache_root=x"]))
    alone = {"stage": "cache-teacher", "recipe": home / "1.yaml", "set": [f"run.folder={other}"]}
    chain.run(recipe(home, set=["run.log_every=2", f"run.folder={home}/nowhere"], steps=[alone]))
    assert not (home / "nowhere").exists()
    assert "log_every: 2" in (other / "recipe.yaml").read_text()
