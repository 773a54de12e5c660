"""What stores share that can only be read."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import NoReturn

from tinymim.storage.entries import Entry


class ReadOnlyStore(ABC):
    """The part of `Store` that writes, each method an error, and the folders of the files that `list` yields."""

    @abstractmethod
    def refuse(self) -> NoReturn:
        """Raise the error that says how to change what this store holds."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See `Store`."""

    def folders(self, prefix: str = "") -> set[str]:
        """See `Store`."""
        start = f"{prefix}/" if prefix else ""
        below = (entry.path.removeprefix(start) for entry in self.list(prefix))
        return {path.partition("/")[0] for path in below if "/" in path}

    def create_all(self, files: Mapping[str, bytes]) -> NoReturn:
        """See `refuse`."""
        self.refuse()

    def draft(self, path: str) -> NoReturn:
        """See `refuse`."""
        self.refuse()

    def write(self, path: str, data: bytes) -> NoReturn:
        """See `refuse`."""
        self.refuse()

    def remove(self, paths: Iterable[str]) -> NoReturn:
        """See `refuse`."""
        self.refuse()

    def remove_tree(self, prefix: str) -> NoReturn:
        """See `refuse`."""
        self.refuse()

    def remove_dead_writes(self, folders: Iterable[str], of_the_living: bool = False) -> NoReturn:
        """See `refuse`."""
        self.refuse()
