"""Weights in and out: safetensors, and the `.pth` of MAE and TinyMIM (encoder under `model`). Never pickle.

Every parameter of the encoder must be in the file. Tensors of the file that belong to a decoder, head or mask token
are dropped and reported.
"""

import argparse
import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from tinymim.configs.errors import CheckpointError, first_line
from tinymim.models import backbone

_SIZES = "check the model's name, img_size, patch_size, embed_dim, depth and num_heads"
_POOLED = (
    "a model fine-tuned with mean pooling has no norm over tokens: use it as a teacher, or take the pre-trained file"
)
_NOT_ENCODER = ("decoder", "mask_token", "head.", "head_dist.", "fc_norm.")
# The tensors of an encoder in MAE's and TinyMIM's own checkpoints.
_STEM = ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias")
_LAYERS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_BLOCK = tuple(f"{layer}.{part}" for layer in _LAYERS for part in ("weight", "bias"))


@dataclass(frozen=True)
class LoadedWeights:
    """The digest of the model's tensors, the file's tensors that were dropped, and the model's that the file lacks."""

    sha256: str
    dropped: tuple[str, ...]
    new: tuple[str, ...] = ()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a `.pth` / `.pt` file (bare or under `model` / `state_dict`).

    Raises:
        CheckpointError: the file is not a readable checkpoint, or holds more than tensors and plain values.
    """
    if path.suffix == ".safetensors":
        try:
            tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file", got=error) from error
        return tensors
    try:
        # The training loops of MAE and TinyMIM also save their command line, a namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here, with the same meaning for the user
        raise CheckpointError(
            f"{path} cannot be loaded as plain tensors",
            got=first_line(error),
            hint="re-save it as safetensors; files that need pickle are refused",
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds no state dict", got=type(loaded).__name__)
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata strings of a safetensors file, which describe its origin; empty for other files."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def load_tensors(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    origin: str,
    *,
    may_drop: tuple[str, ...] = (),
    may_lack: tuple[str, ...] = (),
    hint: str = _SIZES,
) -> LoadedWeights:
    """Load a state dict into a model; position embeddings and errors as in `weights.load_weights`.

    Args:
        model: any module.
        tensors: tensors by name; prefixes of DataParallel and of our MAE are removed.
        origin: the source of the tensors, for messages.
        may_drop: prefixes of tensors to drop where the model has none of that name and shape, in addition to those of
            decoders and heads.
        may_lack: prefixes of the model's tensors that `tensors` may lack; they stay unchanged.
        hint: the hint of the error.
    """
    wanted = model.state_dict()
    tensors = _fit_position(model, {name: tensor.float() for name, tensor in _strip_prefix(dict(tensors)).items()})
    fits = {name for name in wanted.keys() & tensors.keys() if tensors[name].shape == wanted[name].shape}
    dropped = tuple(sorted(name for name in tensors.keys() - fits if name.startswith((*_NOT_ENCODER, *may_drop))))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    new = tuple(sorted(name for name in wanted.keys() - tensors.keys() if may_lack and name.startswith(may_lack)))
    missing = sorted(wanted.keys() - tensors.keys() - set(new))
    unexpected = sorted(tensors.keys() - wanted.keys())
    shapes = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & tensors.keys() - fits)
    ]
    if missing or unexpected or shapes:
        raise CheckpointError(
            f"{origin} does not fit the model",
            got=f"missing: {_some(missing)}; unexpected: {_some(unexpected)}; other shape: {_some(shapes)}",
            expected=f"{len(wanted)} tensors of the model" + (f", of which {len(new)} may be new" if new else ""),
            hint=_POOLED if missing == ["norm.bias", "norm.weight"] and "fc_norm.weight" in dropped else hint,
        )
    model.load_state_dict(wanted | tensors, strict=True)
    return LoadedWeights(tensors_sha256(model.state_dict()), dropped, new)


def _strip_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # States of our own MAE and of DataParallel have a prefix and are otherwise the same.
    for prefix in ("module.", "encoder."):
        if any(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _fit_position(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    table, wanted = tensors.get(backbone.POSITIONS), model.state_dict().get(backbone.POSITIONS)
    if table is None or wanted is None or table.shape[1] == wanted.shape[1] or table.shape[2:] != wanted.shape[2:]:
        return tensors
    rows, columns = backbone.grid(model)
    prefix = wanted.shape[1] - rows * columns
    return tensors | {backbone.POSITIONS: resample_abs_pos_embed(table, [rows, columns], num_prefix_tokens=prefix)}


def _some(names: list[str], most: int = 6) -> str:
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, dtypes, shapes and values: the identity of weights, independent of their file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def to_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], half: bool = False) -> bytes:
    """Serialise tensors with metadata on their origin; `half` stores floats as fp16."""
    ready = {
        name: (tensor.half() if half and tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    return _with_sorted_metadata(safetensors.torch.save(ready, dict(metadata)))


def to_official(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Serialise an encoder as the code of MAE and of TinyMIM reads it: a `.pth` with float32 tensors under `model`.

    Args:
        tensors: the tensors of a plain ViT by timm's names, which the layout uses.
        metadata: the origin of the weights; written beside the tensors.

    Raises:
        CheckpointError: the encoder has tensors that the layout has no place for, or lacks some.
    """
    depth = count_blocks(tensors)
    wanted = {*_STEM, *(f"blocks.{number}.{name}" for number in range(depth) for name in _BLOCK)}
    if tensors.keys() != wanted:
        missing, unexpected = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
        raise CheckpointError(
            "the layout of MAE and TinyMIM is not this encoder's",
            got=f"missing: {_some(missing)}; unexpected: {_some(unexpected)}",
            expected="a plain ViT with class token, position table and qkv biases",
        )
    patches = tensors["pos_embed"].shape[1] - 1
    if math.isqrt(patches) ** 2 != patches:
        raise CheckpointError(
            "the layout of MAE and TinyMIM has one position for the class token and a square grid of others",
            got=f"{patches + 1} positions",
        )
    buffer = io.BytesIO()
    ready = {name: tensor.detach().cpu().float().clone() for name, tensor in tensors.items()}
    torch.save({"model": ready, "metadata": dict(metadata)}, buffer)
    return buffer.getvalue()


def count_blocks(tensors: Mapping[str, Tensor]) -> int:
    """Number of blocks of a ViT, from its tensors by timm's names."""
    return len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})


def _with_sorted_metadata(raw: bytes) -> bytes:
    """Rewrite a safetensors header with sorted metadata; the library writes it in random order."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps({"__metadata__": header.pop("__metadata__"), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns tensor data to 8 bytes
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]
