"""The errors of both stages where images or pixels are not those that a cache was made from."""

from collections.abc import Mapping
from typing import Any

from tinymim.configs.errors import CacheMismatch, ViewMismatch
from tinymim.pipeline.decode import environment


def view_mismatch(
    key: str, shard: str, view: int, found: int, wanted: int, made_with: Mapping[str, Any]
) -> ViewMismatch:
    """The error of a view whose pixels do not have the stored digest.

    Args:
        key, shard, view: the image, its shard, and the view's index.
        found, wanted: the low 32 bits of the digest of the pixels, as rendered and as stored.
        made_with: the environment in the cache's manifest.
    """
    now = environment()
    changed = [
        f"{name} {made_with.get(name)} -> {now.get(name)}"
        for name in sorted({*made_with, *now})
        # Digests of operations were compared at start-up.
        if made_with.get(name) != now.get(name) and not name.startswith("canary.")
    ]
    return ViewMismatch(
        f"image '{key}' of shard {shard}, view {view}: the pixels are not those the teacher saw",
        got=f"digest {found:08x}",
        expected=f"digest {wanted:08x}",
        hint="libraries that changed since the cache was made: "
        + (", ".join(changed) or "none, so the image changed; restore its shard"),
    )


def other_images(shard: str, got: str, expected: str) -> CacheMismatch:
    """The error of a shard whose units hold different images."""
    return CacheMismatch(
        f"the units of shard {shard} hold different images",
        got=got,
        expected=expected,
        hint="another decoder may have read other images; use the libraries that the cache was made with",
    )
