"""Trained models in the formats of other runtimes: torch.export, ONNX and Transformers.

Shapes: B image, T token, C width, K class.
"""

import contextlib
import io
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from tinymim.configs.errors import CheckpointError, UserError, first_line
from tinymim.models import backbone
from tinymim.models.checkpoints import require_plain, to_safetensors

_PROTOBUF_BYTES = 2**31 - 1  # most that one ONNX file holds
_LAYERS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


class Trained(NamedTuple):
    """A model in eval mode, from a folder for timm, and its input: width and height, mean and deviation (0..1)."""

    model: nn.Module
    size: int
    mean: list[float]
    std: list[float]
    any_size: bool  # whether the model resamples its positions for other sizes of images

    def metadata(self) -> dict[str, str]:
        """What a runtime must know about the input, as strings."""
        return {"img_size": str(self.size), "mean": json.dumps(self.mean), "std": json.dumps(self.std)}


class Forward(nn.Module):
    """Normalised images [B, 3, S, S] to a classifier's logits [B, K]; without one to the final tokens [B, T, C]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.classifies = backbone.classes(model) > 0

    def forward(self, images: Tensor) -> Tensor:
        if not self.classifies:
            return backbone.flat(self.model, self.model.forward_features(images))
        logits: Tensor = self.model(images)
        return logits


def load_trained(folder: Path) -> Trained:
    """The model in a folder for timm.

    Raises:
        CheckpointError: it is no such folder, or timm cannot load it.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        if "factory" in config:  # a file must not choose which code is run
            raise CheckpointError(
                f"{folder} holds the weights of a factory's module, not of a timm model",
                got=f"factory {config['factory']}",
                hint="load model.safetensors into that module, and export it by torch.export or torch.onnx yourself",
            )
        cfg, args = config["pretrained_cfg"], config["model_args"]
        size = int(args["img_size"] if "img_size" in args else cfg["input_size"][-1])  # a ResNet takes no img_size
        mean, std = list(map(float, cfg["mean"])), list(map(float, cfg["std"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is no folder for timm",
            got=first_line(error),
            expected="config.json and model.safetensors, as beside every weights file of a run",
        ) from error
    tries: list[dict[str, Any]] = [{"dynamic_img_size": True}, {}]
    for extra in tries:
        try:
            model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True, **extra)
        except TypeError as error:  # an architecture of one size
            if not extra:
                raise CheckpointError(f"timm cannot load {folder}", got=first_line(error)) from error
        except Exception as error:  # timm raises many kinds
            raise CheckpointError(f"timm cannot load {folder}", got=first_line(error)) from error
        else:
            return Trained(model.eval(), size, mean, std, bool(extra))
    raise AssertionError("the last try returns or raises")


# ---------------------------------------------------------------- graphs


class Graph(NamedTuple):
    """An exported program, and what of its input may vary: "batch", or "batch and size"."""

    program: torch.export.ExportedProgram
    dynamic: str


def to_graph(trained: Trained) -> Graph:
    """The graph of `Forward`, with a dynamic batch, and with dynamic multiples of its cells where the model allows."""
    forward, batch = Forward(trained.model).eval(), torch.export.Dim("batch", min=1)
    patch = backbone.cell(trained.model)
    with _quiet():
        if trained.any_size and patch is not None:
            rows, columns = torch.export.Dim("rows", min=2), torch.export.Dim("columns", min=2)
            # Of an odd shape: equal sides, or the model's own size, would become conditions of the graph.
            example = torch.zeros(2, 3, 3 * patch[0], 5 * patch[1])
            shapes = {"images": {0: batch, 2: patch[0] * rows, 3: patch[1] * columns}}
            # Many kinds: whatever keeps a model from varying in size does not keep it from varying in batch.
            with contextlib.suppress(Exception):
                return Graph(torch.export.export(forward, (example,), dynamic_shapes=shapes), "batch and size")
        example = torch.zeros(2, 3, trained.size, trained.size)
        return Graph(torch.export.export(forward, (example,), dynamic_shapes={"images": {0: batch}}), "batch")


def to_torch_export(graph: Graph, trained: Trained) -> bytes:
    """A file for `torch.export.load`; `tinymim.json` in it states the input."""
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(graph.program, buffer, extra_files={"tinymim.json": json.dumps(trained.metadata())})
    return buffer.getvalue()


def to_onnx(graph: Graph, trained: Trained) -> bytes:
    """An ONNX model; its metadata state the input.

    Raises:
        UserError: the packages of the extra `onnx` are not installed.
        CheckpointError: the model is too large for one file.
    """
    try:
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise UserError(
            "export to ONNX needs packages that are not installed",
            got=first_line(error),
            hint="pip install 'tinymim[onnx]'",
        ) from error
    with _quiet():
        answer = "logits" if Forward(trained.model).classifies else "tokens"
        program = torch.onnx.export(graph.program, input_names=["images"], output_names=[answer], verbose=False)
    assert program is not None, "only the older exporter returns nothing"
    model = program.model_proto
    for name, value in trained.metadata().items():
        model.metadata_props.add(key=name, value=value)
    if (size := model.ByteSize()) > _PROTOBUF_BYTES:
        raise CheckpointError(
            "the model is too large for one ONNX file", got=f"{size:,} bytes", hint="use --to torch-export"
        )
    return bytes(model.SerializeToString())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of exporters about their own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---------------------------------------------------------------- Transformers


def to_transformers(trained: Trained, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, bytes]:
    """The files of a folder from which Transformers loads a ViTModel, by name.

    Args:
        trained: the model.
        tensors: its tensors by timm's names.
        metadata: the origin of the weights.

    Raises:
        CheckpointError: the model is not the plain ViT of Transformers.
    """
    depth = require_plain(tensors, "a ViTModel of Transformers")
    renamed = {
        "embeddings.cls_token": tensors["cls_token"],
        "embeddings.position_embeddings": tensors["pos_embed"],
    }
    for part in ("weight", "bias"):
        renamed[f"embeddings.patch_embeddings.projection.{part}"] = tensors[f"patch_embed.proj.{part}"]
        renamed[f"layernorm.{part}"] = tensors[f"norm.{part}"]
        for number in range(depth):
            own, theirs = f"blocks.{number}", f"encoder.layer.{number}"
            for name, other in _LAYERS.items():
                renamed[f"{theirs}.{other}.{part}"] = tensors[f"{own}.{name}.{part}"]
            thirds = tensors[f"{own}.attn.qkv.{part}"].chunk(3)
            for name, third in zip(("query", "key", "value"), thirds, strict=True):
                renamed[f"{theirs}.attention.attention.{name}.{part}"] = third
    model, patch = trained.model, backbone.cell(trained.model)
    assert patch is not None, "a plain ViT cuts patches"
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": backbone.widths(model)[-1],
        "num_hidden_layers": depth,
        "num_attention_heads": backbone.heads(model),
        "intermediate_size": len(tensors["blocks.0.mlp.fc1.bias"]),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "image_size": trained.size,
        "patch_size": patch[0],
        "num_channels": 3,
        "qkv_bias": True,
    }
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": trained.size, "width": trained.size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": trained.mean,
        "image_std": trained.std,
    }
    return {
        "config.json": json.dumps(config, indent=2).encode(),
        "preprocessor_config.json": json.dumps(processor, indent=2).encode(),
        "model.safetensors": to_safetensors(renamed, {**metadata, "format": "pt"}),  # Transformers wants the format
    }
