"""The device and dtype of a run."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch

from tinymim.configs.errors import RecipeError
from tinymim.configs.sections.models import ModelConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device of `run.device`; "auto" prefers CUDA. Raises RecipeError where CUDA is named and absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError("run.device names CUDA", got=name, expected="a machine with CUDA, or device: cpu")
    device = torch.device(name)
    if ":" in name and device.index >= torch.cuda.device_count():
        raise RecipeError(
            "run.device names a GPU that this machine lacks",
            got=name,
            expected=f"cuda:0 to cuda:{torch.cuda.device_count() - 1}",
        )
    return device


def require_view_size(size: int, model: ModelConfig, section: str) -> None:
    """Raises RecipeError unless views of `size` pixels fit the model in the recipe's section `section`."""
    if size != model.img_size:
        raise RecipeError(
            f"views.size is not {section}.img_size",
            got=size,
            expected=model.img_size,
            hint=f"set {section}.img_size to views.size, if the model can have that size, or give both another",
        )


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The autocast context of a forward pass; fp32 has none."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision])
