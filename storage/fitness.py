"""Checks of keys and arrays before they are stored as a unit or as constants."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from tinymim.configs.errors import InternalError, SourceError
from tinymim.storage import layout
from tinymim.storage.layout import UnitId


def check_keys(unit: UnitId, keys: Sequence[str]) -> None:
    """Raises SourceError where a key appears twice or cannot be stored."""
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    if repeated:
        raise SourceError(
            f"{len(repeated)} sample key(s) appear more than once in shard {unit.shard}",
            got=repr(repeated[0]),
            hint="rename the samples; records are looked up by key",
        )
    for key in keys:
        try:
            key.encode()
        except UnicodeEncodeError:
            raise SourceError(f"a sample key in shard {unit.shard} is not Unicode", got=repr(key)) from None


def check_arrays(unit: UnitId, num_records: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Raises InternalError where a base array is missing, or an array does not have `num_records` or its dtype."""
    problems = [f"{name} is missing" for name in layout.BASE_ARRAYS if name not in arrays]
    for name, values in arrays.items():
        got = f"{name}: {values.dtype} {list(values.shape)}"
        if found := problems_of(name, values):
            problems += found
        elif len(values) != num_records:
            problems.append(f"{got}, expected {num_records} records")
        elif name in layout.BASE_ARRAYS:
            dtype, inner = layout.BASE_ARRAYS[name]
            if values.dtype != dtype or values.shape[1:] != inner:
                problems.append(f"{got}, expected {dtype} {[num_records, *inner]}")
    if problems:
        raise InternalError(f"arrays of unit {unit} do not fit: {'; '.join(problems)}")


def problems_of(name: str, values: npt.NDArray[Any]) -> list[str]:
    """The reasons why an array cannot be stored under a name; empty if it can."""
    if name in layout.KEY_ARRAYS or not (name.isidentifier() and name.isascii()) or name.startswith("_"):
        return [f"{name!r} is not a valid array name"]
    got = f"{name}: {values.dtype} {list(values.shape)}"
    if values.dtype.kind not in "biuf" or values.dtype != values.dtype.newbyteorder("<"):
        return [f"{got}, expected plain little-endian numbers"]
    return [] if values.ndim else [f"{got}, expected at least one axis"]
