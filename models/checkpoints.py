"""Weights in and out: safetensors, and the `.pth` of MAE and TinyMIM (encoder under `model`). Never pickle.

Every parameter of the encoder must be in the file. Tensors of the file that belong to a decoder, head or mask token
are dropped and reported.
"""

import argparse
import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tinymim.configs.errors import CheckpointError, first_line
from tinymim.models import backbone
from tinymim.models.layouts import TIMM, rewritten
from tinymim.models.tables import fit_tables

_PATH_MODULES = ("pathlib", "pathlib._local")  # before and since Python 3.13
_SIZES = "check the model's name, img_size, patch_size, embed_dim, depth and num_heads"
_POOLED = (
    "a model fine-tuned with mean pooling has no norm over tokens: read its last block, logits or pooled embedding "
    "(codec.at: block, pooled), or take the pre-trained file"
)
INDEX = ".index.json"  # ends the name of transformers' list of shards
# Keys of `torch.save`d dictionaries under which the weights may be.
_UNDER = ("model", "state_dict", "model_state_dict", "model_state", "module")
_DAMAGED = (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError, MemoryError)
# Types that a checkpoint may hold beside tensors and plain values. The training loops of MAE, DINO and TinyMIM save
# their command line, a namespace with paths. All of them only hold data.
_PLAIN: list[Any] = [
    argparse.Namespace,
    *((PurePosixPath, f"{module}.{name}") for module in _PATH_MODULES for name in ("PosixPath", "PurePosixPath")),
    *((PureWindowsPath, f"{module}.{name}") for module in _PATH_MODULES for name in ("WindowsPath", "PureWindowsPath")),
]
_NOT_ENCODER = ("decoder", "mask_token", "head.", "head_dist.", "fc_norm.", "lm_head.", "pooler.")
# The tensors of an encoder in MAE's and TinyMIM's own checkpoints.
_STEM = ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias")
_LAYERS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_BLOCK = tuple(f"{layer}.{part}" for layer in _LAYERS for part in ("weight", "bias"))


@dataclass(frozen=True)
class LoadedWeights:
    """The digest of the model's tensors, the file's that were dropped, the model's that the file lacks, the layout."""

    sha256: str
    dropped: tuple[str, ...]
    new: tuple[str, ...] = ()
    layout: str = TIMM


class Contents(NamedTuple):
    """What a file of weights holds: tensors by name, and strings that describe their origin (may be empty)."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_checkpoint(path: Path, under: str | None = None) -> Contents:
    """Read a safetensors file, or a file of `torch.save` (bare tensors, or under `model` / `state_dict`).

    The content decides, not the suffix. Nothing is unpickled but tensors, plain values and the types of `_PLAIN`.

    Args:
        path: the file.
        under: the key of the weights in a file of `torch.save` that holds several models.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or holds something else.
    """
    if path.name.endswith(INDEX):
        return _read_shards(path, under)
    if _is_pytorch(path):
        return _read_pytorch(path, under)
    metadata = _metadata(path)
    if under is not None:
        raise CheckpointError(f"{path} is a safetensors file, which holds one model", got=f"#{under}")
    try:
        return Contents(safetensors.torch.load_file(path), metadata)
    except _DAMAGED as error:
        raise _not_safetensors(path, error) from error


def read_metadata(path: Path, under: str | None = None) -> dict[str, str]:
    """The metadata strings of a file, which describe its origin; arguments and errors as `read_checkpoint`."""
    if path.name.endswith(INDEX):
        return {}
    return _read_pytorch(path, under).metadata if _is_pytorch(path) else _metadata(path)


def _read_shards(path: Path, under: str | None) -> Contents:
    """The shards that transformers' index names, which lie beside it."""
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        assert names and all(isinstance(name, str) and Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise CheckpointError(f"{path} is not an index of shards", got=first_line(error)) from error
    parts = [read_checkpoint(path.with_name(name), under).tensors for name in names]
    return Contents({name: tensor for part in parts for name, tensor in part.items()}, {})


def _is_pytorch(path: Path) -> bool:
    """Whether `torch.save` wrote a file. A safetensors file has eight bytes of length, then JSON."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", got=error.strerror) from error
    return start.startswith(b"PK\x03\x04") or (start[8:] != b"{" and path.suffix != ".safetensors")


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except _DAMAGED as error:
        raise _not_safetensors(path, error) from error


def _not_safetensors(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"{path} is not a readable safetensors file", got=first_line(error))


def _read_pytorch(path: Path, under: str | None) -> Contents:
    try:
        # An open file, because torch.load chooses a format by the suffix of a path.
        with open(path, "rb") as file, torch.serialization.safe_globals(_PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused later
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here, with the same meaning for the user
        raise CheckpointError(
            f"{path} cannot be loaded as plain tensors",
            got=_cause(error),
            hint="re-save it as safetensors; files that need pickle are refused",
        ) from error
    top = loaded if isinstance(loaded, dict) else {}
    keys = _UNDER if under is None else (under,)
    tensors = next((top[key] for key in keys if isinstance(top.get(key), dict)), top if under is None else {})
    found = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    if not found or not all(isinstance(name, str) for name in found):
        where = f"at its top, nor under {' or '.join(_UNDER)}" if under is None else f"under {under}"
        models = [key for key, value in top.items() if isinstance(key, str) and _count(value)]
        best = next((name for name in ("teacher", "model_ema", "ema") if name in models), models[0] if models else "")
        raise CheckpointError(
            f"{path} holds no tensors by name {where}",
            got=f"keys {_some([_described(key, value) for key, value in top.items()], 12)}"
            if top
            else f"a {type(loaded).__name__}",
            hint=f"name one of them after #: weights={path}#{best}" if models else "give a file with a model's weights",
        )
    strings = top["metadata"].items() if isinstance(top.get("metadata"), dict) else ()
    return Contents(found, {key: value for key, value in strings if isinstance(key, str) and isinstance(value, str)})


def _cause(error: Exception) -> str:
    """The first line of an error of `torch.load`, which buries the name of what it refuses in advice."""
    refused = re.search(r"GLOBAL ([\w.]+) was not an allowed global", str(error))
    return f"it holds a Python object of type {refused[1]}" if refused else first_line(error)


def _count(value: object) -> int:
    """Number of tensors by name in a dictionary."""
    items = value.items() if isinstance(value, dict) else ()
    return sum(isinstance(name, str) and isinstance(each, Tensor) for name, each in items)


def _described(key: object, value: object) -> str:
    """A key of a checkpoint for messages, with the number of tensors below it."""
    count = _count(value)
    return f"{key!r}"[:60] + (f" ({count} tensors)" if count else "")


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
        tensors: tensors by name, in a layout of `models/layouts.py`.
        origin: the source of the tensors, for messages.
        may_drop: prefixes of tensors to drop where the model has none of that name and shape, in addition to those of
            decoders and heads.
        may_lack: prefixes of the model's tensors that `tensors` may lack; they stay unchanged.
        hint: the hint of the error.
    """
    wanted = model.state_dict()
    tensors, layout, outside = rewritten(model, dict(tensors))
    tensors = fit_tables(model, tensors)
    fits = {name for name in wanted.keys() & tensors.keys() if _misfit(tensors[name], wanted[name]) is None}
    droppable = (*_NOT_ENCODER, *backbone.classifier(model), *may_drop)
    dropped = tuple(sorted(name for name in tensors.keys() - fits if name.startswith(droppable)))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    new = tuple(sorted(name for name in wanted.keys() - tensors.keys() if may_lack and name.startswith(may_lack)))
    missing = sorted(wanted.keys() - tensors.keys() - set(new))
    unexpected = sorted(tensors.keys() - wanted.keys())
    others = [
        f"{name} {_misfit(tensors[name], wanted[name])}" for name in sorted(wanted.keys() & tensors.keys() - fits)
    ]
    if missing or unexpected or others:
        raise CheckpointError(
            f"{origin} does not fit the model" + (f" (read as {layout})" if layout != TIMM else ""),
            got=f"missing: {_some(missing)}; unexpected: {_some(unexpected)}; other shape or type: {_some(others)}",
            expected=f"{len(wanted)} tensors of the model" + (f", of which {len(new)} may be new" if new else ""),
            hint=_POOLED if missing == ["norm.bias", "norm.weight"] and "fc_norm.weight" in dropped else hint,
        )
    model.load_state_dict(wanted | tensors, strict=True)
    return LoadedWeights(tensors_sha256(model.state_dict()), tuple(sorted({*dropped, *outside})), new, layout)


def _misfit(tensor: Tensor, wanted: Tensor) -> str | None:
    """Why a tensor cannot be the value of another; None: it can."""
    dense = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type != "meta"
    # Whole numbers in the place of weights are quantised, and their scale is not in the file.
    if not dense or tensor.is_floating_point() != wanted.is_floating_point() or tensor.is_complex():
        return f"{tensor.dtype}{'' if dense else ', not dense,'} for {wanted.dtype}".replace("torch.", "")
    return None if tensor.shape == wanted.shape else f"{tuple(tensor.shape)} for {tuple(wanted.shape)}"


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
    require_plain(tensors, "the layout of MAE and TinyMIM")
    buffer = io.BytesIO()
    ready = {name: tensor.detach().cpu().float().clone() for name, tensor in tensors.items()}
    torch.save({"model": ready, "metadata": dict(metadata)}, buffer)
    return buffer.getvalue()


def require_plain(tensors: Mapping[str, Tensor], layout: str) -> int:
    """The number of blocks of a plain ViT's encoder, from its tensors by timm's names.

    Raises:
        CheckpointError: the encoder has tensors that `layout` has no place for, or lacks some.
    """
    depth = count_blocks(tensors)
    wanted = {*_STEM, *(f"blocks.{number}.{name}" for number in range(depth) for name in _BLOCK)}
    if tensors.keys() != wanted:
        missing, unexpected = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
        raise CheckpointError(
            f"{layout} is not this encoder's",
            got=f"missing: {_some(missing)}; unexpected: {_some(unexpected)}",
            expected="a plain ViT with class token, position table and qkv biases",
        )
    patches = tensors["pos_embed"].shape[1] - 1
    if math.isqrt(patches) ** 2 != patches:
        raise CheckpointError(
            f"{layout} has one position for the class token and a square grid of others",
            got=f"{patches + 1} positions",
        )
    return depth


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
