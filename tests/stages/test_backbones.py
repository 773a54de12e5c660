"""Pyramids through the commands: a Swin teacher, TinyViT students, and TinyViT on labels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tinymim.configs.errors import RecipeError, UserError
from tinymim.configs.sections.models import ModelConfig
from tinymim.configs.taps import Shapes
from tinymim.models.timm_folder import Pixels
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, build_model
from tinymim.stages import cache_teacher, export, finetune, make_shards, train_student
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages import finetunes
from tinymim.tests.stages.tiny import cache_recipe, losses, student_recipe

TINY_VIT: dict[str, Any] = {
    "name": "tiny_vit_5m_224",
    "img_size": 32,
    "args": {"embed_dims": [8, 8, 8, 16], "depths": [1, 1, 2, 1], "num_heads": [1, 1, 1, 1], "window_sizes": [2] * 4},
}
SWIN: dict[str, Any] = {
    "name": "swin_tiny_patch4_window7_224",
    "img_size": 32,
    "embed_dim": 8,
    "args": {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2},
}


@pytest.mark.parametrize(
    ("codec", "shapes"),
    [
        ({"kind": "features", "tokens": 3}, Shapes(1, 32, 4, 0, (2, 2))),
        ({"kind": "ff", "rows": 4, "at": "block"}, Shapes(1, 32, 4, 0, (2, 2))),
        ({"kind": "cls", "at": "pooled"}, Shapes(1, 64, 1, 0, (1, 1))),
        ({"kind": "logits", "name": "dense", "classes": 7}, Shapes(1, 7, 1, 0, (1, 1))),
    ],
    ids=str,
)
def test_a_swin_teaches_a_tiny_vit(home: Path, codec: dict[str, Any], shapes: Shapes) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig.model_validate(SWIN), num_classes=7)
    torch.nn.init.normal_(model.head.fc.weight)  # type: ignore[union-attr, arg-type]
    save_file(model.state_dict(), home / "swin.safetensors", Pixels(IMAGENET_MEAN, IMAGENET_STD).metadata())
    teacher, place = SWIN | {"block": 3, "weights": str(home / "swin.safetensors")}, home / "other"
    cache_teacher.run(cache_recipe(home, cache=place, teacher=teacher, codec=codec, audit_views=4))
    layer = CacheReader(place).layer()
    assert layer.shapes == shapes and layer.teacher["arch"]["window_size"] == 2
    optim = {"batch_size": 8, "steps": 30, "base_lr": 0.1}
    train_student.run(student_recipe(home, cache=place, student=TINY_VIT, optim=optim))
    found = losses(home)
    assert np.isfinite(found).all() and np.mean(found[-6:]) < np.mean(found[:6])


def test_relations_of_a_swin_are_refused_in_one_line(home: Path) -> None:
    model = build_model(ModelConfig.model_validate(SWIN))
    save_file(model.state_dict(), home / "swin.safetensors", Pixels(IMAGENET_MEAN, IMAGENET_STD).metadata())
    teacher = SWIN | {"block": 3, "weights": str(home / "swin.safetensors")}
    with pytest.raises(RecipeError, match=r"needs a plain ViT(.|\n)*got: SwinTransformer"):
        cache_teacher.run(cache_recipe(home, teacher=teacher, cache=home / "other"))


def test_relations_of_a_vit_teach_a_tiny_vit_that_timm_loads(home: Path) -> None:
    """Its class token is the embedding that its own head reads; its one patch becomes the teacher's sixteen."""
    optim = {"batch_size": 8, "steps": 20, "accumulate": 2}
    recipe = student_recipe(home, student=TINY_VIT, recompute=True, optim=optim)
    train_student.run(recipe)
    folder = recipe.run.folder
    assert np.isfinite(losses(home)).all()
    model = timm.create_model(f"local-dir:{folder / 'student'}", pretrained=True, num_classes=0)
    own = load_file(folder / "student.safetensors")
    assert model.state_dict().keys() == own.keys()
    assert all(torch.equal(each, own[name]) for name, each in model.state_dict().items())
    report = export.run(folder / "student", home / "out.pt2", "torch-export")
    assert report["max_difference"] < 1e-4 and report["img_size"] == 32


def test_masks_are_refused_by_models_of_maps(home: Path) -> None:
    save_file(
        build_model(ModelConfig.model_validate(SWIN)).state_dict(),
        home / "swin.safetensors",
        Pixels(IMAGENET_MEAN, IMAGENET_STD).metadata(),
    )
    teacher, mask = SWIN | {"block": 3, "weights": str(home / "swin.safetensors")}, {"ratio": 0.5}
    with pytest.raises(RecipeError, match=r"SwinTransformer cannot run on visible patches alone"):
        cache_teacher.run(cache_recipe(home, teacher=teacher, codec={"kind": "features"}, mask=mask, cache=home / "m"))
    for hide in ("drop", "token"):
        with pytest.raises(RecipeError, match=r"TinyVit cannot run on visible patches alone"):
            train_student.run(student_recipe(home, student=TINY_VIT, mask=mask | {"hide": hide}))


# ---------------------------------------------------------------- labels


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    make_shards.run("drawn", folder, make_shards.Options(count=80, images_per_shard=16, seed=5))
    return folder


@pytest.mark.parametrize("mode", ["train", "frozen", "sync"])
def test_batch_norms_follow_the_recipe(labelled: Path, tmp_path: Path, mode: str) -> None:
    """`sync` on one rank is `train`."""
    fields: dict[str, Any] = {"model": TINY_VIT, "batch_norm": mode, "ema": None}
    fields["optim"] = {"batch_size": 8, "steps": 4, "base_lr": 0.01, "layer_decay": 0.8}
    finetune.run(finetunes.recipe(labelled, tmp_path / "run", **fields))
    found = {n: each for n, each in load_file(tmp_path / "run" / "last.safetensors").items() if "running_" in n}
    fresh = {name: float("mean" not in name) for name in found}
    still = all(bool((each == fresh[name]).all()) for name, each in found.items())
    assert found and still == (mode == "frozen")


def test_frozen_batch_norms_and_recomputation_change_no_gradient(labelled: Path, tmp_path: Path) -> None:
    """In parts or whole, with or without activations kept: the same losses, where batches do not matter."""
    found = []
    for number, (recompute, accumulate) in enumerate([(False, 1), (True, 1), (False, 2)]):
        optim = {"batch_size": 8, "steps": 4, "base_lr": 0.01, "accumulate": accumulate}
        fields: dict[str, Any] = {"model": TINY_VIT, "batch_norm": "frozen", "recompute": recompute, "optim": optim}
        finetune.run(finetunes.recipe(labelled, tmp_path / str(number), **fields))
        found.append(finetunes.losses(tmp_path / str(number)))
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-4)


def test_a_classifier_without_a_class_token_is_refused(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pool: cls needs a class token"):
        finetune.run(finetunes.recipe(labelled, tmp_path / "run", model=TINY_VIT, pool="cls"))
