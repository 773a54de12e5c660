"""Both stages on a GPU: the cache made there is the cache made here, and a student trains from it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.stages import cache_teacher, finetune, make_shards, plan, train_student
from tinymim.stages.run.folder import read_metrics
from tinymim.stages.training.learner import LossWatch
from tinymim.storage.layout import VIEWS
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages.finetunes import losses, recipe
from tinymim.tests.stages.tiny import STATED, STUDENT, student_recipe

SIZES: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}


def cache_recipe(root: Path, device: str) -> CacheTeacherRecipe:
    return CacheTeacherRecipe.model_validate(
        {
            "stage": "cache-teacher",
            "source": {"shards": root / "shards"},
            "views": {"size": 64},
            "teacher": {
                "name": "vit_tiny_patch16_224",
                "block": 2,
                "weights": str(root / "teacher.safetensors"),
                **SIZES,
            },
            "codec": {"name": "dense"},
            "cache": root / f"cache-{device}",
            "loader": {"workers": 0},
            "run": {"folder": root / f"run-cache-{device}", "device": device},
        }
    )


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_cache_from_the_gpu_equals_one_from_the_cpu_and_trains(tmp_path: Path, precision: str) -> None:
    make_shards.run("drawn", tmp_path / "shards", make_shards.Options(count=64, images_per_shard=32))
    torch.manual_seed(0)
    save_file(
        timm.create_model("vit_tiny_patch16_224", num_classes=0, **SIZES).state_dict(),
        tmp_path / "teacher.safetensors",
        STATED,
    )
    records = {}
    for device in ("cpu", "cuda"):
        cache_teacher.run(cache_recipe(tmp_path, device))
        reader = CacheReader(tmp_path / f"cache-{device}")
        records[device] = {
            name: values
            for layer in (VIEWS, reader.layer().name)
            for name, values in reader.read_views(reader.units(layer)[0]).items()
        }
    assert np.array_equal(records["cpu"]["digest"], records["cuda"]["digest"])
    for name in ("qk_probs", "vv_probs"):
        cpu, gpu = records["cpu"][name].astype(np.float32), records["cuda"][name].astype(np.float32)
        np.testing.assert_allclose(gpu, cpu, atol=2e-3)  # TF32 and fp16 storage
    train_student.run(
        TrainStudentRecipe.model_validate(
            {
                "stage": "train-student",
                "source": {"shards": tmp_path / "shards"},
                "cache": tmp_path / "cache-cuda",
                "student": {"name": "vit_tiny_patch16_224", **SIZES, "embed_dim": 32, "num_heads": 2},
                "optim": {"batch_size": 32, "steps": 40, "base_lr": 0.02},
                "precision": precision,
                "loader": {"workers": 0},
                "run": {"folder": tmp_path / "run", "device": "cuda", "log_every": 1},
            }
        )
    )
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]


@pytest.mark.gpu
def test_two_gpus_train_like_one(home: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two CUDA devices")
    students: dict[str, Any] = {"one": {"model": STUDENT}, "other": {"model": STUDENT, "ema": {}}}
    optim = {"batch_size": 8, "steps": 12, "base_lr": 0.1, "accumulate": 2}
    found = {}
    for workers in (1, 2):
        folder = home / f"run-{workers}"
        run = {"folder": folder, "device": "cuda", "log_every": 1}
        recipe = {"student": None, "students": students, "optim": optim, "order": {"lanes": 2}, "workers": workers}
        train_student.run(student_recipe(home, **recipe, run=run))
        found[workers] = {name: [line["loss"] for line in read_metrics(folder / name)] for name in students}
    for name in students:
        assert len(found[2][name]) == 12
        np.testing.assert_allclose(found[2][name], found[1][name], rtol=2e-3, atol=2e-4)  # TF32


@pytest.mark.gpu
def test_students_on_several_devices_share_one_stream_and_train_as_alone(home: Path) -> None:
    devices = {"here": "cpu", **{f"gpu{number}": f"cuda:{number}" for number in range(torch.cuda.device_count())}}
    students = {name: {"model": STUDENT, "device": device} for name, device in devices.items()}
    recipe = student_recipe(home, student=None, students=students)
    train_student.run(recipe)
    for name, alone in recipe.each().items():
        assert alone.run.device == devices[name]
        folder = home / f"alone-{name}"
        train_student.run(alone.model_copy(update={"run": alone.run.model_copy(update={"folder": folder})}))
        shared = [line["loss"] for line in read_metrics(home / "run-student" / name)]
        one = [line["loss"] for line in read_metrics(folder)]
        if devices[name] == "cpu":
            assert shared == one
        else:  # a GPU adds up a convolution's gradients in any order
            np.testing.assert_allclose(shared, one, rtol=2e-3, atol=2e-4)
    assert len(shared) == 20


@pytest.mark.gpu
def test_a_loss_that_is_not_finite_is_named_though_a_gpu_is_looked_at_late() -> None:
    watch = LossWatch(torch.device("cuda"))
    for step in range(6):
        watch.note(step, torch.tensor(float("nan") if step == 3 else 1.0, device="cuda"))
    assert watch.first_broken(wait=True) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_fine_tuning_on_the_gpu_is_that_of_the_cpu(tmp_path: Path, precision: str) -> None:
    """RandAugment, erasing, mixup and dropped paths are the same draws there."""
    make_shards.run("drawn", tmp_path / "shards", make_shards.Options(count=80, images_per_shard=16))
    found = {}
    for device, used in (("cpu", "fp32"), ("cuda", precision)):
        run = {"folder": tmp_path / device, "device": device, "log_every": 1}
        optim = {"batch_size": 16, "steps": 4, "base_lr": 0.05}
        report = finetune.run(recipe(tmp_path / "shards", tmp_path, run=run, optim=optim, precision=used))
        assert report is not None and report["num_val_images"] == 16
        found[device] = losses(tmp_path / device)
    np.testing.assert_allclose(found["cuda"], found["cpu"], rtol=1e-2 if precision == "fp32" else 5e-2)


@pytest.mark.gpu
def test_a_plan_measures_the_memory_of_a_teacher_in_the_loop(tmp_path: Path) -> None:
    make_shards.run("drawn", tmp_path / "shards", make_shards.Options(count=64, images_per_shard=32))
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SIZES)
    save_file(model.state_dict(), tmp_path / "teacher.safetensors", STATED)
    run = {"folder": tmp_path / "run-student", "device": "cuda"}
    fields: dict[str, Any] = {"on_missing": "teacher", "num_views": 2, "fresh": 0.5, "run": run}
    student = student_recipe(tmp_path, student=STUDENT | {"img_size": 64}, **fields)
    found = plan.run(cache_recipe(tmp_path, "cuda"), {"s": student}, plan.Options(seconds=2))
    loop = found["measured"]["students"][0]["in_loop"]
    assert loop["pass_bytes"] > 64 * 3 * 64 * 64 and loop["weights_bytes"] > 0  # at least the pixels
