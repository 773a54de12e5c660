"""A teacher with stochastic depth: its records are a function of the view, whoever computes them and in which batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinymim.configs.errors import CacheMismatch
from tinymim.configs.schema.fidelity import FidelityRecipe
from tinymim.configs.sections.models import TeacherConfig
from tinymim.configs.taps import Tap
from tinymim.models.drop_path import HandedDropPath, drop_by
from tinymim.models.teacher import Teacher
from tinymim.stages import cache_teacher, fidelity, look, train_student
from tinymim.stages.cache import deep
from tinymim.stages.evaluation.examples import examples
from tinymim.stages.pages.pictures import STORED
from tinymim.stages.pages.pictures import TEACHER as EXACT
from tinymim.stages.run.folder import read_metrics
from tinymim.stages.units.drops import drawn_drops
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages.tiny import STUDENT, TEACHER, cache_recipe, run_in, student_recipe, write_set

LAYER: dict[str, Any] = {"layer": "x", "codec": {"kind": "features", "name": "int8", "target": "raw"}}


def dropping(root: Path, rate: float = 0.5, **changes: Any) -> Any:
    teacher = TEACHER | {"depth": 3, "block": 3, "weights": str(root / "teacher.safetensors"), "drop_path": rate}
    return cache_recipe(root, **LAYER | {"teacher": teacher} | changes)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(TEACHER, "depth", 3)  # also of the weights: two blocks drop, the last one does not
    return write_set(tmp_path, 24, 12)


def test_records_depend_on_the_view_alone_and_the_rate_is_part_of_the_identity(home: Path) -> None:
    cache_teacher.run(dropping(home, audit_views=6, num_views=2))
    for views in (1, 2):  # stopped in between, in other batches
        cache_teacher.run(dropping(home, num_views=views, batch_size=5, views_per_decode=1, cache=home / "again"))
    names = sorted(CacheReader(home / "cache").arrays("x"))
    held = [
        {(info.unit.shard, view): a for info in reader.units("x") for view, a in reader.each_view(info)}
        for reader in (CacheReader(home / "cache"), CacheReader(home / "again"))
    ]
    for at, arrays in held[0].items():
        for name in names:
            agree = np.isclose(arrays[name].astype(float), held[1][at][name].astype(float), rtol=1e-4, atol=1e-5)
            assert agree.mean() > 0.999, (at, name)  # a rounding at the edge of a code
    found = deep.run(dropping(home, batch_size=7), home / "cache", sample=20)
    assert found["passed"] and found["agreement"] > 0.999
    assert CacheReader(home / "cache").layer("x").teacher["drop_path"] == 0.5
    for other in (0.0, 0.25):
        with pytest.raises(CacheMismatch, match="drop_path"):
            cache_teacher.run(dropping(home, other))
        with pytest.raises(CacheMismatch, match="drop_path"):
            deep.run(dropping(home, other), home / "cache", sample=4)
    cache_teacher.run(dropping(home, 0.0, cache=home / "plain"))
    plain = CacheReader(home / "plain").layer("x").teacher
    assert "drop_path" not in plain  # so that earlier caches keep their spec_id


def test_a_teacher_in_the_loop_drops_the_same_branches(home: Path) -> None:
    cache_teacher.run(dropping(home))
    cache_teacher.run(dropping(home, num_views=1, cache=home / "half"))
    fields: dict[str, Any] = {"num_views": 2, "layer": "x", "optim": {"batch_size": 8, "steps": 6}}
    losses = []
    for cache, how in (("cache", "refuse"), ("half", "teacher")):
        run = run_in(home / f"run-{how}") | {"log_every": 1}
        train_student.run(student_recipe(home, cache=home / cache, on_missing=how, run=run, **fields))
        losses.append([line["loss"] for line in read_metrics(home / f"run-{how}")])
    assert losses[0] == losses[1]


@pytest.mark.slow  # makes a cache and two pages
def test_fidelity_and_look_see_the_teacher_of_the_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = dropping(home, codec={"name": "dense"}, num_views=1)
    cache_teacher.run(made)
    reader = CacheReader(home / "cache")
    records = [arrays for info in reader.units("x") for _, arrays in reader.each_view(info)]
    stored = {name: np.concatenate([arrays[name] for arrays in records]) for name in reader.arrays("x")}

    drawn, columns = list[Any](), list[Any]()

    def tapped(tried: Any, *rest: Any) -> Any:
        drawn.append(tried)
        return draw(tried, *rest)

    def shown(kind: Any, shapes: Any, targets: Any, *rest: Any) -> Any:
        columns.append(targets)
        return examples(kind, shapes, targets, *rest)

    draw = fidelity._draw
    monkeypatch.setattr(fidelity, "_draw", tapped)
    monkeypatch.setattr(fidelity, "draw_frontier", lambda *_: None)
    fields = {"source": made.source, "views": made.views, "teacher": made.teacher, "run": run_in(home / "run-fidelity")}
    fields |= {"stage": "fidelity", "student": STUDENT, "codecs": {"x": {"name": "dense"}}, "num_images": 24}
    fidelity.run(FidelityRecipe.model_validate(fields | {"batch_size": 8, "loader": {"workers": 0}}))
    for name, values in stored.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in drawn[0].records]), values)

    monkeypatch.setattr(look, "examples", shown)
    key = reader.keys("shard-000001.tar")[2]
    look.run(home / "cache", look.Options(key, home / "look.html", made, None, (), 1, 1))
    for name, exact in columns[0][EXACT].items():
        torch.testing.assert_close(columns[0][STORED][name].probs, exact.probs, rtol=1e-3, atol=1e-6)  # fp16


def test_shares_of_dropped_branches_and_their_scale(home: Path) -> None:
    config = TeacherConfig.model_validate(
        TEACHER | {"block": 2, "weights": str(home / "teacher.safetensors"), "drop_path": 0.3}
    )
    drops = drawn_drops(Teacher(config, [Tap("tokens", 1)]), torch.arange(20_000))
    assert drops is not None and drops.shape == (20_000, 4) and drops.dtype == torch.float64
    paths = [HandedDropPath(0.3) for _ in range(4)]
    drop_by(paths, drops)
    scales = torch.stack([path.scale for path in paths if path.scale is not None])
    assert scales.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    torch.testing.assert_close((scales == 0).float().mean(1), torch.full((4,), 0.3), rtol=0, atol=0.012)
    both = ((scales[0] == 0) & (scales[1] == 0)).float().mean()
    assert float(both) == pytest.approx(0.09, abs=0.01)  # branches are independent
