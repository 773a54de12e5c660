"""Places of shards and caches: a folder, or a URL in an object store."""

import re
from pathlib import Path

from tinymim.configs.errors import RecipeError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+")
STORE_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "https", "http", "file", "hf")


HUB_REPO = r"(datasets/)?(?!(datasets|models|spaces)/)[\w.-]+/[\w.-]+(@[\w./-]+)?(/.+)?"


def checked_place(value: object) -> Path | str:
    """Return a URL as string (a Path would fold its slashes) and any other text as a folder. Raises ValueError."""
    if not isinstance(value, str | Path):
        raise ValueError(f"got {value!r}; expected a folder, or a URL in an object store")
    if not isinstance(value, str) or "://" not in value:
        return checked_folder(value)
    scheme, _, rest = value.partition("://")
    if scheme not in STORE_SCHEMES:
        raise ValueError(f"got '{value}'; supported schemes are {', '.join(STORE_SCHEMES)}")
    if "@" in rest.partition("/")[0] and not scheme.startswith("abfs"):
        raise ValueError("credentials belong in the environment, because recipes are stored and shown")
    if scheme == "hf" and not re.fullmatch(HUB_REPO, rest.rstrip("/")):
        raise ValueError(f"got '{value}'; expected hf://[datasets/]OWNER/NAME[@REVISION][/PATH]")
    if not rest.strip("/") or (rest.startswith("/") and scheme != "file") or "?" in rest or "#" in rest:
        raise ValueError(f"got '{value.partition('?')[0]}...'; expected SCHEME://BUCKET/PREFIX without a query")
    return value.rstrip("/")


def checked_folder(value: object) -> Path:
    """Return a local path. Raises ValueError for a URL, of which a Path would make a folder, and for an empty text."""
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"got {value!r}; expected a path")
    scheme, colon, rest = str(value).partition(":")
    if colon and rest.startswith("/") and _SCHEME.fullmatch(scheme):
        known = scheme in STORE_SCHEMES and not rest.startswith("//")
        like = f"{scheme}://{rest.lstrip('/')}" if known else f"./{value}"
        raise ValueError(f"got '{value}', no local path, nor a URL that can be used here; such as {like}")
    return Path(value)


def parse_place(text: str | Path) -> Path | str:
    """Parse a place that a user names. Raises RecipeError for a malformed URL."""
    try:
        return checked_place(text)
    except ValueError as error:
        raise RecipeError(f"neither a folder nor an object store: {error}") from None


def joined(root: Path | str, name: str) -> Path | str:
    """Return the place `name` below `root`."""
    return root / name if isinstance(root, Path) else f"{root}/{name}"
