"""Repositories of the Hugging Face hub as read-only stores, at one commit: hf://[datasets/]OWNER/NAME[@REVISION][/PATH].

The token comes from `HF_TOKEN` or the hub's login. It is sent to the hub alone and never printed.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn

from tinymim.configs.errors import StoreError, first_line
from tinymim.storage.entries import REQUESTS, Entry, merged, refuse_large
from tinymim.storage.read_only import ReadOnlyStore

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem

SCHEME = "hf://"
_NETWORK = "check the network; HF_ENDPOINT names another hub"
_HINT = "check the name, and for a private repository HF_TOKEN or `hf auth login`"


class HubFile(NamedTuple):
    """One file of a repository; `version` is the digest of its content."""

    path: str
    size_bytes: int
    version: str


def pinned(url: str) -> str:
    """The URL with the commit that its revision names now, so that all reads are of one state.

    Raises:
        StoreError: there is no such repository or revision, or the hub cannot be reached.
    """
    return _pinned(url, os.getpid())


@lru_cache(maxsize=64)
def _pinned(url: str, _pid: int) -> str:
    with explained(url):
        found: Any = _files().resolve_path(url.removeprefix(SCHEME))
        info = _files()._api.repo_info(found.repo_id, repo_type=found.repo_type, revision=found.revision)
    kind = {"model": "", "dataset": "datasets/", "space": "spaces/"}[found.repo_type]
    return f"{SCHEME}{kind}{found.repo_id}@{info.sha}/{found.path_in_repo}".rstrip("/")


def _files() -> "HfFileSystem":
    from huggingface_hub import HfFileSystem

    return HfFileSystem()  # one per thread: fsspec keeps it


@contextlib.contextmanager
def explained(place: object) -> Iterator[None]:
    """Turn the hub's errors about `place` into StoreError; those of absent files become FileNotFoundError.

    Only the first line of an error is kept, and it names no header.
    """
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        yield
    except StoreError:
        raise
    except LocalEntryNotFoundError as error:  # it is a FileNotFoundError, too
        raise StoreError(f"{place} cannot be reached", got=first_line(error), hint=_NETWORK) from None
    except FileNotFoundError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            raise StoreError(f"{place} does not exist", got=first_line(error), hint=_HINT) from None
        raise
    except RepositoryNotFoundError as error:
        raise StoreError(f"{place} does not exist, or is private", got=first_line(error), hint=_HINT) from None
    except OfflineModeIsEnabled as error:
        raise StoreError(f"{place} cannot be reached", got=first_line(error), hint="unset HF_HUB_OFFLINE") from None
    except (HfHubHTTPError, HFValidationError, NotImplementedError) as error:
        raise StoreError(f"the hub refuses {place}", got=first_line(error), hint=_HINT) from None
    except Exception as error:  # the client's transport raises kinds of its own
        raise StoreError(
            f"{place} cannot be reached",
            got=f"{type(error).__name__}: {first_line(error)}",
            hint=_NETWORK,
        ) from None


def list_files(url: str, prefix: str = "") -> list[HubFile]:
    """All files below a pinned URL, paths relative to it. Raises StoreError."""
    root = url.removeprefix(SCHEME)
    with explained(url):
        try:
            found: dict[str, Any] = _files().find(f"{root}/{prefix}".rstrip("/"), detail=True)  # type: ignore[assignment]
        except FileNotFoundError:
            return []
    return [
        HubFile(path.removeprefix(f"{root}/"), int(info["size"]), _version(info))
        for path, info in found.items()
        if info["type"] == "file"
    ]


def _version(info: Mapping[str, Any]) -> str:
    large = info.get("lfs")
    return str(large["sha256"] if large else info["blob_id"])


def read_parts(url: str, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Parts of a file below a pinned URL, one request each; a part is short where the file ends.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: the hub refuses or fails.
    """
    with (
        explained(f"{url}/{path}"),
        _files().open(f"{url.removeprefix(SCHEME)}/{path}", "rb", cache_type="none") as file,
    ):
        parts = []
        for begin, end in ranges:
            file.seek(min(begin, file.size))
            parts.append(file.read(max(0, min(end, file.size) - begin)))
        return parts


def size_of(url: str, path: str) -> int:
    """Bytes of a file below a pinned URL; errors as `read_parts`."""
    with explained(f"{url}/{path}"):
        return int(_files().info(f"{url.removeprefix(SCHEME)}/{path}")["size"])


class HubStore(ReadOnlyStore):
    """A folder of a repository at the commit of its first use."""

    distant: ClassVar[bool] = True

    def __init__(self, url: str) -> None:
        self.place: str = url

    @property
    def _url(self) -> str:
        return pinned(self.place)

    def read(self, path: str, limit: int) -> bytes:
        size = size_of(self._url, path)
        refuse_large(path, size, limit)
        return read_parts(self._url, path, [(0, size)])[0]

    def read_all(self, limits: Mapping[str, int]) -> dict[str, bytes]:
        with ThreadPoolExecutor(REQUESTS) as pool:
            return dict(zip(limits, pool.map(self.read, limits.keys(), limits.values()), strict=True))

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        runs = merged(ranges)
        parts = [memoryview(part) for part in read_parts(self._url, path, runs)]
        number, last = -1, None
        for begin, end in ranges:
            number += begin != last
            start, last = runs[number][0], end
            yield parts[number][begin - start : end - start]

    def exists(self, path: str) -> bool:
        try:
            size_of(self._url, path)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[Entry]:
        for file in list_files(self._url, prefix):
            yield Entry(file.path, file.size_bytes, datetime.fromtimestamp(0, UTC))  # a commit has no dates of files

    def refuse(self) -> NoReturn:
        raise StoreError(
            f"{self.place} can only be read",
            got="a write to the hub",
            hint="write to a folder, then `tinymim hub push` it",
        )
