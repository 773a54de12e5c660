"""`tinymim export --to FORMAT`: every format is loaded by its own runtime, and answers as timm does."""

import json
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tinymim.configs.errors import CheckpointError, UserError
from tinymim.models.checkpoints import load_tensors, to_safetensors
from tinymim.models.runtimes import Forward
from tinymim.stages import export
from tinymim.stages.export import Format, answers
from tinymim.stages.run.folder import write_weights

Run = Callable[..., tuple[int, str, str]]
NAMES: dict[Format, str] = {"timm": "out", "torch-export": "out.pt2", "onnx": "out.onnx", "transformers": "out"}
PACKAGES: dict[Format, list[str]] = {"onnx": ["onnxscript", "onnxruntime"], "transformers": ["transformers"]}


def exported(source: Path, folder: Path, to: Format) -> tuple[dict[str, Any], Callable[[Tensor], Tensor]]:
    for package in PACKAGES.get(to, []):
        pytest.importorskip(package, reason=f"the extra of {to} is not installed")
    report = export.run(source, folder / NAMES[to], to)
    found = answers(folder / NAMES[to], to)
    assert found is not None
    return report, found


def of_timm(folder: Path, images: Tensor, **extra: Any) -> Tensor:
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, **extra)
    with torch.no_grad():
        found: Tensor = Forward(model.eval())(images)
    return found


@pytest.mark.filterwarnings("ignore")  # of the runtimes, about themselves
@pytest.mark.parametrize("to", NAMES)
def test_a_student_answers_as_in_timm(made: Path, tmp_path: Path, to: Format) -> None:
    report, found = exported(made / "run-student", tmp_path, to)
    assert report["max_difference"] < 1e-4 and report["img_size"] == 32 and len(report["mean"]) == 3
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    wanted = of_timm(made / "run-student" / "student", images)
    torch.testing.assert_close(found(images), wanted, atol=1e-4, rtol=1e-4)
    if to in ("onnx", "torch-export"):  # other batches and sizes
        assert report["dynamic"] == "batch and size"
        wide = torch.randn(1, 3, 40, 64)
        wanted = of_timm(made / "run-student" / "student", wide, dynamic_img_size=True)
        torch.testing.assert_close(found(wide), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["timm", "torch-export", "onnx"])
def test_a_classifier_gives_logits(tmp_path: Path, to: Format) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "global_pool": "avg",
    }
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=7, **sizes)
    torch.nn.init.normal_(model.head.weight)
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 7,
        "num_features": 16,
        "global_pool": "avg",
        "model_args": sizes,
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 7, "input_size": [3, 32, 32]},
    }
    write_weights(tmp_path / "best.safetensors", to_safetensors(model.state_dict(), {}), config)
    _, found = exported(tmp_path, tmp_path / "exports", to)
    images = torch.randn(2, 3, 32, 32)
    assert found(images).shape == (2, 7)
    torch.testing.assert_close(found(images), of_timm(tmp_path / "best", images), atol=1e-4, rtol=1e-4)
    with pytest.raises(CheckpointError, match="ViTModel of Transformers is not this"):
        export.run(tmp_path, tmp_path / "hf", "transformers")


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", NAMES)
def test_a_real_model_answers_alike_on_photographs(data_root: Path, tmp_path: Path, to: Format) -> None:
    sizes: dict[str, Any] = {"img_size": 196, "patch_size": 14}
    model: Any = timm.create_model("vit_small_patch16_224", num_classes=0, **sizes)
    weights = load_file(data_root / "teachers" / "vit_small_patch14_dinov2.fp16.safetensors")
    # Without DINOv2's layer scales, for which Transformers' plain ViT has no place.
    weights = {name: tensor.float() for name, tensor in weights.items() if name in model.state_dict()}
    load_tensors(model, weights, "DINOv2")
    config = {
        "architecture": "vit_small_patch16_224",
        "num_classes": 0,
        "model_args": sizes,
        "pretrained_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "num_classes": 0},
    }
    write_weights(tmp_path / "student.safetensors", to_safetensors(model.state_dict(), {}), config)
    report, found = exported(tmp_path, tmp_path / "exports", to)
    images = photographs(data_root, 4, report)
    wanted = of_timm(tmp_path / "student", images)
    difference = (found(images) - wanted).abs().max()
    assert difference < 1e-3 * wanted.abs().max(), difference
    print(f"{to}: largest difference {float(difference):.1e} of {float(wanted.abs().max()):.1f} on 4 photographs")


def photographs(data_root: Path, count: int, report: dict[str, Any]) -> Tensor:
    with tarfile.open(data_root / "imagenet-sample" / "imagenet-sample-000000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")][:count]
        files = [BytesIO(tar.extractfile(member).read()) for member in members]  # type: ignore[union-attr]
    size = report["img_size"]
    pixels = [np.asarray(Image.open(file).convert("RGB").resize((size, size))) for file in files]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(report[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (images - mean) / std


def test_mistakes_have_a_remedy(made: Path, tmp_path: Path, run: Run) -> None:
    code, _, err = run("export", made / "run-student", tmp_path / "out.pth", "--to", "onnx")
    assert code == 2 and "FILE.onnx" in err
    code, out, _ = run("export", made / "run-student", tmp_path / "copy", "--to", "timm")
    assert code == 0 and json.loads(out)["max_difference"] == 0.0
    code, _, _ = run("export", tmp_path / "copy", tmp_path / "again", "--to", "timm")
    assert code == 0
    with pytest.raises(UserError, match="exists"):
        export.run(made / "run-student", tmp_path / "copy", "timm")
    (tmp_path / "copy" / "config.json").write_text(json.dumps({"factory": "os:system", "args": {"command": "false"}}))
    with pytest.raises(CheckpointError, match="weights of a factory's module"):  # no file chooses what is run
        export.run(tmp_path / "copy", tmp_path / "other", "timm")
