"""The kinds of values that fields of several sections take, with their limits."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tinymim.configs.place import checked_folder, checked_place

Place = Annotated[Path | str, BeforeValidator(checked_place)]  # str: a URL, without a slash at its end
Folder = Annotated[Path, BeforeValidator(checked_folder)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")]
Name = Annotated[str, Field(pattern=r"^[\w-]+$", max_length=100)]  # of the user's choice; may become a folder
Precision = Literal["fp32", "bf16", "fp16"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
LAYER_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
LayerName = Annotated[str, Field(pattern=LAYER_NAME)]
DropRate = Annotated[float, Field(ge=0.0, lt=1.0)]
# Integers fit into the types of torch and numpy, and the sizes of tensors into memory.
LARGEST = 2**31 - 1
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Whole = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Side = Annotated[int, Field(ge=1, le=8192)]
Width = Annotated[int, Field(ge=1, le=65536)]
Depth = Annotated[int, Field(ge=1, le=1000)]
Processes = Annotated[int, Field(ge=1, le=1024)]
Threads = Annotated[int, Field(ge=1, le=256)]
Batch = Annotated[int, Field(ge=1, le=2**20)]
Weight = Annotated[float, Field(ge=0.0, le=1e6)]  # of a loss
ResizeRatio = Annotated[float, Field(ge=1.0, le=10.0)] | Literal["squeeze"]
