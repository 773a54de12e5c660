"""DeiT's class distillation: its losses in float64, what the teacher sees, and a fine-tuning with it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open

from tinymim.configs.errors import CheckpointError, RecipeError
from tinymim.configs.schema.finetune import FinetuneRecipe
from tinymim.configs.sections.models import ClassTeacherConfig, ModelConfig
from tinymim.models.checkpoints import to_safetensors
from tinymim.models.classifier import build_classifier, load_classifier
from tinymim.models.vit import Normalise, build_model, build_vit
from tinymim.stages import finetune, make_shards
from tinymim.stages.run.folder import read_metrics
from tinymim.stages.training.class_teacher import ClassTeacher, distillation_loss
from tinymim.stages.training.optim import state_identity
from tinymim.tests.stages.finetunes import MODEL, losses
from tinymim.tests.stages.finetunes import recipe as plain_recipe
from tinymim.tests.stages.tiny import STATED

STUDENT = MODEL | {"name": "deit_tiny_distilled_patch16_224"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards.run("drawn", folder, make_shards.Options(count=80, images_per_shard=16, seed=5))
    return folder


def teacher_file(folder: Path, classes: int = 10) -> str:
    torch.manual_seed(11)
    model = build_model(ModelConfig.model_validate(MODEL), num_classes=classes)
    torch.nn.init.normal_(model.head.weight)  # type: ignore[union-attr,arg-type]
    (folder / "teacher.safetensors").write_bytes(to_safetensors(model.state_dict(), STATED))
    return str(folder / "teacher.safetensors")


def recipe(
    shards: Path, folder: Path, weights: str, distil: dict[str, Any] | None = None, **more: Any
) -> FinetuneRecipe:
    taught = MODEL | {"weights": weights} | (distil or {})
    fields: dict[str, Any] = {"model": STUDENT, "pool": "cls", "distil": taught}
    fields |= {"optim": {"batch_size": 8, "steps": 6, "base_lr": 0.05}, "ema": None}
    return plain_recipe(shards, folder, **(fields | more))


def test_the_losses_are_deits_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 7, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    counts = torch.tensor([True, True, False, True, True])
    s, t, used = student.numpy(), teacher.numpy(), counts.numpy()

    def log_softmax(x: Any) -> Any:
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    hard = -log_softmax(s)[np.arange(5), t.argmax(axis=1)]
    p, q = log_softmax(t / 2.5), log_softmax(s / 2.5)
    soft = (np.exp(p) * (p - q)).sum(axis=1) * 2.5**2 / 7
    for loss, rows in (("hard", hard), ("soft", soft)):
        config = ClassTeacherConfig.model_validate({"loss": loss, "temperature": 2.5})
        assert float(distillation_loss(student, teacher, counts, config)) == pytest.approx((rows * used).sum() / 5)


def test_the_teacher_sees_the_students_pixels_in_its_own_normalisation(shards: Path, tmp_path: Path) -> None:
    weights, means = teacher_file(tmp_path), {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    wanted = recipe(shards, tmp_path, weights, means)
    student = build_classifier(wanted.model, 10, "cls")
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    given = ClassTeacher(wanted, student, Normalise(), torch.device("cpu"))(Normalise()(pixels))
    model = build_model(ModelConfig.model_validate(MODEL), num_classes=10).eval()
    load_classifier(model, ModelConfig.model_validate(MODEL), weights)
    with torch.no_grad():
        expected = model((pixels / 255 - 0.5) / 0.5)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


def test_a_vits_weights_get_a_new_token_without_a_position(tmp_path: Path) -> None:
    config = ModelConfig.model_validate(STUDENT)
    vit = build_vit(ModelConfig.model_validate(MODEL))
    (tmp_path / "vit.safetensors").write_bytes(to_safetensors(vit.state_dict(), STATED))
    model = build_classifier(config, 10, "cls")
    loaded = load_classifier(model, config, str(tmp_path / "vit.safetensors"))
    assert loaded.new == ("dist_token", "head.bias", "head.weight", "head_dist.bias", "head_dist.weight")
    ours, theirs = model.state_dict()["pos_embed"], vit.state_dict()["pos_embed"]
    assert torch.equal(ours[:, :1], theirs[:, :1]) and torch.equal(ours[:, 2:], theirs[:, 1:]) and not ours[:, 1].any()


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("deit_tiny_distilled_patch16_224", "hard"),
        ("tinymim_star_tiny_patch16_224", "soft"),
        ("mae_lite_distilled_tiny_patch16_224", "hard"),
    ],
)
def test_a_fine_tuning_learns_from_both_and_exports_both_heads(
    name: str, loss: str, shards: Path, tmp_path: Path
) -> None:
    weights = teacher_file(tmp_path)
    own = {"model": MODEL | {"name": name}, "pool": "mean" if "mae_lite" in name else "cls"}
    report = finetune.run(recipe(shards, tmp_path / "run", weights, {"loss": loss, "weight": 0.25}, **own))
    assert report is not None and report["weights"]["last.safetensors"]["top1"] >= 0
    for line in read_metrics(tmp_path / "run"):
        if "loss" in line:
            assert line["loss"] == pytest.approx(0.75 * line["ce_labels"] + 0.25 * line["ce_teacher"], rel=1e-5)
    with safe_open(tmp_path / "run" / "last.safetensors", "pt") as file:
        model = timm.create_model(**json.loads(file.metadata()["timm"]))
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dictionary
    model.load_state_dict(state, strict=True)
    assert state["head_dist.weight"].any()
    halves = recipe(shards, tmp_path / "parts", weights, {"loss": loss, "weight": 0.25}, drop_path=0.0, **own)
    finetune.run(halves)
    optim = halves.optim.model_copy(update={"accumulate": 2})
    finetune.run(
        halves.model_copy(update={"optim": optim, "run": halves.run.model_copy(update={"folder": tmp_path / "2"})})
    )
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "parts"), rel=1e-4)


def test_what_does_not_fit_is_refused(shards: Path, tmp_path: Path) -> None:
    weights = teacher_file(tmp_path)
    with pytest.raises(ValueError, match="set pool: cls"):
        recipe(shards, tmp_path, weights, pool="mean")
    with pytest.raises(RecipeError, match="distillation token"):
        finetune.run(recipe(shards, tmp_path / "run", weights, model=MODEL))
    with pytest.raises(CheckpointError, match="other classes"):
        finetune.run(recipe(shards, tmp_path / "run", teacher_file(tmp_path, classes=9)))


def test_a_state_depends_on_the_teacher_only_where_there_is_one(shards: Path, tmp_path: Path) -> None:
    weights = teacher_file(tmp_path)
    with_one, moved = recipe(shards, tmp_path, weights), recipe(shards, tmp_path, "elsewhere.safetensors")
    soft = recipe(shards, tmp_path, weights, {"loss": "soft"})
    without = with_one.model_copy(update={"distil": None})
    identities = [state_identity(each, ["x"]) for each in (with_one, moved, soft, without)]
    assert identities[0] == identities[1] and len(set(identities)) == 3
