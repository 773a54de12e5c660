"""Tars in an object store: listing them, and reading ranges of the listed version.

Stores are not pickled. A loader worker gets the URL and opens its own store.
"""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError, PreconditionError
from obstore.store import HTTPStore

from tinymim.configs.errors import StoreError, first_line
from tinymim.storage import hub
from tinymim.storage.objects import ABSENT, connect, store_error

if TYPE_CHECKING:
    from obstore import ObjectMeta

_HINT = "check source.shards and source.pattern"
SHORT_TRIES = 3  # tries of a range whose answer is too short, which obstore takes for success


@dataclass(frozen=True)
class RemoteObject:
    """One object of a source in the version that was listed."""

    url: str  # the source's URL, without a trailing slash
    path: str  # the path below the URL
    size_bytes: int
    version: str  # the entity tag; the modification time if the store has none

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    def __str__(self) -> str:
        return f"{self.url}/{self.path}"


def list_objects(url: str, pattern: str, known: list[str]) -> list[RemoteObject]:
    """The objects below `url` whose path matches `pattern`, sorted by name.

    Args:
        url: the source's URL.
        pattern: a pattern of `Path.glob`, without `**`.
        known: names to request one by one if the store is a plain web server, which cannot list.

    Raises:
        StoreError: the store refuses or fails.
    """
    if url.startswith(hub.SCHEME):
        return _list_hub(hub.pinned(url), pattern)
    store = connect(url)
    parts = len(PurePosixPath(pattern).parts)
    try:
        if isinstance(store, HTTPStore):
            found = [obstore.head(store, name) for name in known]
        elif parts == 1:
            found = list(obstore.list_with_delimiter(store)["objects"])
        else:
            found = list(obstore.list(store).collect())
    except (BaseError, OSError) as error:
        raise store_error(url, error, _HINT) from error
    paths = {meta["path"]: meta for meta in found}
    chosen = [path for path in paths if len(PurePosixPath(path).parts) == parts and PurePosixPath(path).match(pattern)]
    return [
        RemoteObject(url, path, paths[path]["size"], _version(paths[path]))
        for path in sorted(chosen, key=PurePosixPath)
    ]


def _list_hub(url: str, pattern: str) -> list[RemoteObject]:
    """`list_objects` of a repository of the hub, at one commit."""
    parts = len(PurePosixPath(pattern).parts)
    return [
        RemoteObject(url, file.path, file.size_bytes, file.version)
        for file in sorted(hub.list_files(url), key=lambda each: PurePosixPath(each.path))
        if len(PurePosixPath(file.path).parts) == parts and PurePosixPath(file.path).match(pattern)
    ]


def read_bytes(url: str, name: str) -> bytes | None:
    """A small object, None if it is missing. Raises StoreError if the store refuses or fails."""
    try:
        if url.startswith(hub.SCHEME):
            at = hub.pinned(url)
            return hub.read_parts(at, name, [(0, hub.size_of(at, name))])[0]
        return bytes(obstore.get(connect(url), name).bytes())
    except ABSENT:
        return None
    except (BaseError, OSError) as error:
        raise store_error(f"{url}/{name}", error) from error


def _version(meta: "ObjectMeta") -> str:
    tag = (meta["e_tag"] or "").removeprefix("W/").strip('"')  # some stores quote it in some answers only
    return tag or meta["last_modified"].isoformat()


def fetch_range(source: RemoteObject, start: int, end: int) -> memoryview:
    """Bytes [start, end) of an object in one request.

    Raises:
        StoreError: the store refuses or fails, or the object was replaced since it was listed.
    """
    store = None if source.url.startswith(hub.SCHEME) else connect(source.url)
    got = 0
    for _ in range(SHORT_TRIES):
        try:
            if store is None:  # a commit, whose files do not change
                [part] = hub.read_parts(source.url, source.path, [(start, end)])
                if len(part) == end - start:
                    return memoryview(part)
                got = len(part)
                continue
            answer = obstore.get(store, source.path, options={"range": (start, end)})
            _same_object(source, answer.meta)
            data = memoryview(answer.bytes())
        except PreconditionError as error:  # replaced between two parts of one answer
            raise _changed(source, first_line(error)) from error
        except (BaseError, OSError) as error:
            raise store_error(source, error, _HINT) from error
        if len(data) == end - start:
            return data
        got = len(data)
    raise StoreError(
        f"{source}: the store sends too few bytes",
        got=f"{got} bytes from {start}",
        expected=f"{end - start} bytes",
        hint="check the object and any proxy in front of the store, then run the same command again",
    )


def _same_object(source: RemoteObject, meta: "ObjectMeta") -> None:
    if (meta["size"], _version(meta)) != (source.size_bytes, source.version):
        raise _changed(source, f"{meta['size']} bytes, version {_version(meta)}")


def _changed(source: RemoteObject, got: str) -> StoreError:
    return StoreError(
        f"{source} was replaced while it was being read",
        got=got,
        expected=f"{source.size_bytes} bytes, version {source.version}",
        hint="restore the shard; images that were read before belong to the listed version",
    )
