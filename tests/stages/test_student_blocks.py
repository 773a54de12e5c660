"""Layers that blocks of a student learn, both sides drop branches: mistakes, damage, kills, ranks, export."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from tinymim.configs.load import dump_recipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.sections.models import ModelConfig
from tinymim.models.student import build_student
from tinymim.stages import cache_teacher, export, finetune, train_student
from tinymim.stages.run.folder import read_metrics
from tinymim.stages.training.states import read_state
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages import finetunes
from tinymim.tests.stages.conftest import Run
from tinymim.tests.stages.ranks import meanwhile
from tinymim.tests.stages.tiny import STUDENT, TEACHER, cache_recipe, copied, run_in, student_recipe

DEEP = STUDENT | {"depth": 3}
LAYERS: dict[str, Any] = {
    "rel": {"student_block": 2},
    "feat": {"student_block": 1, "weight": 0.5},
    "attn": {"student_block": 3},
}
TARGETS: dict[str, Any] = {
    "rel": {"codec": {"rows": 6, "head_k": 1, "tail_k": 3}},
    "feat": {"codec": {"kind": "features", "name": "int8"}},
    "attn": {"codec": {"kind": "attention", "rows": 8}},
}
# Behind q and k of the last block, which no loss sees.
UNSEEN = {f"blocks.2.{part}.{w}" for part in ("attn.proj", "norm2", "mlp.fc1", "mlp.fc2") for w in ("weight", "bias")}
UNSEEN |= {"norm.weight", "norm.bias"}


@pytest.fixture(scope="module")
def blocks(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of three layers by a teacher that drops branches."""
    root = copied(made, tmp_path_factory.mktemp("blocks") / "made")
    teacher = TEACHER | {"block": 2, "weights": str(root / "teacher.safetensors"), "drop_path": 0.3}
    cache_teacher.run(cache_recipe(root, codec=None, teacher=teacher, targets=TARGETS, cache=root / "blocks"))
    return root


def recipe(root: Path, folder: Path, **changes: Any) -> TrainStudentRecipe:
    """The student drops branches, too, and a state is saved every third step."""
    fields: dict[str, Any] = {
        "cache": root / "blocks",
        "layers": LAYERS,
        "student": DEEP,
        "drop_path": 0.3,
        "optim": {"batch_size": 8, "steps": 12, "base_lr": 0.1, "warmup": 0.2},
        "order": {"shuffle_units": 2, "lanes": 2},
        "checkpoint": {"every_steps": 3},
        "run": run_in(folder) | {"log_every": 1},
    }
    return student_recipe(root, **(fields | changes))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "student.safetensors")


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder)]


def same_training(folder: Path, other: Path) -> None:
    ours, theirs = weights(folder), weights(other)
    assert losses(folder) == losses(other) and all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


# ---------------------------------------------------------------- mistakes


def test_mistakes_name_the_student_and_exit_with_2(home: Path, tmp_path: Path, run: Run) -> None:
    [layer] = CacheReader(home / "cache").layers
    fields: dict[str, Any] = {"cache": home / "cache", "student": None}

    def refused(*words: str, **changes: Any) -> None:
        (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(home, tmp_path / "run", **(fields | changes))))
        code, _, told = run("train-student", tmp_path / "recipe.yaml")
        assert code == 2 and all(word in told for word in words), told
        assert not (tmp_path / "run").exists()

    several = {"students": {"deep": {"model": DEEP}, "flat": {"model": STUDENT | {"depth": 1}}}}
    at_two = {"layers": {layer: {"student_block": 2}}}
    outside = ("error: student flat: student_block is outside the student\n", "got: 2", "expected: 1..1")
    refused(*outside, **several, **at_two)
    refused(*outside, **several, **at_two, on_missing="teacher", num_views=2)
    refused("has no layer none", f"got: {layer}", student=DEEP, layers={"none": {"student_block": 1}})


# ---------------------------------------------------------------- worst days


@pytest.mark.slow  # trains three times
def test_a_flipped_byte_of_any_layer_is_named(blocks: Path, tmp_path: Path, run: Run) -> None:
    home = copied(blocks, tmp_path / "home")
    for number, layer in enumerate(LAYERS):
        unit = home / "blocks" / "layers" / layer / f"shard-00000{number}" / "v0-1.zip"
        whole = unit.read_bytes()
        middle = len(whole) // 2
        unit.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        (home / "recipe.yaml").write_text(dump_recipe(recipe(home, home / layer)))
        code, _, told = run("train-student", home / "recipe.yaml")
        assert code == 2 and f"unit shard-00000{number}.tar v0-1 of layer {layer} " in told
        assert "committed checksum" in told and "`tinymim cache repair RECIPE`" in told
        assert not (home / layer / "student.safetensors").exists()
        unit.write_bytes(whole)


@pytest.mark.slow  # starts a process
def test_a_killed_training_goes_on_to_the_same_bits(blocks: Path, tmp_path: Path) -> None:
    made = recipe(blocks, tmp_path / "killed")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(made))
    script = f"""
import os, signal
from pathlib import Path
from tinymim.configs.load import load_recipe
from tinymim.stages import train_student
from tinymim.stages.training.student_step import StudentStep
update = StudentStep.update
def dying(self, step):
    update(self, step)
    if step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
StudentStep.update = dying
train_student.run(load_recipe(Path({str(tmp_path / "recipe.yaml")!r}), "train-student"))
"""
    died = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert max(path.name for path in made.run.folder.glob("state-*")) == "state-00000006.pt"
    train_student.run(made)
    train_student.run(recipe(blocks, tmp_path / "whole"))
    same_training(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow  # starts workers three times
def test_two_ranks_train_like_one_also_after_a_kill(
    blocks: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    optim = {"batch_size": 8, "steps": 60, "base_lr": 0.1, "warmup": 0.2}
    train_student.run(recipe(blocks, tmp_path / "one", optim=optim))
    train_student.run(recipe(blocks, tmp_path / "two", optim=optim, workers=2))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4, atol=2e-5)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, ours in two.items():
        rows = torch.ones(len(ours), dtype=torch.bool)
        if name.endswith("qkv.bias"):
            rows[8:16] = False  # a softmax hides the bias of k: its gradients are rounding
        torch.testing.assert_close(ours[rows], one[name][rows], rtol=1e-3, atol=2e-4)
    for folder in ("one", "two"):
        assert set(json.loads((tmp_path / folder / "trained.json").read_text())["never_updated"]) == UNSEEN

    killed = tmp_path / "killed"
    with meanwhile(
        lambda: any(killed.glob("state-*.pt")),
        lambda: os.kill(multiprocessing.active_children()[1].pid or 0, signal.SIGKILL),
    ):
        train_student.run(recipe(blocks, killed, optim=optim, workers=2))
    assert "restart 1 of 3 from the last state" in capfd.readouterr().err
    same_training(killed, tmp_path / "two")


# ---------------------------------------------------------------- what comes after


@pytest.mark.slow  # trains and fine-tunes
def test_a_student_with_inner_heads_is_exported_and_fine_tuned(blocks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run-student"
    train_student.run(recipe(blocks, folder, ema={"decay": 0.5}))
    state = {name.removeprefix("vit."): each for name, each in read_state(folder)["parts"]["student"].items()}
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    trained: Any = build_student(ModelConfig.model_validate(DEEP)).eval()
    trained.load_state_dict({name: each for name, each in state.items() if not name.startswith("head.")})
    model: Any = timm.create_model(f"local-dir:{folder / 'student'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model.forward_features(images), trained.forward_features(images))
    assert export.run(folder, tmp_path / "student.pth")["depth"] == 3
    assert export.run(folder, tmp_path / "timm", "timm")["max_difference"] < 1e-5
    fields: dict[str, Any] = {
        "train": {"shards": blocks / "shards", "pattern": "*[01].tar"},
        "val": {"shards": blocks / "shards", "pattern": "*2.tar"},
        "model": DEEP,
        "weights": str(folder / "student.safetensors"),
        "optim": {"batch_size": 8, "steps": 3, "base_lr": 1e-3},
    }
    finetune.run(finetunes.recipe(blocks / "shards", tmp_path / "tuned", **fields))
    assert len(found := finetunes.losses(tmp_path / "tuned")) == 3 and np.isfinite(found).all()
