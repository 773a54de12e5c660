"""`tinymim cache copy SRC DST --format 2`: write the records of a format-1 cache as a cache of one target layer.

Records, keys, digests and statistics stay as they are, to the byte. Every unit is read back and compared.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.stages.cache.copy import refuse_itself
from tinymim.stages.pages.numbers import format_bytes
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.progress import Meter
from tinymim.storage.blocks import DIGEST, VIEW_ARRAYS, Array
from tinymim.storage.commit import holds_keys
from tinymim.storage.constants import constants_digest, encode_constants
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.manifest import Layer, Manifest, SourceShard
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import open_store
from tinymim.storage.v1.arrays import REQUIRED_ARRAYS
from tinymim.storage.v1.cache import OldCache
from tinymim.storage.v1.checks import RESTORE
from tinymim.storage.v1.manifest import OldManifest, is_v1
from tinymim.storage.v1.records import OldUnit
from tinymim.storage.writer import CacheWriter, UnitTaken

# What a teacher's section of version 1 holds besides the shapes, which version 2 keeps apart, and the block, now a tap.
_SHAPES = ("heads", "head_dim", "tokens", "prefix_tokens", "grid")
NOT_KEPT = (
    "boxes and flips of the views: the view law computes them again, the digests prove them",
    "the upper 32 bits of each digest of pixels",
    "the number of views that the manifest promised: coverage follows from what is committed",
)


def is_old(place: Path | str) -> bool:
    """Whether the cache at a place has format 1."""
    return is_v1(open_store(place))


def run(source: Path | str, target: Path | str, name: str | None = None) -> dict[str, Any]:
    """Write the units that `target` lacks, and compare all of them with their originals.

    Args:
        source: a format-1 cache.
        target: the folder or URL of the new cache, new or unfinished.
        name: the layer's name; None: teacher, block and codec, as a recipe makes it.

    Returns:
        JSON values: `source`, `target`, `spec_id`, `layer`, the number of `units`, of units `written` and of `records`,
        `source_bytes`, `bytes`, and `not_kept`, which parts of format 1 have no place in format 2.

    Raises:
        UserError: `source` is no cache or has no units; `target` holds something else, or a writer is active there.
        StoreError: the object store refuses or fails.
        CacheMismatch: `target` is another cache, or holds other records.
        CacheCorrupt: `source` is damaged.
        Interrupted: a signal stopped the upgrade; the same command continues.
    """
    old = OldCache(source)
    refuse_itself(old.place, target)
    if not old.units:
        raise UserError(f"the cache {old.place} holds no unit to upgrade", hint="run `tinymim cache-teacher` anew")
    manifest = new_manifest(old.manifest)
    layer = new_layer(old, manifest, name or layer_name(old.manifest))
    written, size_bytes = 0, 0
    with (
        CacheWriter.open(target, manifest, [layer]) as writer,
        StopFlag() as stop,
        Meter("cache copy --format 2", len(old.units), "units") as meter,
    ):
        _write_constants(old, writer, layer)
        reader = CacheReader(writer.place)
        for unit in old.units:
            if stop.requested:
                raise Interrupted("committed units are safe; the same command continues")
            keys, arrays = _read(old, unit, layer)
            written += _write(writer, layer, unit, keys, arrays)
            size_bytes += _compare(reader, layer, unit, keys, arrays)
            meter.advance(1)
    return {
        "source": str(old.place),
        "target": str(writer.place),
        "spec_id": manifest.spec_id,
        "layer": layer.name,
        "units": len(old.units),
        "written": written,
        "records": sum(unit.num_records for unit in old.units),
        "source_bytes": sum(old.bytes_by_component().values()),
        "bytes": size_bytes,
        "not_kept": list(NOT_KEPT),
    }


def format_report(report: Mapping[str, Any]) -> str:
    """The report of `run` as text for a terminal."""
    lines = [
        f"{report['source']} (format 1, {format_bytes(report['source_bytes'])}) -> {report['target']} (format 2, "
        f"{format_bytes(report['bytes'])})",
        f"spec {report['spec_id']}, layer {report['layer']}: {report['written']:,} of {report['units']:,} units "
        f"written now; all {report['records']:,} records read back and equal",
    ]
    return "\n".join([*lines, *(f"not kept: {what}" for what in report["not_kept"])])


def new_manifest(old: OldManifest) -> Manifest:
    """The manifest of the upgraded cache."""
    source = tuple(SourceShard(s.name, s.size_bytes, s.num_samples, s.content_hash) for s in old.source)
    return Manifest(source, old.views, old.environment)


def layer_name(old: OldManifest) -> str:
    """The name that a recipe gives to such a layer."""
    made = f"{old.teacher['name']}-b{old.block}-{old.codec['name']}".lower()
    return re.sub(r"[^a-z0-9._-]", "-", made)[-64:].lstrip("._-")


def new_layer(old: OldCache, manifest: Manifest, name: str) -> Layer:
    """The description of the upgraded layer.

    Raises:
        CacheCorrupt: units hold different arrays.
    """
    teacher = {key: value for key, value in old.manifest.teacher.items() if key not in (*_SHAPES, "block")}
    teacher["shapes"] = {key: old.manifest.teacher[key] for key in _SHAPES}
    first = next((unit for unit in old.units if unit.num_records), old.units[0])
    _, arrays = old.read_unit(first)
    kinds = {
        key: {"dtype": values.dtype.name, "shape": list(values.shape[1:])}
        for key, values in arrays.items()
        if key not in REQUIRED_ARRAYS
    }
    codec = old.manifest.codec
    target = {
        "taps": [old.manifest.tap],
        "name": codec["name"],
        "version": codec["version"],
        "parameters": codec["parameters"],
        "arrays": kinds,
    }
    return Layer(name, manifest.spec_id, teacher, target, old.manifest.environment)


def _read(old: OldCache, unit: OldUnit, layer: Layer) -> tuple[list[str], dict[str, Array]]:
    """Keys, and arrays [V, I, ...] of the layer and of the view layer, by name."""
    keys, stored = old.read_unit(unit)
    arrays = {}
    for name, values in stored.items():
        if name == DIGEST:
            values = (values & np.uint64(0xFFFFFFFF)).astype("<u4")
        elif name in REQUIRED_ARRAYS:
            continue
        rows = values.reshape(unit.num_images, unit.num_views, *values.shape[1:])
        arrays[name] = np.ascontiguousarray(np.moveaxis(rows, 0, 1))
    expected = {**layer.arrays, **VIEW_ARRAYS}
    found = {name: (values.dtype, values.shape[2:]) for name, values in arrays.items()}
    if found != expected:
        raise CacheCorrupt(
            f"unit {unit} of {old.place} holds other arrays than the first one",
            got=found,
            expected=expected,
            hint=RESTORE,
        )
    return keys, arrays


def _unit(unit: OldUnit) -> UnitId:
    return UnitId(unit.shard, unit.first_view, unit.num_views)


def _write(writer: CacheWriter, layer: Layer, old: OldUnit, keys: list[str], arrays: Mapping[str, Array]) -> bool:
    """Write what is missing of a unit, the views first. False: nothing was."""
    unit = _unit(old)
    parts = {VIEWS: [DIGEST], layer.name: list(layer.arrays)}
    statistics: dict[str, dict[str, Any]] = {VIEWS: {}, layer.name: {}}  # what could not be read is said of the views
    for key, value in old.statistics.items():
        statistics[VIEWS if key == "unreadable" else layer.name][key] = value
    missing = [name for name in parts if unit not in writer.of_shard(name, unit.shard)]
    for name in missing:
        if not writer.claim(name, unit):
            raise UnitTaken(
                f"unit {unit} of {writer.place} is another writer's, or cut otherwise",
                hint="wait until that writer has ended, or name another target; one upgrade at a time writes a cache",
            )
        with writer.begin(name, unit, keys) as draft:
            draft.add({array: arrays[array] for array in parts[name]})
            draft.commit(statistics[name])
    writer.give_back(unit)
    return bool(missing)


def _compare(reader: CacheReader, layer: Layer, old: OldUnit, keys: list[str], arrays: Mapping[str, Array]) -> int:
    """Read a unit of both layers back and compare it with its original. Returns the bytes of its files.

    Raises:
        CacheMismatch: it holds something else.
    """
    unit, size_bytes = _unit(old), 0
    for name, kinds in ((VIEWS, VIEW_ARRAYS), (layer.name, layer.arrays)):
        info = reader.unit(name, unit)
        size_bytes += info.size_bytes
        same = all(
            _same(found, {array: arrays[array][row] for array in kinds})
            for row, (_, found) in enumerate(reader.each_view(info))
        )
        if same and holds_keys(name, unit):
            same = reader.read_keys(info) == keys
        if not same or info.num_images != old.num_images or info.key_digest != old.key_digest:
            raise CacheMismatch(
                f"unit {unit} of layer {name} of {reader.place} holds other records than the format-1 cache",
                hint="name another target",
            )
    return size_bytes


def _write_constants(old: OldCache, writer: CacheWriter, layer: Layer) -> None:
    constants = old.constants()
    if constants is None:
        return
    with writer.exclusively_constants(layer.name):
        held = writer.constants(layer.name)
        if held is None:
            writer.put_constants(layer.name, *encode_constants(layer, constants))
            held = writer.constants(layer.name)
    if held is None or not _same(held, constants):
        raise CacheMismatch(
            f"layer {layer.name} of {writer.place} holds other constants than {old.place}",
            got=constants_digest(writer.store, layer),
            hint="these caches were created independently; choose another target",
        )


def _same(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    """Whether two sets of arrays are equal to the byte."""
    if one.keys() != other.keys():
        return False
    pairs = [(one[name], other[name]) for name in one]
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)
