"""`tinymim export`: what it writes loads into a model of MAE's and TinyMIM's layout, and comes back to the bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinymim.configs.errors import CheckpointError, UserError
from tinymim.configs.sections.models import ModelConfig, TeacherConfig
from tinymim.configs.taps import Tap
from tinymim.models.teacher import Teacher
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, build_vit
from tinymim.models.weights import load_weights
from tinymim.stages import cache_teacher, export, train_student
from tinymim.tests import official
from tinymim.tests.stages.tiny import STUDENT, TEACHER, cache_recipe, run_in, student_recipe

Run = Callable[..., tuple[int, str, str]]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def root(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folders of one student, and of two."""
    root = tmp_path_factory.mktemp("export")
    optim = {"batch_size": 8, "steps": 2, "base_lr": 0.1}
    train_student.run(student_recipe(made, optim=optim, ema={"decay": 0.5}, run=run_in(root / "run-student")))
    several = {"student": None, "students": {"a": {"model": STUDENT}, "b": {"model": STUDENT}}}
    train_student.run(student_recipe(made, optim=optim, run=run_in(root / "run-several"), **several))
    return root


def features(weights: str) -> Tensor:
    vit = build_vit(ModelConfig.model_validate(STUDENT)).eval()
    load_weights(vit, weights)
    with torch.no_grad():
        return vit.forward_features(IMAGES)


def exported(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(path, weights_only=True)["model"]
    return tensors


@pytest.mark.parametrize("name", ["run-student/student", "run-student/student-ema", "run-several/a/student"])
def test_timm_loads_the_folder_of_a_student_with_its_sizes_and_normalisation(root: Path, name: str) -> None:
    model: Any = timm.create_model(f"local-dir:{root / name}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model.forward_features(IMAGES), features(f"{root / name}.safetensors"))
    assert model.num_classes == 0 and model.blocks[0].attn.num_heads == STUDENT["num_heads"]
    data = timm.data.resolve_model_data_config(model)
    assert data == {
        "input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center",
        "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD),
    }  # fmt: skip
    tensors = load_file(root / name / "model.safetensors")
    assert torch.equal(features(str(root / name)), features(f"{root / name}.safetensors"))  # the folder is `weights`
    save_file({key: tensor for key, tensor in tensors.items() if key != "norm.bias"}, root / name / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"norm\.bias"):
        timm.create_model(f"local-dir:{root / name}", pretrained=True)
    save_file(tensors, root / name / "model.safetensors")


@pytest.mark.parametrize("name", ["student", "student-ema"])
def test_what_is_exported_comes_back_with_the_same_features(root: Path, tmp_path: Path, name: str) -> None:
    weights, target = root / "run-student" / f"{name}.safetensors", tmp_path / "deep" / "mine.pth"
    found = export.run(weights, target)
    own = load_file(weights)
    theirs = exported(target)
    assert theirs.keys() == own.keys() == official.shapes(8, 2).keys()
    assert {key: tuple(tensor.shape) for key, tensor in theirs.items()} == official.shapes(8, 2)
    assert torch.equal(features(str(target)), features(str(weights)))
    by_formula, _ = official.encode(theirs, IMAGES, [2, 2])
    np.testing.assert_allclose(features(str(target)).numpy(), by_formula.numpy(), rtol=1e-4, atol=1e-5)
    assert found == {
        "file": str(target), "source": str(weights), "tensors": len(own), "embed_dim": 8, "depth": 2, "num_heads": 2,
    }  # fmt: skip


def test_a_kept_projector_lies_beside_weights_that_timm_loads_as_before(made: Path, tmp_path: Path) -> None:
    codec = {"kind": "features", "tokens": 4}
    cache_teacher.run(cache_recipe(made, cache=tmp_path / "cache", codec=codec, run=run_in(tmp_path / "run-cache")))

    def trained(name: str, **targets: Any) -> Path:
        changes: dict[str, Any] = {
            "cache": tmp_path / "cache",
            "optim": {"batch_size": 8, "steps": 2, "base_lr": 0.1},
            "targets": targets,
            "ema": {"decay": 0.5},
            "checkpoint": {"resume": False},
            "run": run_in(tmp_path / name),
        }
        train_student.run(student_recipe(made, **changes))
        return tmp_path / name

    plain, kept = trained("plain"), trained("kept", keep_projector=True, projector="mlp")
    assert not list(plain.rglob("*projector*"))
    assert export.run(plain, tmp_path / "plain.pth").keys() == export.run(kept, tmp_path / "k.pth").keys() - {
        "projector"
    }
    assert [path.name for path in tmp_path.glob("*projector*")] == ["k-projector.safetensors"]
    answers = []
    for name in ("student", "student-ema"):
        encoder: Any = timm.create_model(f"local-dir:{kept / name}", pretrained=True).eval()
        weights = load_file(kept / name / "projector.safetensors")
        wide, narrow = weights["0.weight"].shape
        assert (narrow, wide) == (STUDENT["embed_dim"], TEACHER["embed_dim"])
        layers = [torch.nn.Linear(narrow, wide), torch.nn.GELU(), torch.nn.Linear(wide, wide)]
        torch.nn.Sequential(*layers).load_state_dict(weights)
        with torch.no_grad():
            answers.append(torch.nn.Sequential(*layers)(encoder.forward_features(IMAGES)))
    assert answers[0].shape == (2, 17, wide) and not torch.equal(*answers)
    assert (tmp_path / "k-projector.safetensors").read_bytes() == (
        kept / "student" / "projector.safetensors"
    ).read_bytes()
    trained("kept")
    assert not list(kept.rglob("*projector*"))  # not that of the run before


def test_an_exported_student_teaches_as_before(root: Path, tmp_path: Path) -> None:
    export.run(root / "run-student", tmp_path / "mine.pth")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    fields: dict[str, Any] = STUDENT | {"block": 2}
    before, after = (
        Teacher(TeacherConfig.model_validate(fields | {"weights": str(weights)}), [Tap("qkv", 2)])
        for weights in (root / "run-student" / "student.safetensors", tmp_path / "mine.pth")
    )
    tap = Tap("qkv", 2)
    assert before.describe()["weights_sha256"] == after.describe()["weights_sha256"]  # the same teacher to a cache
    assert all(torch.equal(x, y) for x, y in zip(before(pixels)[tap], after(pixels)[tap], strict=True))


def test_their_checkpoint_is_exported_as_it_came(tmp_path: Path) -> None:
    tensors = official.layout(24, 3)
    export.run(official.write_training(tmp_path / "checkpoint-299.pth", tensors), tmp_path / "again.pth")
    again = exported(tmp_path / "again.pth")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_the_command_prints_json_and_warns_of_other_heads(tmp_path: Path, run: Run) -> None:
    recipe = "student: {name: vit_tiny_patch16_224, img_size: 32, patch_size: 8, depth: 1, num_heads: 12}"
    save_file(official.layout(192, 1), tmp_path / "w.safetensors", {"recipe": recipe})
    code, out, err = run("export", tmp_path / "w.safetensors", tmp_path / "w.pth")
    assert code == 0 and json.loads(out)["num_heads"] == 12
    assert "12 heads; MAE and TinyMIM have 3 at width 192" in err
    code, out, err = run("export", tmp_path / "w.safetensors", tmp_path / "w.pth")
    assert (code, out) == (2, "") and "exists" in err


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(root: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no finished weights(.|\n)*a, b"):
        export.run(root / "run-several", tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no finished weights"):
        export.run(tmp_path, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        export.run(tmp_path / "nothing.safetensors", tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"FILE\.pth"):
        export.run(root / "run-student", tmp_path / "x.safetensors")
    registers = official.layout(16, 1) | {"reg_token": torch.zeros(1, 4, 16)}
    save_file(registers, tmp_path / "registers.safetensors")
    with pytest.raises(CheckpointError, match="unexpected: reg_token"):
        export.run(tmp_path / "registers.safetensors", tmp_path / "x.pth")
    oblong = official.layout(16, 1) | {"pos_embed": torch.zeros(1, 16, 16)}
    save_file(oblong, tmp_path / "oblong.safetensors")
    with pytest.raises(CheckpointError, match="square grid"):
        export.run(tmp_path / "oblong.safetensors", tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()
