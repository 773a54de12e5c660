"""Sections of the images: the folder or store of their tars, and the spool."""

from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, Field

from tinymim.configs.sections.base import Section
from tinymim.configs.sections.values import Folder, Place


def _checked_pattern(pattern: str) -> str:
    parts = PurePosixPath(pattern).parts
    if not parts or pattern.startswith("/") or {"..", "**"} & set(parts):
        raise ValueError("expected a glob below the folder, such as *.tar or train/*.tar, without .. and **")
    return pattern


Pattern = Annotated[str, AfterValidator(_checked_pattern)]


class SpoolConfig(Section):
    """Local copies of an object store's shards, shared by all processes of a machine. Local shards need none."""

    folder: Folder | None = Field(
        default=None, description="Folder on a local disk. Default: tinymim/spool in the user's cache folder."
    )
    gib: float = Field(
        default=20.0, gt=0, le=1e9, description="Size limit in GiB. The least recently used shards go first."
    )


class SourceConfig(Section):
    """Images: webdataset tars, with or without the index that `make-shards` writes."""

    shards: Place = Field(description="Folder of tars, or its URL in an object store (docs/object-stores.md).")
    pattern: Pattern = Field(default="*.tar", description="Glob for the tars of the folder that belong to the set.")
    spool: SpoolConfig = Field(default=SpoolConfig(), description="Local copies of shards in an object store.")
