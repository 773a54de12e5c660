"""Committed format-1 caches, and changes to copies of them; no code writes format 1 any more.

The last code that wrote format 1 made `cache_v1_hidden` and `cache_v1_sketch`, with `tests/stages/tiny.py`:
`write_set(root, count=6, images_per_shard=4)`, then `cache_recipe(root, audit_views=2)` for the sketch, and
`cache_recipe(root, audit_views=2, codec={"name": "hidden", "bits": 4, "calibration_views": 6})` with `num_views` 2 and
then 3. It also read the records whose digests `cache_v1_records.json` holds. `cache_v1` and `cache_v1_first` are older;
their records are arithmetic.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from tinymim.configs.errors import CacheCorrupt, UserError
from tinymim.storage.atomic import canonical_json, digest_hex
from tinymim.storage.v1.cache import OldCache

DATA = Path(__file__).parents[2] / "data"
RECORDS = json.loads((DATA / "cache_v1_records.json").read_bytes())
COMMIT = "commits/train-000.v0-1.json"
UNIT = "units/train-000/v0-1"
Change = Callable[[dict[str, Any]], object]


def copied(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / name, tmp_path / name))


def form_of(values: npt.NDArray[Any]) -> str:
    return f"{values.dtype.str} {list(values.shape)} {digest_hex(values.tobytes())}"


def resign(path: Path, change: Change) -> None:
    """Change a record and give it a valid digest."""
    record = json.loads(path.read_bytes())
    del record["record_digest"]
    change(record)
    path.write_bytes(canonical_json({**record, "record_digest": digest_hex(canonical_json(record))}))


def reissue(path: Path, change: Change) -> None:
    """Change a manifest and give it a valid digest."""
    root = json.loads((path / "zarr.json").read_bytes())
    manifest = root["attributes"]["tinymim"]
    change(manifest)
    root["attributes"] = {"tinymim": manifest, "tinymim_digest": digest_hex(canonical_json(manifest))}
    (path / "zarr.json").write_bytes(canonical_json(root))


def forge(cache: Path, files: dict[str, bytes], **changes: Any) -> None:
    """Replace files of the first unit and fields of its record; every digest is valid."""

    def change(record: dict[str, Any]) -> None:
        for name, data in files.items():
            (cache / UNIT / name).write_bytes(data)
            record["files"][name] = {"size_bytes": len(data), "blake2b": digest_hex(data)}
        record.update(changes)

    resign(cache / COMMIT, change)


def encoded(name: str, values: npt.NDArray[Any], chunk: int | None = None) -> dict[str, bytes]:
    """An array as format 1 stores it, by zarr itself."""
    length, inner = max(len(values), 1), tuple(max(size, 1) for size in values.shape[1:])
    chunk = chunk or length
    files: dict[str, Any] = {}
    array = zarr.create_array(
        store=MemoryStore(files),
        name=name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(chunk, *inner),
        shards=(-(-length // chunk) * chunk, *inner),
        compressors=(ZstdCodec(level=1), Crc32cCodec()),
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    array[...] = values
    return {path: data.to_bytes() for path, data in files.items() if path.startswith(f"{name}/")}


def encoded_keys(data: bytes, ends: list[int]) -> tuple[dict[str, bytes], str]:
    """The files of `key_bytes` and `key_ends`, and their digest."""
    arrays = {"key_bytes": np.frombuffer(data, "u1"), "key_ends": np.array(ends, "<i8")}
    files = {path: file for name, values in arrays.items() for path, file in encoded(name, values).items()}
    return files, digest_hex(arrays["key_ends"].tobytes() + data)


def refusal(cache: Path, match: str, error: type[UserError] = CacheCorrupt) -> UserError:
    """The refusal of a cache or, if it opens, of its first unit; it gives a hint that this version can keep."""

    def read() -> None:
        opened = OldCache(cache)
        opened.read_unit(opened.units[0])

    with pytest.raises(error, match=match) as caught:
        read()
    assert caught.value.hint and "repair" not in caught.value.hint
    return caught.value
