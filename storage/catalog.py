"""The caches below a root, `<root>/<spec_id>/`: the same spec finds the same cache."""

from dataclasses import dataclass
from pathlib import Path

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, StoreError, UserError
from tinymim.configs.place import joined
from tinymim.storage import layout
from tinymim.storage.manifest import Manifest
from tinymim.storage.store import open_store


@dataclass(frozen=True)
class FoundCache:
    """A cache and its manifest, or the problem with its manifest."""

    place: Path | str
    manifest: Manifest | None
    problem: UserError | None = None

    def __str__(self) -> str:
        if self.manifest is None:
            return f"{self.place}: {self.problem.what if self.problem else 'unknown'}"
        teacher, codec = self.manifest.teacher, self.manifest.codec
        return (
            f"{self.place}: spec {self.manifest.spec_id}, {teacher['name']} block {teacher['block']}, "
            f"{codec['name']}, {self.manifest.num_views} views"
        )


def caches_below(root: Path | str) -> list[FoundCache]:
    """The caches directly in `root`, sorted by name, after `root` itself if it is a cache.

    Raises:
        StoreError, OSError: `root` cannot be listed.
    """
    names = sorted(open_store(root).folders())
    found = (_look(place) for place in [root, *(joined(root, name) for name in names)])
    return [cache for cache in found if cache is not None]


def resolve(place: Path | str) -> Path | str:
    """The place of a cache: `place` itself, or the only cache directly in it.

    Raises:
        UserError: there is no cache, or there are several, which the message lists.
        StoreError: the object store refuses or fails.
    """
    store = open_store(place)
    if store.exists(layout.METADATA):
        return place
    match caches_below(place):
        case [only]:
            return only.place
        case []:
            layout.read_manifest(store)  # raises that there is none
            return place
        case several:
            listing = "\n    ".join(map(str, several))
            raise UserError(
                f"{place} holds {len(several)} caches",
                got=f"\n    {listing}",
                expected="one cache",
                hint="name one of them; `tinymim cache list` shows them",
            )


def _look(place: Path | str) -> FoundCache | None:
    store = open_store(place)
    if not store.exists(layout.METADATA):
        return None
    try:
        return FoundCache(place, layout.read_manifest(store))
    except (CacheCorrupt, CacheMismatch) as error:
        return FoundCache(place, None, error)
    except StoreError:
        raise
    except UserError:
        return None  # a zarr group that is not a cache
