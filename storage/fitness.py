"""Checks of keys and arrays before they are stored in a unit or as constants."""

from collections import Counter
from collections.abc import Mapping, Sequence

from tinymim.configs.errors import InternalError, SourceError
from tinymim.storage.blocks import Array, ArrayType
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


def check_arrays(unit: object, images: int, arrays: Mapping[str, Array], kinds: Mapping[str, ArrayType]) -> int:
    """The number k of views in `arrays`, each [k, I, ...]; InternalError where they are not those of the layer."""
    problems = [f"{name} is missing" for name in kinds if name not in arrays]
    problems += [f"{name} is unknown" for name in arrays if name not in kinds]
    lengths = {len(values) for values in arrays.values() if values.ndim}
    for name in kinds.keys() & arrays.keys():
        (dtype, shape), values = kinds[name], arrays[name]
        if values.dtype != dtype or values.shape[1:] != (images, *shape):
            problems.append(
                f"{name}: {values.dtype} {list(values.shape)}, expected {dtype} {['views', images, *shape]}"
            )
    if problems or len(lengths) != 1:
        raise InternalError(f"arrays of unit {unit} do not fit: {'; '.join(problems) or f'{lengths} views'}")
    return lengths.pop()


def problems_of(name: str, values: Array) -> list[str]:
    """The reasons why an array cannot be stored as a constant under a name; empty if it can."""
    if not (name.isidentifier() and name.isascii()) or name.startswith("_"):
        return [f"{name!r} is not a valid array name"]
    got = f"{name}: {values.dtype} {list(values.shape)}"
    if values.dtype.kind not in "biuf" or values.dtype != values.dtype.newbyteorder("<"):
        return [f"{got}, expected plain little-endian numbers"]
    return [] if values.ndim else [f"{got}, expected at least one axis"]
