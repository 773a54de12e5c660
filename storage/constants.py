"""Constants: what a codec needs once per cache, such as scales and a decoding matrix, beside the units.

One zarr array per name in the group `constants/`, and the record `constants.json`, written last: constants exist if
and only if it does. Every unit names in its commit record the digest of the constants that it was made with.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tinymim.configs.errors import CacheCorrupt
from tinymim.storage import layout
from tinymim.storage.atomic import fsync_folder, write_json_atomic
from tinymim.storage.commit import StoredFile, files_of, read_checked, record_digest, sync_and_digest
from tinymim.storage.manifest import FORMAT_VERSION, Manifest, require_format_version


@dataclass(frozen=True)
class _Record:
    """`constants.json`: every file of the group by its path relative to it, and the digest over all of that."""

    files: Mapping[str, StoredFile]
    digest: str


def write_constants(root: Path, spec_id: str, arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """Write the constants of the cache at `root` in place of any there; on return they are durable.

    Use `CacheWriter.write_constants`, which holds the cache's lock.

    Args:
        root: the cache's folder; its manifest is written.
        spec_id: of the manifest.
        arrays: by name, each with at least one axis.

    Returns:
        Their digest: that of the record.
    """
    folder, path = layout.constants_folder(root), layout.constants_file(root)
    if path.exists():  # goes before what it describes
        path.unlink()
        fsync_folder(root)
    if folder.exists():
        shutil.rmtree(folder)
    layout.write_group(folder)
    for name, values in arrays.items():
        layout.write_array(folder, name, values, whole=True)
    files = {name: asdict(file) for name, file in sync_and_digest(folder, root).items()}
    record = {"format_version": FORMAT_VERSION, "spec_id": spec_id, "files": files}
    digest = record_digest(record)
    write_json_atomic(path, record | {"record_digest": digest})
    return digest


def read_constants(root: Path, manifest: Manifest) -> dict[str, npt.NDArray[Any]] | None:
    """The constants of a cache by name, every byte checked; None where it has none.

    Raises:
        CacheMismatch: the record has an unknown format version.
        CacheCorrupt: the record is damaged or of another cache; a file is missing or changed, and named.
    """
    record = _read_record(root, manifest)
    if record is None:
        return None
    folder = layout.constants_folder(root)
    names = sorted({name.partition("/")[0] for name in record.files if "/" in name})
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name in names:
        try:
            files = {path: read_checked(folder / path, file) for path, file in files_of(record.files, name).items()}
            arrays[name] = layout.decode_array(name, files)
        except Exception as error:  # whatever zarr and its codecs raise on bytes they cannot decode
            raise _corrupt(f"array {name} of {folder} is damaged: {error}", root) from error
    return arrays


def constants_digest(root: Path, manifest: Manifest) -> str | None:
    """The digest of a cache's constants, None where it has none; errors of `read_constants` about the record."""
    record = _read_record(root, manifest)
    return None if record is None else record.digest


def constants_bytes(root: Path, manifest: Manifest) -> int:
    """Bytes on disk of the constants and their record, 0 where there are none; errors as `constants_digest`."""
    record = _read_record(root, manifest)
    if record is None:
        return 0
    return layout.constants_file(root).stat().st_size + sum(file.size_bytes for file in record.files.values())


def _read_record(root: Path, manifest: Manifest) -> _Record | None:
    path = layout.constants_file(root)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        record = json.loads(data)
        require_format_version(record["format_version"], str(path))
        digest = record.pop("record_digest")
        if digest != record_digest(record):
            raise ValueError("its content does not have its record_digest")
        if record["spec_id"] != manifest.spec_id:
            raise ValueError("it does not belong to the cache's manifest")
        return _Record({name: StoredFile(**file) for name, file in record["files"].items()}, digest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(f"{path} is damaged: {error}", root) from error


def _corrupt(what: str, root: Path) -> CacheCorrupt:
    return CacheCorrupt(
        what,
        hint="restore constants.json and the folder constants/ from a copy; without one, "
        f"delete {root} and run cache-teacher again",
    )
