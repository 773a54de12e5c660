"""The experiments behind docs/evidence.md: every arm is a valid recipe, and what the page says is computed rightly."""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import timm
from safetensors.torch import load_file, save_file

from tinymim.configs.load import load_recipe
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.tests.stages.tiny import STATED

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("evidence")


@pytest.fixture
def lab(evidence: Any, tmp_path: Path) -> Any:
    flags = {
        "data": Path("data"),
        "folder": tmp_path,
        "results": tmp_path,
        "teacher": Path("teacher.safetensors"),
        "classifier": Path("classifier.safetensors"),
        "threads": 1,
    }
    return evidence.Lab(argparse.Namespace(**flags))


def test_every_arm_is_a_recipe_and_every_cache_is_used(evidence: Any, lab: Any) -> None:
    used = set()
    for _, arm, seed in evidence.all_runs():
        command, base, sets = lab.training(arm, seed, Path("runs/x"))
        recipe: Any = load_recipe(Path(base), command, sets)
        assert (recipe.run.seed, recipe.order.seed, recipe.optim.steps) == (seed, seed, arm.steps)
        if arm.kind != "random":
            assert recipe.optim.base_lr == evidence.RATES[arm.kind]
        if arm.kind == "cached":
            used |= {arm.cache} | {name for name, each in evidence.CACHES.items() if each.after == arm.cache}
            cache = lab.cache(arm.cache)
            assert isinstance(recipe, TrainStudentRecipe) and recipe.cache == cache.cache
            assert recipe.source.pattern == cache.source.pattern and (recipe.num_views or 2) <= cache.num_views
    assert used == set(evidence.CACHES)


def test_no_two_runs_share_a_folder(evidence: Any) -> None:
    names = [evidence._name(arm, seed) for _, arm, seed in evidence.all_runs()]
    assert len(set(names)) == len(names)


def test_all_kinds_have_an_arm(evidence: Any) -> None:
    assert {arm.kind for _, arm, _ in evidence.all_runs()} == set(get_args(evidence.Kind))


def test_a_run_is_taken_once_and_again_after_a_kill(evidence: Any, tmp_path: Path) -> None:
    assert evidence._taken(tmp_path / "run")
    (tmp_path / "run" / "taken-by").write_text("1")  # somebody who lives
    assert not evidence._taken(tmp_path / "run")
    (tmp_path / "run" / "taken-by").write_text(str(2**22 + 1))  # beyond Linux's largest process number
    assert evidence._taken(tmp_path / "run")


def test_differences_are_paired_by_seed_with_students_interval(evidence: Any, tmp_path: Path) -> None:
    page = importlib.import_module("evidence_page")
    online, sketch = evidence.EXPERIMENTS["1"].arms[:2]
    # By hand: differences 1, 2, 3 -> mean 2, sd 1, 4.303 x 1 / sqrt(3) = 2.48; the fourth seed has no partner.
    found = {online.name: (20, 30, 40), sketch.name: (21, 32, 43, 99)}
    for name, accuracies in found.items():
        for seed, top1 in enumerate(accuracies):
            record = {"experiment": "1", "arm": name, "student": "", "seed": seed, "train_cpu_s": 3.0}
            record |= {"knn_top1": top1 / 100, "linear_top1": 0.5}
            (tmp_path / f"{name}{seed}.json").write_text(json.dumps(record))
    (tmp_path / "finetune.json").write_text(json.dumps({"arm": sketch.name, "seed": 0, "finetune_top1": 0.25}))
    [row] = [line for line in page.page(tmp_path, [], ["1"]).splitlines() if line.startswith(f"| {sketch.name} | 4 ")][
        :1
    ]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:8] == ["48.8 ± 34.7", "50.0 ± 0.0", "25.0", "+2.0 ± 2.5", "+0.0 ± 0.0", ""]


def test_a_best_rate_at_an_end_of_the_range_has_the_next_one_tried(evidence: Any, tmp_path: Path) -> None:
    lab = evidence.Lab.__new__(evidence.Lab)
    lab.results = tmp_path
    assert lab.best_rate("ff") is None
    for target, best in (("ff", 9.6e-2), ("cls", 2.4e-2), ("logits", 4.8e-2)):
        for rate in evidence.TRIED_FOR_TARGETS[1:-1]:
            name = evidence._name(evidence.of_rate(target, rate), evidence.TUNE_SEED)
            found = {"knn_top1": 0.2 + (rate == best) / 10, "linear_top1": 0.3}
            (tmp_path / f"{name}.json").write_text(json.dumps(found))
        assert lab.best_rate(target) == best
    tried = [arm.name for number, arm in evidence._rates(lab) if number == "8"]
    ends = [name for name in tried if name.endswith((" 0.012", " 0.192"))]
    assert ends == ["ff, base_lr 0.192", "cls, base_lr 0.012"]


@pytest.mark.parametrize("wanted", ["relations", "features", "strange relations"])
def test_a_student_trains_with_the_teacher_in_the_loop(
    evidence: Any, drawn_shards: Path, tmp_path: Path, wanted: str
) -> None:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    weights = tmp_path / "teacher.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes).state_dict(), weights, STATED)
    shared = {"source": {"shards": drawn_shards}, "run": {"folder": tmp_path / "run", "device": "cpu", "log_every": 1}}
    teacher = {"name": "vit_tiny_patch16_224", "block": 2, "weights": str(weights), **sizes}
    cache = CacheTeacherRecipe.model_validate(
        {"stage": "cache-teacher", "views": {"size": 32}, "teacher": teacher, "cache": tmp_path / "cache", **shared}
    )
    student = {"name": "vit_tiny_patch16_224", **sizes | {"embed_dim": 24}}
    optim = {"batch_size": 4, "steps": 2, "warmup": 0}
    recipe = TrainStudentRecipe.model_validate(
        {"stage": "train-student", "cache": tmp_path / "cache", "student": student, "optim": optim, **shared}
        | {"loader": {"workers": 0}}
    )
    importlib.import_module("evidence_online").train(recipe, cache, wanted)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    names = {"mse_features"} if wanted == "features" else {"kl_qk", "kl_vv"}
    for line in lines:
        losses = {name: value for name, value in line.items() if name.startswith(("kl_", "mse_"))}
        assert losses.keys() == names and line["loss"] == pytest.approx(sum(losses.values())) and line["loss"] > 0
    exported = load_file(tmp_path / "run" / "student.safetensors")
    timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes | {"embed_dim": 24}).load_state_dict(exported)
