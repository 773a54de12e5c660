"""Students with the parts of their teacher's family, and the warning where they lack them."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tinymim.configs.sections.models import ModelConfig
from tinymim.configs.taps import Tap
from tinymim.models import backbone
from tinymim.models.native_parts import missing_parts
from tinymim.models.student import build_student
from tinymim.models.vit import build_model
from tinymim.stages import cache_teacher, train_student
from tinymim.tests.stages.tiny import STUDENT, cache_recipe, student_recipe, write_set

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
NATIVE = {
    "vit_tiny_patch16_224": set(),
    "vit_small_patch14_dinov2": {"LayerScale"},
    "vit_small_patch14_reg4_dinov2": {"LayerScale", "registers"},
    "vit_small_patch16_dinov3": {"LayerScale", "registers", "RoPE"},
    "vit_base_patch16_clip_224": {"norm before the blocks"},
}
QKV, TOKENS = (Tap("qkv", 1),), (Tap("tokens"),)


@pytest.mark.parametrize("name", list(NATIVE))
def test_the_parts_of_a_model(name: str) -> None:
    with torch.device("meta"):
        assert backbone.native_parts(build_model(ModelConfig(name=name, **SIZES))) == NATIVE[name]


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3"]
)
def test_a_student_may_have_registers_layer_scale_and_rope(name: str, tmp_path: Path) -> None:
    """It trains all its tensors but fixed positions, keeps its parts at export, and timm loads the folder."""
    root = write_set(tmp_path, 12, 12)
    targets = {"ff": {"codec": {"kind": "ff", "rows": 4}}, "cls": {"codec": {"kind": "cls"}}}
    cache_teacher.run(cache_recipe(root, codec=None, targets=targets))
    student = STUDENT | {"name": name}
    wanted = {
        "student": student,
        "layers": {"ff": {}, "cls": {}},
        "drop_path": 0.5,
        "optim": {"batch_size": 6, "steps": 3},
    }
    train_student.run(student_recipe(root, **wanted))
    model = timm.create_model(f"local-dir:{root / 'run-student' / 'student'}", pretrained=True)
    assert backbone.native_parts(model) == NATIVE[name]
    fresh = build_student(ModelConfig(**student)).state_dict()
    assert fresh.keys() == model.state_dict().keys()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, fresh[key])}
    assert {"reg_token"} & fresh.keys() <= moved and any("gamma" in key for key in moved)


@pytest.mark.parametrize(
    ("teacher", "student", "taps", "words"),
    [
        (
            "vit_small_patch14_reg4_dinov2.lvd142m",
            "vit_tiny_patch16_224",
            QKV,
            "lacks the LayerScale, registers of its",
        ),
        ("vit_small_patch16_dinov3", "vit_small_patch14_reg4_dinov2", QKV, "lacks the RoPE of its teacher"),
        ("vit_base_patch16_clip_224.openai", "vit_tiny_patch16_224", (Tap("attention", 2),), "lacks the norm before"),
        ("vit_small_patch14_dinov2", "vit_small_patch14_dinov2", QKV, ""),
        ("vit_small_patch14_dinov2", "vit_tiny_patch16_224", TOKENS, ""),  # features, not attention
        ("vit_base_patch16_224.mae", "vit_tiny_patch16_224", QKV, ""),
        ("hf-hub:someone/dinov2", "vit_tiny_patch16_224", QKV, ""),
    ],
)
def test_a_warning_names_the_parts_that_a_student_lacks(teacher: str, student: str, taps: Any, words: str) -> None:
    with torch.device("meta"):
        model = build_student(ModelConfig(name=student, **SIZES))
    found = missing_parts(model, {"name": teacher, "arch": SIZES}, taps)
    assert words in found and bool(words) == bool(found)


def test_further_arguments_of_the_teacher_count() -> None:
    model = build_student(ModelConfig(name="vit_small_patch14_dinov2", **SIZES))
    assert not missing_parts(model, {"name": "vit_small_patch14_dinov2", "arch": SIZES}, QKV)
    found = missing_parts(model, {"name": "vit_small_patch14_dinov2", "arch": SIZES | {"reg_tokens": 4}}, QKV)
    assert "lacks the registers of its teacher" in found


def test_training_prints_the_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_set(tmp_path, 12, 12)
    cache_teacher.run(cache_recipe(root))
    monkeypatch.setattr("tinymim.models.native_parts._FAMILIES", ("vit_tiny",))
    monkeypatch.setattr(backbone, "native_parts", lambda model: {"RoPE"} if model.cls_token.is_meta else set())
    train_student.run(student_recipe(root, optim={"batch_size": 6, "steps": 1}))
    assert "train-student: warning: the student lacks the RoPE of its teacher vit_tiny" in capsys.readouterr().err
