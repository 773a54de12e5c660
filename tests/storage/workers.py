"""Main functions of writer processes, for tests that start, kill and race them. Forkserver children import them."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.leases import Leases
from tinymim.storage.manifest import Manifest
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter, UnitTaken
from tinymim.tests.storage import tiny

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tinymim.tests.storage.workers"])  # import zarr once, not for every process


def start(function: Any, *arguments: Any) -> tuple[BaseProcess, Connection]:
    """Run `function(*arguments, connection)` in a process that has this one's environment."""
    here, there = FORKSERVER.Pipe()
    process = FORKSERVER.Process(target=_run, args=(dict(os.environ), function, *arguments, there))
    process.start()
    there.close()
    return process, here


def _run(environment: dict[str, str], function: Any, *arguments: Any) -> None:
    os.environ.update(environment)
    function(*arguments)


def write_all(place: Path | str, manifest: Manifest, lease_s: float, connection: Connection) -> None:
    """Write missing units of the layer `rel`; messages of `write_layer`."""
    write_layer(place, manifest, tiny.REL, lease_s, connection)


def write_layer(place: Path | str, manifest: Manifest, name: str, lease_s: float, connection: Connection) -> None:
    """Write missing units of a layer, sending "open", each unit claimed and written, and "done"."""
    with CacheWriter.open(place, manifest, [tiny.make_layer(manifest, name)], lease_s) as writer:
        connection.send("open")
        while todo := lacking(writer, manifest):
            for layer, unit in todo:
                if writer.claim(layer, unit):
                    connection.send(("claimed", unit))
                    try:
                        tiny.write_units(writer, [unit], give_back=False)
                        connection.send(("written", unit))
                    except UnitTaken:
                        connection.send(("taken", unit))
                    writer.give_back(unit)
        connection.send("done")


def lacking(writer: CacheWriter, manifest: Manifest) -> list[tuple[str, UnitId]]:
    """The units that some layer lacks, each with the first such layer."""
    found: dict[UnitId, str] = {}
    for layer in (VIEWS, *writer.layers):
        held = writer.refresh(layer)
        found = {unit: layer for unit in tiny.units_of(manifest) if unit not in held} | found
    return [(layer, unit) for unit, layer in sorted(found.items())]


def claim_and_hang(place: Path | str, manifest: Manifest, unit: UnitId, lease_s: float, connection: Connection) -> None:
    """Claim a unit, write a part of it, report that, and stay alive."""
    with (
        CacheWriter.open(place, manifest, [tiny.make_layer(manifest)], lease_s) as writer,
        writer.begin(VIEWS, unit, tiny.make_keys(unit.shard)) as draft,
    ):
        draft.add({name: values[:1] for name, values in tiny.make_arrays(VIEWS, unit).items()})
        connection.send("claimed")
        connection.poll(None)


def die_at_create(place: Path | str, manifest: Manifest, die_at: int, connection: Connection) -> None:
    """Write all units; SIGKILL before the file number `die_at` gets its name. Sends the number of files otherwise."""
    count, real_link = 0, os.link

    def link(*paths: Any) -> None:
        nonlocal count
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        real_link(*paths)

    os.link = link  # type: ignore[assignment]
    tiny.make_whole_cache(place, manifest)
    connection.send(count)


def race_for(place: Path | str, names: list[str], content: bytes, connection: Connection) -> None:
    """Create files, and claim a lease, at the same moment as others; report the ones won."""
    store, leases = open_store(place), Leases(open_store(place))
    connection.send("ready")
    connection.recv()
    won = [name for name in names if not store.create_all({name: content})]
    connection.send((won, leases.claim("prize")))
    connection.recv()
    leases.close()
