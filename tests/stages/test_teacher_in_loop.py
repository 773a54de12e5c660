"""`on_missing: teacher`: students learn the same from records that are read, computed, or written in between."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tinymim.configs.codecs.kinds import CodecConfig
from tinymim.configs.codecs.relations import DenseCodec, SketchCodec
from tinymim.configs.errors import CacheMismatch, CheckpointError, UserError
from tinymim.configs.load import dump_recipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.models.teacher import Teacher
from tinymim.pipeline import misses
from tinymim.pipeline.dataset import Lacking
from tinymim.pipeline.shards import open_shards
from tinymim.stages import cache_teacher, train_student
from tinymim.stages.cache import verify
from tinymim.stages.cache.teacher_input import TeacherTargets
from tinymim.stages.pages.summary import read_runs
from tinymim.stages.planning.student import Planned, computed_share
from tinymim.stages.run.folder import read_metrics
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.training import student_step
from tinymim.storage.layout import VIEWS
from tinymim.storage.reader import CacheReader
from tinymim.targets.kinds import make_kind
from tinymim.tests.stages import jobs
from tinymim.tests.stages.conftest import Run
from tinymim.tests.stages.tiny import (
    STUDENT,
    TEACHER,
    cache_recipe,
    losses,
    run_in,
    signal_in_step,
    student_recipe,
    unit_names,
    write_set,
    write_teacher,
)

VIEW_COUNT, STEPS = 4, 18  # 36 images in batches of 8: every view comes, the first one twice
OPTIM = {"batch_size": 8, "steps": STEPS, "base_lr": 0.1, "warmup": 0.2}
WHOLE = OPTIM | {"batch_size": 12}  # no image is left over at the end of a pass
LAW = {"size": 32, "scaled_decode": False}
CODECS: dict[str, Any] = {
    "dense": {"name": "dense"},
    "sketch": {"rows": 6, "head_k": 1, "tail_k": 3},
    "bank": {"kind": "bank", "anchors": 8},
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Shards and a random teacher."""
    return write_set(tmp_path)


def cached(home: Path, name: str, pattern: str = "*.tar", layer: str = "x", **changes: Any) -> None:
    fields: dict[str, Any] = {"codec": CODECS["dense"], "num_views": VIEW_COUNT, "cache": home / name}
    fields |= {"source": {"shards": home / "shards", "pattern": pattern}, "run": run_in(home / "run-cache")}
    cache_teacher.run(cache_recipe(home, layer=layer, **(fields | changes)))


def recipe(home: Path, cache: str, folder: str = "run-student", **changes: Any) -> TrainStudentRecipe:
    fields: dict[str, Any] = {"on_missing": "teacher", "num_views": VIEW_COUNT, "optim": OPTIM, "cache": home / cache}
    fields |= {"run": run_in(home / folder) | {"log_every": 1}}
    return student_recipe(home, **(fields | changes))


def teacher(home: Path, **changes: Any) -> dict[str, Any]:
    return TEACHER | {"block": 2, "weights": str(home / "teacher.safetensors")} | changes


def from_nothing(home: Path, codec: str = "dense") -> dict[str, Any]:
    """What a recipe states where there is no cache."""
    return {"views": LAW, "layers": {"x": {"teacher": teacher(home), "codec": CODECS[codec]}}}


def train(home: Path, cache: str, folder: str, **changes: Any) -> list[float]:
    train_student.run(recipe(home, cache, folder, **changes))
    return [line["loss"] for line in read_metrics(home / folder)]


def shares(home: Path, folder: str) -> list[float]:
    return [line["computed_share"] for line in read_metrics(home / folder)]


# ---------------------------------------------------------------- equality


@pytest.mark.parametrize("codec", CODECS)
def test_any_mix_of_cached_and_computed_records_trains_to_the_same_bits(codec: str, home: Path) -> None:
    cached(home, "whole", codec=CODECS[codec])
    cached(home, "half", "*[01].tar", num_views=2, codec=CODECS[codec])
    whole = train(home, "whole", "cached", on_missing="refuse")
    assert train(home, "half", "mixed") == whole
    assert 0.3 < np.mean(shares(home, "mixed")) < 0.8
    assert train(home, "none", "online", **from_nothing(home, codec)) == whole
    assert shares(home, "online") == [1.0] * STEPS and not (home / "none").exists()
    [online] = read_runs([home / "online"])
    assert online.results["computed_views"] == 8 * STEPS and online.results["computed_share"] == 1


def test_layers_of_two_teachers_may_be_missing_as_a_whole(home: Path) -> None:
    write_teacher(home / "other.safetensors", seed=1)
    other: dict[str, Any] = {
        "teacher": teacher(home, weights=str(home / "other.safetensors")),
        "codec": {"kind": "cls", "name": "int8"},
    }
    same: dict[str, Any] = {"teacher": teacher(home, block=1), "codec": {"kind": "features", "name": "int8"}}
    layers = {"x": {}, "other.cls": other | {"weight": 0.5}, "features": same | {"weight": 0.25}}
    cached(home, "part", "*[12].tar", num_views=3)
    cached(home, "whole")
    cached(home, "whole", layer="other.cls", **other)
    cached(home, "whole", layer="features", **same)
    plain = {name: {"weight": own.get("weight", 1.0)} for name, own in layers.items()}
    expected = train(home, "whole", "cached", layers=plain, on_missing="refuse")
    assert train(home, "part", "mixed", layers=layers) == expected
    students = {"a": {"model": STUDENT}, "b": {"model": STUDENT | {"embed_dim": 12}}}
    train(home, "part", "several", layers=layers, student=None, students=students)
    assert [line["loss"] for line in read_metrics(home / "several" / "a")] == expected


def test_gradients_of_a_mix_are_unbiased_with_a_sketch_and_exact_with_dense_records(home: Path) -> None:
    rng, count, draws = torch.Generator().manual_seed(0), 6, 100
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=rng)
    tokens = torch.randn(count, 17, 16, generator=rng)
    missing = np.array([True, False, True, True, False, False] * draws)

    def gradients(codec: CodecConfig) -> tuple[Tensor, Tensor]:
        """The gradient of all-online [N], and those of draws of a mix [draws, N]."""
        kind = make_kind(codec, 2)
        model = Teacher(cache_recipe(home).teacher, kind.taps)
        shapes, tapped = model.shapes(), model(pixels.repeat(draws, 1, 1, 1))
        torch.manual_seed(1)
        answers = tuple(
            each.detach().requires_grad_() for each in kind.head(shapes, shapes)(tokens.repeat(draws, 1, 1))
        )

        def gradient(target: Any) -> Tensor:
            loss = torch.stack([each.parts.sum() for each in kind.losses(answers, target).values()]).sum()
            found = torch.autograd.grad(loss, answers)
            return torch.cat([each.reshape(draws, -1) for each in found], dim=1)

        keys = torch.randint(-(2**62), 2**62, (count * draws,), generator=rng)
        records = {f"x/{name}": array for name, array in kind.encode(tapped, keys).items()}
        for array in records.values():
            array[torch.from_numpy(missing)] = 0  # a batch may hold anything there
        views = np.zeros((count * draws, 3), np.int64), [("key", 0)] * count * draws
        lacking = Lacking(*views, {"x": missing}, np.zeros(0, np.uint32))
        targets = TeacherTargets({"x": (kind, shapes)}, {"x": kind}, [(model, ["x"])], {"x": None})
        [mixed] = targets(pixels.repeat(draws, 1, 1, 1), records, keys, lacking)
        return gradient(kind.exact(tapped))[0], gradient(mixed)

    exact, mixed = gradients(DenseCodec(name="dense"))
    assert float((mixed - exact).norm(dim=1).max()) < 2e-3 * float(exact.norm())  # dense records are float16
    exact, drawn = gradients(SketchCodec(name="sketch", rows=6, head_k=1, tail_k=3))
    error, noise = (drawn.mean(0) - exact).norm(), drawn.var(0).sum().sqrt() / draws**0.5
    assert 0 < float(noise) < 0.3 * float(exact.norm())
    assert float(error) < 1.3 * float(noise)  # without a bias, the root mean square of the error is the noise


# ---------------------------------------------------------------- fresh views, resume, ranks


def test_fresh_views_are_those_of_a_larger_cache(home: Path) -> None:
    cached(home, "large", num_views=8)
    cached(home, "small", num_views=2)
    fresh: dict[str, Any] = {"num_views": 2, "fresh": 0.25}
    found = train(home, "small", "fresh", **fresh)
    assert found == train(home, "large", "known", **fresh)
    assert 0.1 < np.mean(shares(home, "fresh")) < 0.4 and set(shares(home, "known")) == {0.0}
    planned = Planned(CacheReader(home / "small"), open_shards(recipe(home, "small").source), 2, 1.0)
    share = computed_share(recipe(home, "small", **fresh), 36, STEPS, planned)
    assert np.mean(shares(home, "fresh")) == pytest.approx(share, abs=0.03)
    assert found != train(home, "small", "stale", num_views=2)
    # The other end of the dial: no view comes twice.
    assert len(train(home, "small", "online", num_views=None, fresh=1)) == STEPS
    assert shares(home, "online")[10:] == [1.0] * (STEPS - 10)  # from the third pass on


def test_a_resumed_run_has_the_same_losses_although_the_cache_has_grown(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(home, "half", "*[01].tar", num_views=2)
    changes: dict[str, Any] = {
        "fresh": 0.25,
        "order": {"shuffle_units": 2, "views_per_decode": 2, "views_per_epoch": 2},
    }
    expected = train(home, "half", "whole", **changes)
    signal_in_step(student_step, 7, signal.SIGTERM, monkeypatch)
    with pytest.raises(Interrupted):
        train(home, "half", "run-student", **changes)
    cached(home, "half", num_views=3)
    train(home, "half", "run-student", **changes)
    assert losses(home) == expected


def test_units_that_another_job_commits_are_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(misses, "LOOK_AGAIN_S", 0.0)
    cached(home, "grows", "*0.tar", num_views=1)
    step, begun = student_step.StudentStep.update, list[int]()

    def update(self: student_step.StudentStep, number: int) -> None:
        step(self, number)
        if number == 5 and not begun:
            begun.append(number)
            cached(home, "grows", num_views=VIEW_COUNT)

    monkeypatch.setattr(student_step.StudentStep, "update", update)
    found = train(home, "grows", "run-student")
    monkeypatch.undo()
    late = shares(home, "run-student")
    assert max(late[:5]) > 0.5 and set(late[12:]) == {0.0}  # some batches are requested ahead
    assert found == train(home, "grows", "cached", on_missing="refuse")


@pytest.mark.slow
def test_two_ranks_train_like_one_and_write_whole_units(home: Path) -> None:
    cached(home, "half", "*0.tar", num_views=2)
    order = {"shuffle_units": 1, "lanes": 2}
    one = train(home, "half", "one", order=order)
    two = train(home, "half", "two", order=order, workers=2, write_back=True)
    np.testing.assert_allclose(two, one, rtol=1e-4)
    pairs = zip(shares(home, "two"), shares(home, "one"), strict=True)
    assert all(found <= expected + 1e-6 for found, expected in pairs)  # units of this run may be read in its last pass
    units = unit_names(home / "half")
    assert units["x"] == units[VIEWS] and len(units["x"]) > 1
    assert not any("shard-000001" in unit for unit in units["x"])  # its view 0 is in the lanes of both ranks
    assert verify.run(home / "half")["sound"]


# ---------------------------------------------------------------- written units


def same_records(place: Path, other: Path) -> None:
    """All records of the first cache are those of the second."""
    found, expected = CacheReader(place), CacheReader(other)
    for layer in (VIEWS, *found.layers):
        for info in found.units(layer):
            for view, arrays in found.each_view(info):
                [whole] = [each for each in expected.by_shard(layer)[info.unit.shard] if view in each.unit.views]
                wanted = expected.read_views(whole, [view])
                for name, values in arrays.items():
                    np.testing.assert_array_equal(values, wanted[name][0])


def test_written_units_are_those_of_stage_one_and_a_later_job_adds_the_rest(home: Path) -> None:
    cached(home, "whole", codec=CODECS["bank"], num_views=6)
    order = {"shuffle_units": 3, "views_per_decode": 2, "views_per_epoch": 2}
    more = {"order": order, "optim": WHOLE, "write_back": True, "fresh": 0.3, **from_nothing(home, "bank")}
    first = train(home, "new", "first", **more)
    same_records(home / "new", home / "whole")
    units = unit_names(home / "new")
    assert (
        units["x"] == units[VIEWS] and any("v0-1" in unit for unit in units["x"]) and verify.run(home / "new")["sound"]
    )
    assert train(home, "new", "again", **more) == first
    assert np.mean(shares(home, "again")) < 0.5 and np.mean(shares(home, "first")) > 0.5
    cached(home, "new", codec=CODECS["bank"], num_views=6)
    same_records(home / "new", home / "whole")
    assert train(home, "new", "cached", on_missing="refuse") == train(home, "whole", "other", on_missing="refuse")


def test_a_killed_run_leaves_whole_units_and_the_same_command_goes_on(home: Path) -> None:
    cached(home, "whole")
    more = {"optim": WHOLE, "checkpoint": {"every_steps": 3}, **from_nothing(home)}
    made = recipe(home, "new", "killed", write_back=True, **more)
    (home / "recipe.json").write_text(json.dumps(made.model_dump(mode="json")))
    script = f"""
import itertools, json, os, signal
from pathlib import Path
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.stages import train_student
from tinymim.storage.writer import CacheWriter
commit, commits = CacheWriter.commit, itertools.count(1)
def dying(self, info, file):
    if next(commits) == 4:  # the unit of the view layer is committed, and that of the target layer is about to be
        os.kill(os.getpid(), signal.SIGKILL)
    commit(self, info, file)
CacheWriter.commit = dying
fields = json.loads(Path({str(home / "recipe.json")!r}).read_text())
train_student.run(TrainStudentRecipe.model_validate(fields))
"""
    died = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    units = unit_names(home / "new")
    assert (len(units[VIEWS]), len(units["x"])) == (2, 1)
    train_student.run(made)
    found = [line["loss"] for line in read_metrics(home / "killed")]
    assert found == train(home, "whole", "cached", on_missing="refuse", optim=WHOLE)
    assert verify.run(home / "new")["sound"]
    same_records(home / "new", home / "whole")
    cached(home, "new")
    assert train(home, "new", "after", on_missing="refuse", optim=WHOLE) == found


def test_a_concurrent_job_of_stage_one_and_written_units_make_one_cache(home: Path) -> None:
    cached(home, "whole")
    cached(home, "shared", "*0.tar", num_views=1)
    fields = {"codec": CODECS["dense"], "layer": "x", "num_views": VIEW_COUNT, "views_per_unit": 2}
    process, said = jobs.start(cache_recipe(home, cache=home / "shared", **fields))
    assert said.recv() == "open"
    found = train(home, "shared", "run-student", write_back=True, optim=WHOLE)
    process.join()
    assert process.exitcode == 0
    assert found == train(home, "whole", "cached", on_missing="refuse", optim=WHOLE)
    assert verify.run(home / "shared")["sound"]
    same_records(home / "whole", home / "shared")


def test_units_that_a_run_leaves_incomplete_are_counted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(home, "new", "run-student", write_back=True, optim=OPTIM | {"steps": 1}, **from_nothing(home))
    told = capsys.readouterr().err
    [incomplete] = re.findall(r"wrote 0 units to \S+; (\d) lack images that this run did not compute in one pass", told)
    assert int(incomplete) >= 1


def test_an_image_that_cannot_be_read_is_left_out_and_listed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_image(home / "shards" / "shard-000001.tar", 5)
    # One of 12 images is more than units may lack.
    changes = {"order": {"shuffle_units": 1}, "optim": WHOLE, **from_nothing(home)}
    found = train(home, "new", "run-student", write_back=True, **changes)
    assert len(found) == STEPS and np.isfinite(found).all()
    told = capsys.readouterr().err
    assert "left out 1 images, the first is " in told and "of shard-000001.tar" in told
    assert "too many unreadable images in shard shard-000001.tar" in told
    assert not any("shard-000001" in unit for unit in unit_names(home / "new")["x"])
    # As where the cache lists it.
    cached(home, "listed", max_unreadable=0.5)
    assert train(home, "listed", "cached", order=changes["order"], optim=WHOLE) == found


def break_image(path: Path, number: int) -> None:
    """Replace the bytes of one image of a tar, and remove the index."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member)) for member in tar.getmembers()]
        held = [(member, file.read() if file else b"") for member, file in members]
    images = [at for at, (member, _) in enumerate(held) if member.name.endswith(".jpg")]
    with tarfile.open(path, "w") as tar:
        for at, (member, data) in enumerate(held):
            data = b"?" * len(data) if at == images[number] else data
            tar.addfile(member, io.BytesIO(data))
    (path.parent / "index.json").unlink()


# ---------------------------------------------------------------- by the command line


def test_the_command_trains_without_a_cache_and_compare_shows_what_was_computed(
    home: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)  # where `compare` writes its page
    more = {"write_back": True, "optim": WHOLE, **from_nothing(home)}
    (home / "recipe.yaml").write_text(dump_recipe(recipe(home, "new", **more)))
    code, _, told = run("train-student", home / "recipe.yaml")
    assert code == 0 and f"there is no cache at {home / 'new'}" not in told  # `write_back` makes it
    assert (
        "the teacher computed 216 of 216 views" not in told and "units to" in told
    )  # some were written and read again
    code, table, _ = run("compare", home / "run-student")
    assert code == 0 and "by the teacher" in table
    code, _, told = run("train-student", home / "recipe.yaml", "--set", "layers.x.teacher.weights=gone.safetensors")
    assert code == 2 and "gone.safetensors" in told
    code, _, told = run("train-student", home / "recipe.yaml", "--set", "views=null", "--set", f"cache={home / 'no'}")
    assert code == 2 and "there is no cache at" in told


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_refused_before_anything_is_written(home: Path) -> None:
    layers = from_nothing(home)["layers"]
    with pytest.raises(UserError, match=r"there is no cache at .*, and the recipe names no view law"):
        train(home, "none", "run", layers=layers)
    with pytest.raises(UserError, match="does not state the teacher of layer x, which the cache lacks"):
        train(home, "none", "run", views=LAW, layers={"x": {}})
    with pytest.raises(CacheMismatch, match=r"student.img_size"):
        train(home, "none", "run", **from_nothing(home), write_back=True, student=STUDENT | {"img_size": 64})
    with pytest.raises(UserError, match=r"views.size is not layers.x.teacher.img_size"):
        train(home, "none", "run", views={"size": 48}, layers=layers)
    assert not (home / "none").exists() and not (home / "run").exists()
    cached(home, "small", num_views=1)
    before = unit_names(home / "small")
    with pytest.raises(CacheMismatch, match=r"layer x of the cache was made by something else.*target"):
        train(
            home,
            "small",
            "run",
            layers={"x": {"teacher": teacher(home), "codec": {"name": "dense", "relations": ["qk"]}}},
        )
    with pytest.raises(CacheMismatch, match=r"views.seed"):
        train(home, "small", "run", views=LAW | {"seed": 3})
    write_teacher(home / "other.safetensors", seed=1)
    other = teacher(home, weights=str(home / "other.safetensors"))
    with pytest.raises(CacheMismatch, match=r"teacher.weights_sha256"):
        train(home, "small", "run", layers={"x": {"teacher": other, "codec": CODECS["dense"]}}, write_back=True)
    (home / "teacher.safetensors").rename(home / "moved.safetensors")
    with pytest.raises(CheckpointError) as caught:
        train(home, "small", "run")
    assert "layers.x.teacher" in str(caught.value.hint)
    moved = teacher(home, weights=str(home / "moved.safetensors"))
    found = train(home, "small", "run", layers={"x": {"teacher": moved}})
    assert len(found) == STEPS and unit_names(home / "small") == before
