"""Where shards and caches lie: a folder, or the URL of one in an object store."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from tinymim.configs.errors import RecipeError

STORE_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "https", "http", "file")


def _place(value: object) -> Path | str:
    """A URL stays a string (a Path would fold its slashes), all else is a folder."""
    if isinstance(value, Path) or (isinstance(value, str) and "://" not in value):
        return Path(value)
    if not isinstance(value, str):
        raise ValueError(f"got {value!r}; expected a folder, or the URL of one in an object store")
    scheme, _, rest = value.partition("://")
    if scheme not in STORE_SCHEMES:
        raise ValueError(f"got '{value}'; the object stores known are {', '.join(STORE_SCHEMES)}")
    if "@" in rest.partition("/")[0] and not scheme.startswith("abfs"):
        raise ValueError("credentials belong into the environment, not into a recipe that is stored and shown")
    if not rest.strip("/") or "?" in rest or "#" in rest:
        raise ValueError(
            f"got '{value.partition('?')[0]}...'; an object store is SCHEME://BUCKET/PREFIX, without a query"
        )
    return value.rstrip("/")


Place = Annotated[Path | str, BeforeValidator(_place)]  # str: a URL, without a slash at its end


def parse_place(text: str) -> Path | str:
    """A place named on the command line. Raises RecipeError for a URL that can be none."""
    try:
        return _place(text)
    except ValueError as error:
        raise RecipeError(f"this names no folder and no object store: {error}") from None


def joined(root: Path | str, name: str) -> Path | str:
    """The place `name` below `root`."""
    return root / name if isinstance(root, Path) else f"{root}/{name}"
