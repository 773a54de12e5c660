"""`tinymim cache pack`: write a cache as a few large tars and a card, for a model hub or any place of few files."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.stages.cache.info import describe
from tinymim.stages.pages.card import card
from tinymim.stages.pages.numbers import format_bytes
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.progress import Meter
from tinymim.storage import layout
from tinymim.storage.catalog import resolve
from tinymim.storage.check import checked_pieces
from tinymim.storage.commit import UnitInfo, encode_commit
from tinymim.storage.constants import constants_bytes, constants_places
from tinymim.storage.layout import LAYERS, METADATA
from tinymim.storage.packed import (
    CARD,
    END,
    FORMAT,
    INDEX,
    REMEDY,
    TAR_BYTES,
    VERSION,
    PackedIndex,
    PackedTar,
    header_bytes,
    padding,
    tar_header,
)
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import Store, explained_write_errors, open_store

READ_BYTES = 2**24
Files = list[tuple[str, "bytes | UnitInfo"]]  # path, and the content or the unit whose file it is


def run(source: Path | str, target: Path | str) -> dict[str, Any]:
    """Pack the committed units of a cache. Tars that are already there are checked and kept.

    Args:
        source: a cache, or a root that holds exactly one.
        target: a folder or URL, new or with an unfinished pack of the same cache.

    Returns:
        JSON values: `source`, `target`, `spec_id`, `layers`, `tars` (name, bytes and sha256 of each), and the number of
        tars `kept` because they were there, of `files` and of `bytes`.

    Raises:
        UserError: `source` is no cache or has no units, or `target` holds something else or cannot be written.
        StoreError: the object store refuses or fails.
        CacheMismatch: `target` holds a pack of something else.
        CacheCorrupt: a unit is damaged.
        Interrupted: a signal stopped it; the same command continues.
    """
    reader, store = CacheReader(resolve(source)), open_store(target)
    if not reader.units():
        raise UserError(f"the cache {reader.place} holds no unit to pack", hint="run `tinymim cache-teacher` first")
    parts = list(_split(_files(reader)))
    names = [f"cache-{number:05d}-of-{len(parts):05d}.tar" for number in range(len(parts))]
    _refuse_others(store, {*names, INDEX, CARD})
    tars, kept = [], 0
    with (
        explained_write_errors(store),
        StopFlag() as stop,
        Meter("cache pack", sum(_tar_bytes(files) for files in parts), "B") as meter,
    ):
        for name, files in zip(names, parts, strict=True):
            digest = hashlib.sha256()
            if store.exists(name):
                _require_same(reader, store, name, files, digest)
                kept += 1
            else:
                with store.draft(name) as draft:
                    for data in _tar(reader, files):
                        if stop.requested:
                            raise Interrupted("finished tars are kept; the same command continues")
                        draft.file.write(data)
                        digest.update(data)
                        meter.advance(len(data))
                    if not draft.create():
                        raise UserError(f"another process has written {store.place}/{name}", hint="name another target")
            listing = [(path, _size(content)) for path, content in files]
            tars.append(PackedTar(name=name, size_bytes=_tar_bytes(files), sha256=digest.hexdigest(), files=listing))
        index = PackedIndex(
            format=FORMAT,
            format_version=VERSION,
            spec_id=reader.manifest.spec_id,
            layers={name: layer.spec_id for name, layer in reader.layers.items()},
            tars=tars,
        )
        store.write(CARD, card(describe(reader.place)).encode())
        store.write(INDEX, index.encode())  # last: it makes the tars a packed cache
    return {
        "source": str(reader.place),
        "target": str(store.place),
        "spec_id": reader.manifest.spec_id,
        "layers": list(reader.layers),
        "tars": [{"name": tar.name, "bytes": tar.size_bytes, "sha256": tar.sha256} for tar in tars],
        "kept": kept,
        "files": sum(len(files) for files in parts),
        "bytes": sum(tar.size_bytes for tar in tars),
    }


def format_report(report: Mapping[str, Any]) -> str:
    """The report of `run` as text for a terminal."""
    lines = [
        f"{report['source']} -> {report['target']}",
        f"spec {report['spec_id']}: {report['files']:,} files, {format_bytes(report['bytes'])}, in "
        f"{len(report['tars'])} tar(s), {report['kept']} of them were already there",
        *(f"  {tar['name']}  {format_bytes(tar['bytes'])}  sha256 {tar['sha256']}" for tar in report["tars"]),
        f"also {INDEX}, which lists their files, and {CARD}, the card of a model hub",
        f"unpack it: tinymim cache copy {report['target']} DST",
    ]
    return "\n".join(lines)


def _files(reader: CacheReader) -> Files:
    """Every file of the committed cache in the order of the tars: what describes it first, then sorted by path."""
    head: dict[str, bytes] = {METADATA: layout.root_group(reader.manifest)}
    head |= {f"{name}/{METADATA}": layout.plain_group() for name in (*reader.view_layers, LAYERS)}
    for name, layer in reader.layers.items():
        head[f"{layout.layer_folder(name)}/{METADATA}"] = layout.layer_group(layer)
        data = constants_bytes(reader.store, layer)
        if data is not None:
            path, record_path = constants_places(name)
            head |= {path: data, record_path: reader.store.read(record_path, layout.COMMIT_LIMIT_BYTES)}
    body: dict[str, bytes | UnitInfo] = {}
    for name in (*reader.view_layers, *reader.layers):
        for info in reader.units(name):
            body |= {info.path: info, layout.commit_file(name, info.unit): encode_commit(info)}
    return [*sorted(head.items()), *sorted(body.items())]


def _size(content: bytes | UnitInfo) -> int:
    return len(content) if isinstance(content, bytes) else content.size_bytes


def _member_bytes(path: str, size_bytes: int) -> int:
    return header_bytes(path, size_bytes) + size_bytes + padding(size_bytes)


def _tar_bytes(files: Files) -> int:
    return sum(_member_bytes(path, _size(content)) for path, content in files) + len(END)


def _split(files: Files) -> Iterator[Files]:
    """The files of each tar."""
    part: Files = []
    held = len(END)
    for path, content in files:
        size_bytes = _member_bytes(path, _size(content))
        if part and held + size_bytes > TAR_BYTES:
            yield part
            part, held = [], len(END)
        part.append((path, content))
        held += size_bytes
    yield part


def _tar(reader: CacheReader, files: Files) -> Iterator[bytes]:
    """The bytes of a tar in bounded pieces. Nothing in it depends on time or machine."""
    for path, content in files:
        yield tar_header(path, _size(content))
        if isinstance(content, bytes):
            yield content
        else:
            try:
                yield from checked_pieces(reader.store, content)
            except ValueError as error:
                raise CacheCorrupt(
                    f"unit {content} of {reader.place} is damaged and cannot be packed: {error}",
                    hint="`tinymim cache repair` recomputes it; then run the same command again",
                ) from error
        yield bytes(padding(_size(content)))
    yield END


def _refuse_others(store: Store, own: set[str]) -> None:
    foreign = sorted(entry.path for entry in store.list() if entry.path not in own)
    if foreign:
        raise UserError(
            f"{store.place} is not empty and not a pack of this cache",
            got=foreign[0],
            hint="name a new folder",
        )


def _require_same(reader: CacheReader, store: Store, name: str, files: Files, digest: Any) -> None:
    """Compare a tar that is already there with what would be written; raises CacheMismatch."""
    at = 0
    for data in _tar(reader, files):
        if data and b"".join(store.read_ranges(name, [(at, at + len(data))])) != data:
            raise CacheMismatch(f"{store.place}/{name} is a tar of something else", hint=f"remove it, or {REMEDY}")
        digest.update(data)
        at += len(data)
