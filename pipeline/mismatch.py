"""The errors of both stages where images or pixels are not those that a cache was made from."""

from collections.abc import Mapping
from typing import Any

from tinymim.configs.errors import CacheMismatch, SourceError, ViewMismatch
from tinymim.pipeline.dataset import Partners
from tinymim.pipeline.decode import environment


def view_mismatch(
    key: str,
    shard: str,
    view: int,
    found: int,
    wanted: int,
    made_with: Mapping[str, Any],
    partner: str | None = None,
) -> ViewMismatch:
    """The error of a view whose pixels do not have the stored digest.

    Args:
        key, shard, view: the image, its shard, and the view's index.
        found, wanted: the low 32 bits of the digest of the pixels, as rendered and as stored.
        made_with: the environment in the cache's manifest.
        partner: the image that the view is mixed with.
    """
    now = environment()
    changed = [
        f"{name} {made_with.get(name)} -> {now.get(name)}"
        for name in sorted({*made_with, *now})
        # Digests of operations and pairs were compared at start-up.
        if made_with.get(name) != now.get(name) and not name.startswith("canary.")
    ]
    return ViewMismatch(
        f"image '{key}'{f' mixed with {partner!r}' if partner is not None else ''} of shard {shard}, view {view}: "
        "the pixels are not those the teacher saw",
        got=f"digest {found:08x}",
        expected=f"digest {wanted:08x}",
        hint="libraries that changed since the cache was made: "
        + (", ".join(changed) or f"none, so {'one of them' if partner else 'the image'} changed; restore its shard"),
    )


def other_images(shard: str, got: str, expected: str) -> CacheMismatch:
    """The error of a shard whose units hold different images."""
    return CacheMismatch(
        f"the units of shard {shard} hold different images",
        got=got,
        expected=expected,
        hint="another decoder may have read other images; use the libraries that the cache was made with",
    )


def half_readable(shard: str, key: str, got: str, expected: str, where: str) -> SourceError:
    """The error of an image that can be decoded for some of its views, or in some of its pairs, only."""
    return SourceError(
        f"image '{key}' of shard {shard} can be read for some views only",
        got=f"{where}: {got}",
        expected=expected,
        hint="run the same command again, or repair the shard",
    )


class PartnersSeen:
    """What happened to the images of a shard as partners: each must be as readable as it is for views of its own.

    Stage two leaves views unmixed whose partner the cache lists as unreadable, so stage one must have done the same.
    """

    def __init__(self) -> None:
        self._mixed: set[str] = set()
        self._lost: dict[str, str] = {}

    def add(self, partners: Partners | None) -> None:
        """Add a batch."""
        if partners is not None:
            self._mixed.update(key for key in partners.keys if key is not None)
            self._lost |= partners.lost

    def require(self, shard: str, unreadable: Mapping[str, str]) -> None:
        """Raises SourceError unless exactly the `unreadable` images, by key, were unreadable as partners."""
        for key, reason in self._lost.items():
            if key not in unreadable:
                raise half_readable(shard, key, reason, "readable, as for its own views", "as a partner")
        for key in sorted(self._mixed & unreadable.keys()):
            raise half_readable(shard, key, "readable", f"{unreadable[key]}, as for its own views", "as a partner")
