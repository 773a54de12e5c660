"""Every arm in the headers of the small recipes trains a student for a step, on drawn images and a random teacher."""

from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file

from tinymim.configs.load import load_recipe
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.models.vit import size_overrides
from tinymim.stages import cache_teacher, make_shards, train_student
from tinymim.stages.run.folder import read_metrics
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages.tiny import STATED
from tinymim.tests.test_readme import commands

FAMILIES = {
    "tinyimagenet40-ablation": ("tinyimagenet40-ablation-cache", 15),
    "tinyimagenet40-dino-student": ("tinyimagenet40-dino-cache", 2),
    "tinyimagenet40-mae-lite-coupled": ("tinyimagenet40-mae-lite-coupled-cache", 3),
    "tinyimagenet40-logits-student": ("tinyimagenet40-logits-cache", 3),
}


def write_teacher(recipe: CacheTeacherRecipe, classes: int, path: Path) -> None:
    teacher = recipe.teacher
    model: Any = timm.create_model(
        teacher.name, num_classes=classes, img_size=teacher.img_size, **size_overrides(teacher)
    )
    save_file(model.state_dict(), path, STATED)


@pytest.mark.slow  # 15 s; the parts are tested by kind, and the commands by test_readme.py
@pytest.mark.parametrize("name", FAMILIES)
def test_every_arm_of_a_small_recipe_trains(name: str, tmp_path: Path) -> None:
    of_cache, count = FAMILIES[name]
    make_shards.run("drawn", tmp_path / "shards", make_shards.Options(24, count=24, seed=5))
    common = [f"source.shards={tmp_path / 'shards'}", "source.pattern=*.tar", f"cache={tmp_path / 'cache'}"]
    common += ["run.device=cpu", "run.threads=1", "loader.workers=0"]
    weights = f"teacher.weights={tmp_path / 'teacher.safetensors'}"
    cached = [*common, weights, "num_views=1", "audit_views=0", f"run.folder={tmp_path / 'run'}"]
    recipe = load_recipe(Path(of_cache), "cache-teacher", cached)
    assert isinstance(recipe, CacheTeacherRecipe)
    write_teacher(recipe, 40 if "logits" in name else 0, tmp_path / "teacher.safetensors")
    cache_teacher.run(recipe)
    assert CacheReader(tmp_path / "cache").layers.keys() == recipe.layers.keys()
    arms = [command[2:] for command in commands() if command[:2] == ["train-student", name]]
    assert len(arms) == count
    for number, arm in enumerate(arms):
        folder = tmp_path / f"arm-{number}"
        own = [value for value in arm if value != "--set"]
        short = [f"run.folder={folder}", "optim.batch_size=6", "optim.steps=1", "optim.epochs=null", "run.log_every=1"]
        student = load_recipe(Path(name), "train-student", [*own, *common, *short])
        assert isinstance(student, TrainStudentRecipe)
        train_student.run(student)
        assert len(read_metrics(folder)) == 1
