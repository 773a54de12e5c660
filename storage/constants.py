"""Constants: the arrays that a codec needs once per cache, such as scales and a decoding matrix.

The group `constants/` holds one zarr array per name. The record `constants.json` is written last, and constants exist
if and only if it exists. The commit record of every unit holds the digest of the constants that made it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tinymim.configs.errors import CacheCorrupt
from tinymim.storage import layout
from tinymim.storage.commit import (
    RecordBase,
    array_names,
    described,
    files_of,
    parse_record,
    read_files,
    signed,
    stored_form,
)
from tinymim.storage.layout import CONSTANTS, CONSTANTS_RECORD, METADATA
from tinymim.storage.manifest import FORMAT_VERSION, Manifest
from tinymim.storage.store import Store


def constants_files(spec_id: str, arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[dict[str, bytes], bytes]:
    """Encode constants.

    Args:
        spec_id: the manifest's spec_id.
        arrays: the constants by name, each with at least one axis.

    Returns:
        The files of the group by path relative to it, and the record that makes them visible.
    """
    files = {METADATA: layout.plain_group()}
    for name, values in arrays.items():
        files |= layout.encode_array(name, values, whole=True)
    stored = stored_form(described(files))
    return files, signed({"format_version": FORMAT_VERSION, "spec_id": spec_id, "files": stored})


def read_constants(store: Store, manifest: Manifest) -> dict[str, npt.NDArray[Any]] | None:
    """The constants of a cache by name, every byte checked; None if there are none.

    Raises:
        CacheMismatch: the record has an unknown format version.
        CacheCorrupt: the record is damaged or belongs to another cache; a file is missing or changed. Names the file.
    """
    record, _ = read_record(store, manifest)
    if record is None:
        return None
    stored = record.stored_files()
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name in array_names(stored):
        try:
            files = read_files(store, CONSTANTS, files_of(stored, name), verify=True)
            arrays[name] = layout.decode_array(name, files, None)
        except (ValueError, RuntimeError, KeyError) as error:  # RuntimeError comes from the decompressor
            raise _corrupt(store.place, f"array {name} of {store.place}/{CONSTANTS} is damaged: {error}") from error
    return arrays


def constants_digest(store: Store, manifest: Manifest) -> str | None:
    """The digest of a cache's constants, None if there are none; errors of `read_constants` about the record."""
    return read_record(store, manifest)[1]


def constants_bytes(store: Store, manifest: Manifest) -> int:
    """Bytes on disk of the constants and their record, 0 if there are none; errors of `constants_digest`."""
    record, _ = read_record(store, manifest)
    if record is None:
        return 0
    data = store.read(CONSTANTS_RECORD, layout.COMMIT_LIMIT_BYTES)
    return len(data) + sum(file.size_bytes for file in record.files.values())


def read_record(store: Store, manifest: Manifest) -> tuple[RecordBase | None, str | None]:
    """The record of the constants and its digest, both None if there are none; errors of `constants_digest`."""
    try:
        data = store.read(CONSTANTS_RECORD, layout.COMMIT_LIMIT_BYTES)
    except FileNotFoundError:
        return None, None
    try:
        record, digest = parse_record(data, RecordBase, f"{store.place}/{CONSTANTS_RECORD}")
        if record.spec_id != manifest.spec_id:
            raise ValueError("it does not belong to the cache's manifest")
    except ValueError as error:
        raise _corrupt(store.place, f"{store.place}/{CONSTANTS_RECORD} is damaged: {error}") from error
    return record, digest


def _corrupt(place: Path | str, what: str) -> CacheCorrupt:
    return CacheCorrupt(
        what,
        hint="`tinymim cache repair RECIPE` makes the constants again if the images are the same; or restore "
        f"constants.json and the folder constants/ of {place} from a copy",
    )
