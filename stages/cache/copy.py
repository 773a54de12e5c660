"""`tinymim cache copy`: copy a cache to another place and check every byte; several copies may share the work."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.stages.pages.numbers import format_bytes
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.progress import Meter, logger
from tinymim.storage import layout
from tinymim.storage.catalog import resolve
from tinymim.storage.check import unit_bytes
from tinymim.storage.commit import StoredFile, UnitInfo, array_names, corrupt_unit, encode_commit, files_of, read_files
from tinymim.storage.constants import constants_digest, read_record
from tinymim.storage.layout import CONSTANTS, CONSTANTS_RECORD
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter, UnitTaken

PART_BYTES = 64 * 2**20  # held in memory at once, unless one array is larger
LOOK_AGAIN_S = 2.0


def run(source: Path | str, target: Path | str) -> dict[str, Any]:
    """Copy the units that `target` lacks. It may hold part of the same cache, and other copies may be running.

    Args:
        source: a cache, or a root that holds exactly one.
        target: the folder or URL of the copy itself, not a root.

    Returns:
        The report, as JSON values.

    Raises:
        UserError: `source` is no cache, or `target` holds something else or cannot be written.
        StoreError: the object store refuses or fails.
        CacheMismatch: `target` is another cache, or holds other records of the same views.
        CacheCorrupt: units of `source` are damaged; all others were copied.
        Interrupted: a signal stopped the copy; the same command continues.
    """
    # ---- both ends
    reader = CacheReader(resolve(source))
    if str(reader.place) == str(open_store(target).place):
        raise UserError("a cache cannot be copied onto itself", got=reader.place, hint="name another target")
    copied, copied_bytes, already_there = 0, 0, 0
    damaged: list[CacheCorrupt] = []
    with CacheWriter.open(target, reader.manifest) as writer, StopFlag() as stop:
        for difference in writer.environment_differences:
            logger.info(f"cache copy: warning: {difference}")
        _copy_constants(reader, writer)

        # ---- units, each committed when it is complete
        todo = reader.units()
        with Meter("cache copy", len(todo), "units") as meter:
            while todo:
                held_by_others = []
                for info in todo:
                    if stop.requested:
                        raise Interrupted("committed units are safe; the same command continues")
                    if _is_copied(writer, info):
                        already_there += 1
                    elif not writer.claim(info.unit):
                        held_by_others.append(info)
                        continue
                    else:
                        try:
                            writer.put_unit(info, _parts(reader, info))
                            copied, copied_bytes = copied + 1, copied_bytes + unit_bytes(info)
                        except UnitTaken:  # the lease expired meanwhile, and another copy claimed the unit
                            held_by_others.append(info)
                            continue
                        except CacheCorrupt as error:
                            if info.unit not in writer.refresh():  # another copy may have committed it
                                writer.drop_unit(info.unit)
                            damaged.append(error)
                            logger.info(f"cache copy: {error.what}")
                    meter.advance(1)
                if len(held_by_others) == len(todo):
                    time.sleep(LOOK_AGAIN_S)  # wait until other copies commit their units or die
                writer.refresh()
                todo = held_by_others
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
        "units": len(reader.units()),
        "copied": copied,
        "already_there": already_there,
        "copied_bytes": copied_bytes,
    }


def format_report(report: Mapping[str, Any]) -> str:
    """The report of `run` as text for a terminal."""
    return (
        f"{report['source']} -> {report['target']}\n"
        f"spec {report['spec_id']}: {report['copied']:,} of {report['units']:,} units copied, "
        f"{format_bytes(report['copied_bytes'])}; {report['already_there']:,} were already there"
    )


def _copy_constants(reader: CacheReader, writer: CacheWriter) -> None:
    record, digest = read_record(reader.store, reader.manifest)
    if record is None:
        return
    with writer.exclusively_constants():
        held = constants_digest(writer.store, writer.manifest)
        if held is None:
            try:
                files = read_files(reader.store, CONSTANTS, record.stored_files(), verify=True)
            except ValueError as error:
                raise CacheCorrupt(
                    f"the constants of {reader.place} are damaged: {error}", hint="`tinymim cache repair RECIPE`"
                ) from error
            writer.put_constants(files, reader.store.read(CONSTANTS_RECORD, layout.COMMIT_LIMIT_BYTES))
        elif held != digest:
            raise CacheMismatch(
                f"{writer.place} holds other constants than {reader.place}",
                got=held,
                expected=digest,
                hint="these caches were created independently; choose another target",
            )


def _is_copied(writer: CacheWriter, info: UnitInfo) -> bool:
    """Whether the copy holds a unit. Compares commit records, which hold the digest of every file.

    Raises:
        CacheMismatch: the copy holds other records of the same views.
    """
    same_shard = [unit for unit in writer.committed() if unit.shard == info.unit.shard]
    got = next((unit for unit in same_shard if unit != info.unit and set(unit.views) & set(info.unit.views)), None)
    if got is None:
        if info.unit not in same_shard:
            return False
        if writer.store.read(layout.commit_file(info.unit), layout.COMMIT_LIMIT_BYTES) == encode_commit(info):
            return True
    raise CacheMismatch(
        f"{writer.place} holds records of its own for unit {info.unit}",
        got=f"unit {got}" if got else "another commit record",
        expected="the same unit, or none",
        hint="name another target, or remove this one",
    )


def _parts(reader: CacheReader, info: UnitInfo) -> Iterator[dict[str, bytes]]:
    """Whole arrays of a unit, as files with checked digests; raises CacheCorrupt for a file that is not as recorded."""
    parts: list[dict[str, StoredFile]] = [{}]
    for name in array_names(info.files):
        both = parts[-1] | files_of(info.files, name)
        if sum(file.size_bytes for file in both.values()) <= PART_BYTES:
            parts[-1] = both
        else:
            parts.append(files_of(info.files, name))
    for part in filter(None, parts):
        try:
            yield read_files(reader.store, layout.unit_folder(info.unit), part, verify=True)
        except ValueError as error:
            raise corrupt_unit(reader.place, info.unit, str(error)) from error
