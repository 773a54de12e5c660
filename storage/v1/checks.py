"""What format 1 stores as JSON is compared with a class; what cannot be decoded becomes CacheCorrupt."""

from collections.abc import Iterator
from contextlib import contextmanager
from reprlib import Repr
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinymim.configs.errors import CacheCorrupt, CacheMismatch

FORMAT_VERSION = 1
RESTORE = "restore the cache from a copy, or make it again in a new place with `tinymim cache-teacher RECIPE`"
LISTED_PROBLEMS = 8

Count = Annotated[int, Field(ge=1, lt=2**40)]
Size = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[int, Field(ge=1, lt=2**31)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Stored = TypeVar("Stored", bound=BaseModel)
_short = Repr()


class Exact(BaseModel):
    """A stored JSON object with these fields and no others."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def checked(stored: object, kind: type[Stored], owner: str) -> Stored:
    """Validate the JSON of a manifest or record; CacheMismatch for an unknown format version, ValueError for damage."""
    if not isinstance(stored, dict) or "format_version" not in stored:
        raise ValueError("there is no format_version")
    version = stored["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise CacheMismatch(
            f"format_version of {owner} is unknown",
            got=version,
            expected=FORMAT_VERSION,
            hint="use the version of tinymim that wrote it, or upgrade tinymim",
        )
    try:
        return kind.model_validate(stored)
    except ValidationError as error:
        raise ValueError("; ".join(_problems(error))) from error


def _problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors(include_url=False, include_context=False)[:LISTED_PROBLEMS]:
        place = ".".join(str(part) if str(part).isidentifier() else _short.repr(part) for part in problem["loc"])
        got = "" if problem["type"] == "missing" else f", got {_short.repr(problem['input'])}"
        yield f"{place}: {problem['msg']}{got}"


@contextmanager
def damage(what: str) -> Iterator[None]:
    """Turn what the decoders raise into CacheCorrupt about `what`."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: JSON too deep, or the decompressor
        raise CacheCorrupt(f"{what} is damaged: {error}", hint=RESTORE) from error
