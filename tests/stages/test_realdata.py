"""The shipped recipes for real photographs and real weights, cut down to seconds."""

from pathlib import Path

import pytest

from tinymim.configs.load import load_recipe
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.stages import cache_teacher, train_student
from tinymim.stages.cache import info
from tinymim.stages.run.folder import read_metrics
from tinymim.storage.reader import CacheReader


@pytest.mark.realdata
def test_imagenet_photographs_through_a_real_teacher_into_a_student(data_root: Path, tmp_path: Path) -> None:
    shards = [f"source.shards={data_root / 'imagenet-sample'}", "source.pattern='*-000000.tar'"]
    common = [*shards, f"cache={tmp_path / 'cache'}", "run.threads=2", "run.device=cpu", "loader.workers=0"]
    weights = data_root / "teachers" / "vit_small_patch14_dinov2.fp16.safetensors"
    cache_recipe = load_recipe(
        Path("imagenet-sample-cache"),
        "cache-teacher",
        [
            *common,
            f"run.folder={tmp_path / 'run-cache'}",
            f"teacher.weights={weights}",
            "teacher.block=2",  # block 9 is the recipe's and takes four times as long
            "num_views=1",
            "audit_views=4",
        ],
    )
    assert isinstance(cache_recipe, CacheTeacherRecipe)
    cache_teacher.run(cache_recipe)
    reader = CacheReader(tmp_path / "cache")
    assert reader.layer().shapes.tokens == 197
    assert reader.coverage().complete and reader.coverage(reader.layer().name).num_records == 70
    student_recipe = load_recipe(
        Path("imagenet-sample-student"),
        "train-student",
        [*common, f"run.folder={tmp_path / 'run'}", "optim.steps=3", "optim.batch_size=8", "run.log_every=1"],
    )
    assert isinstance(student_recipe, TrainStudentRecipe)
    train_student.run(student_recipe)  # every pixel digest is checked
    assert len(read_metrics(tmp_path / "run")) == 3


@pytest.mark.realdata
@pytest.mark.slow  # 20 s of CPU time; a real teacher of 12 blocks
def test_five_layers_of_two_teachers_at_two_sizes_teach_one_student(data_root: Path, tmp_path: Path) -> None:
    shards = [f"source.shards={data_root / 'imagenet-sample'}", "source.pattern='*-000000.tar'"]
    common = [*shards, f"cache={tmp_path / 'cache'}", "run.threads=2", "run.device=cpu", "loader.workers=0"]
    weights = data_root / "teachers" / "vit_small_patch14_dinov2.fp16.safetensors"
    cache_recipe = load_recipe(
        Path("imagenet-sample-teachers"),
        "cache-teacher",
        [*common, f"run.folder={tmp_path / 'run-cache'}", f"teacher.weights={weights}", "num_views=1", "audit_views=0"],
    )
    assert isinstance(cache_recipe, CacheTeacherRecipe)
    cache_teacher.run(cache_recipe)
    found = info.describe(tmp_path / "cache")
    assert [layer["name"] for layer in found["layers"]] == [
        *("views", "views@112", "cls", "features", "ff", "mae", "relations")
    ]
    assert all(layer["coverage"]["num_records"] == 70 for layer in found["layers"])
    mix = "layers={relations: {}, ff: {weight: 0.5}, features: {}, cls: {weight: 0.1}, mae: {weight: 0.2}}"
    for size in ([], ["student.img_size=112", "student.patch_size=8"]):
        student_recipe = load_recipe(
            Path("imagenet-sample-student"),
            "train-student",
            [
                *(*common, *size, mix, f"run.folder={tmp_path / f'run-{len(size)}'}"),
                *("optim.steps=2", "optim.batch_size=4", "run.log_every=1"),
            ],
        )
        assert isinstance(student_recipe, TrainStudentRecipe)
        train_student.run(student_recipe)  # every pixel digest of its size is checked
        assert len(read_metrics(tmp_path / f"run-{len(size)}")) == 2
