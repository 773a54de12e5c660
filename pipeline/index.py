"""`index.json` beside the shards of a folder: their sizes, counts and content hashes, and the classes."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinymim.configs.errors import SourceError, first_line

INDEX_NAME: Final = "index.json"
INDEX_VERSION: Final = 1
_INDEX_BYTES: Final = 2**28
_HINT: Final = "restore it, or remove it: the folder is then scanned"


class IndexRow(BaseModel):
    """One shard of an index."""

    model_config = ConfigDict(strict=True)

    name: Annotated[str, Field(pattern=r"^[^/\x00]+$")]
    size_bytes: Annotated[int, Field(ge=0, lt=2**63)]
    num_samples: Annotated[int, Field(ge=0, lt=2**40)]
    content_hash: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class Index(BaseModel):
    """The part of an index that this program relies on; other keys are passed over."""

    model_config = ConfigDict(strict=True)

    shards: list[IndexRow] = []
    classes: list[str] = []
    num_samples: int | None = None

    def rows(self) -> dict[str, IndexRow]:
        return {row.name: row for row in self.shards}


def read_index(folder: Path) -> dict[str, Any]:
    """The JSON of a folder's index as it is, or an empty mapping where there is none.

    Raises:
        SourceError: the index is not one; see `parse_index`.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        return {}
    if path.stat().st_size > _INDEX_BYTES:
        raise SourceError(f"{path} is too long", got=f"{path.stat().st_size} bytes", expected=f"at most {_INDEX_BYTES}")
    parsed = _json(str(path), path.read_bytes())
    _checked(str(path), parsed)
    return parsed


def parse_index(path: str, data: bytes | None) -> Index:
    """The index in a file's bytes; an empty one for None.

    Args:
        path: the file's place, for messages.
        data: its bytes.

    Raises:
        SourceError: it is not JSON, of another version, lacks or repeats something, or has values that cannot be.
    """
    return Index() if data is None else _checked(path, _json(path, data))


def not_as_indexed(what: str, got: object, expected: object) -> SourceError:
    """The error for a folder that does not hold what its index describes."""
    return SourceError(
        what,
        got=got,
        expected=expected,
        hint=f"restore the shard, or remove {INDEX_NAME}: the folder is then scanned",
    )


def _json(path: str, data: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON", got=first_line(error), hint=_HINT) from error
    if not isinstance(parsed, dict):
        raise SourceError(f"{path} is no index of shards", got=type(parsed).__name__, expected="an object", hint=_HINT)
    if parsed.get("version") != INDEX_VERSION or isinstance(parsed["version"], bool):
        got = repr(parsed.get("version"))[:50]
        raise SourceError(f"{path} has an unknown version", got=got, expected=INDEX_VERSION, hint=_HINT)
    return parsed


def _checked(path: str, parsed: dict[str, Any]) -> Index:
    try:
        index = Index.model_validate(parsed)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        got = f"{field}: {repr(first['input'])[:60]} ({first['msg']}); {error.error_count()} such field(s)"
        raise SourceError(f"{path} is no index of shards", got=got, hint=_HINT) from error
    repeated = [name for name, count in Counter(row.name for row in index.shards).items() if count > 1]
    if repeated:
        raise SourceError(f"{path} names a shard twice", got=repeated[0][:200], hint=_HINT)
    total = sum(row.num_samples for row in index.shards)
    if index.num_samples is not None and index.num_samples != total:
        raise SourceError(
            f"{path} contradicts itself",
            got=f"num_samples {index.num_samples}",
            expected=f"{total}, the sum",
            hint=_HINT,
        )
    return index
