"""`tinymim cache copy`: copy a cache to another place and check every byte; several copies may share the work."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.stages.pages.numbers import format_bytes
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.progress import Meter, logger
from tinymim.storage import layout
from tinymim.storage.catalog import resolve
from tinymim.storage.check import checked_pieces
from tinymim.storage.commit import UnitInfo, corrupt_unit, encode_commit
from tinymim.storage.constants import constants_bytes, constants_digest, constants_places
from tinymim.storage.layout import view_layers
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter, UnitTaken

LOOK_AGAIN_S = 2.0


def run(source: Path | str, target: Path | str, layers: Sequence[str] | None = None) -> dict[str, Any]:
    """Copy the units that `target` lacks. It may hold part of the same cache, and other copies may be running.

    Args:
        source: a cache, packed or not, or a root that holds exactly one.
        target: the folder or URL of the copy itself, not a root.
        layers: the target layers to copy with the view layer; None: all.

    Returns:
        JSON values: `source`, `target`, `spec_id`, `layers` and `left_out` (names), `units` of all, those `copied` and
        those `already_there`, `copied_by_layer`, and `copied_bytes`.

    Raises:
        UserError: `source` is no cache or lacks a layer, or `target` holds something else or cannot be written.
        StoreError: the object store refuses or fails.
        CacheMismatch: `target` is another cache, or holds other records of the same views.
        CacheCorrupt: units of `source` are damaged; all others were copied.
        Interrupted: a signal stopped the copy; the same command continues.
    """
    # ---- both ends
    reader = CacheReader(resolve(source))
    refuse_itself(reader.place, target)
    chosen = [reader.layer(name) for name in (reader.layers if layers is None else dict.fromkeys(layers))]
    copied: dict[str, int] = {
        name: 0 for name in (*view_layers(reader.manifest, chosen), *(layer.name for layer in chosen))
    }
    copied_bytes, already_there = 0, 0
    damaged: list[CacheCorrupt] = []
    with CacheWriter.open(target, reader.manifest, chosen) as writer, StopFlag() as stop:
        for difference in writer.environment_differences:
            logger.info(f"cache copy: warning: {difference}")
        for layer in chosen:
            _copy_constants(reader, writer, layer.name)

        # ---- units, each committed when it is complete; those of view layers first, which the others rest on
        todo = [info for name in copied for info in reader.units(name)]
        num_units = len(todo)

        def copy_one(info: UnitInfo) -> bool:
            nonlocal copied_bytes, already_there
            if _is_copied(writer, info):
                already_there += 1
                return True
            try:
                writer.copy_unit(info, _pieces(reader, info))
            except UnitTaken:
                return False
            except CacheCorrupt as error:
                damaged.append(error)
                logger.info(f"cache copy: {error.what}")
                return True
            copied[info.layer] += 1
            copied_bytes += info.size_bytes
            return True

        share_work("cache copy", todo, copy_one, stop)
    if damaged:
        raise CacheCorrupt(
            f"{len(damaged)} unit(s) of {reader.place} are damaged and were not copied; all others were",
            got=damaged[0].what,
            hint="`tinymim cache repair` recomputes them; then run the same command again",
        )
    return {
        "source": str(reader.place),
        "target": str(writer.place),
        "spec_id": reader.manifest.spec_id,
        "layers": list(copied),
        "left_out": sorted(reader.layers.keys() - copied.keys()),
        "units": num_units,
        "copied": sum(copied.values()),
        "copied_by_layer": copied,
        "already_there": already_there,
        "copied_bytes": copied_bytes,
    }


def format_report(report: Mapping[str, Any]) -> str:
    """The report of `run` as text for a terminal."""
    lines = [
        f"{report['source']} -> {report['target']}",
        f"spec {report['spec_id']}: {report['copied']:,} of {report['units']:,} units copied, "
        f"{format_bytes(report['copied_bytes'])}; {report['already_there']:,} were already there",
        f"layers {', '.join(report['layers'])}",
    ]
    return "\n".join([*lines, *(f"left out {name}" for name in report["left_out"])])


def refuse_itself(source: Path | str, target: Path | str) -> None:
    """Raises UserError if both are one place."""
    if str(source) == str(open_store(target).place):
        raise UserError("a cache cannot be copied onto itself", got=source, hint="name another target")


def share_work(name: str, todo: Sequence[UnitInfo], do: Callable[[UnitInfo], bool], stop: StopFlag) -> None:
    """Do every unit, and wait for those that other processes hold.

    Args:
        name: of the meter.
        todo: the units.
        do: copies a unit. False: another process holds it.
        stop: ends the work between two units.

    Raises:
        Interrupted: `stop` was requested.
    """
    with Meter(name, len(todo), "units") as meter:
        while todo:
            held_by_others = []
            for info in todo:
                if stop.requested:
                    raise Interrupted("committed units are safe; the same command continues")
                if do(info):
                    meter.advance(1)
                else:
                    held_by_others.append(info)
            if len(held_by_others) == len(todo):
                time.sleep(LOOK_AGAIN_S)  # wait until other copies commit their units or die
            todo = held_by_others


def _copy_constants(reader: CacheReader, writer: CacheWriter, layer: str) -> None:
    digest = constants_digest(reader.store, reader.layers[layer])
    if digest is None:
        return
    _, record_path = constants_places(layer)
    with writer.exclusively_constants(layer):
        held = constants_digest(writer.store, writer.layers[layer])
        if held is None:
            data = constants_bytes(reader.store, reader.layers[layer])
            assert data is not None
            writer.put_constants(layer, data, reader.store.read(record_path, layout.COMMIT_LIMIT_BYTES))
        elif held != digest:
            raise CacheMismatch(
                f"layer {layer} of {writer.place} holds other constants than {reader.place}",
                got=held,
                expected=digest,
                hint="these caches were created independently; choose another target",
            )


def _is_copied(writer: CacheWriter, info: UnitInfo) -> bool:
    """Whether the copy holds a unit. Compares commit records, which hold the digest of every file.

    Raises:
        CacheMismatch: the copy holds other records of the same views.
    """
    same_views = [unit for unit in writer.of_shard(info.layer, info.unit.shard) if unit.overlaps(info.unit)]
    if not same_views:
        return False
    if same_views == [info.unit]:
        stored = writer.store.read(layout.commit_file(info.layer, info.unit), layout.COMMIT_LIMIT_BYTES)
        if stored == encode_commit(info):
            return True
    raise CacheMismatch(
        f"{writer.place} holds records of its own for unit {info}",
        got="another commit record" if same_views == [info.unit] else f"unit {same_views[0]}",
        expected="the same unit, or none",
        hint="name another target, or remove this one",
    )


def _pieces(reader: CacheReader, info: UnitInfo) -> Iterator[bytes]:
    """The bytes of a unit's file, checked; raises CacheCorrupt where they are not as recorded."""
    try:
        yield from checked_pieces(reader.store, info)
    except ValueError as error:
        raise corrupt_unit(reader.place, info, str(error)) from error
