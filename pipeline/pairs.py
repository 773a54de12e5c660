"""Mixup and CutMix in the view law: which images of a shard are mixed in a view, and how (I1). docs/views.md.

In every view the images of a shard form pairs: sorted by the hash of (seed, view, sample key), the first two are
partners, the next two, and so on. The last image of an odd shard stays unmixed. The pairs depend on the keys of the
shard alone, so no order, batch, rank or worker can change them, nor the other shards of a source. Both partners of a
pair share one draw: x' = s x + (1 - s) y and y' = s y + (1 - s) x, as in TinyViT (Wu et al., ECCV 2022), where s is
the share.

Pixels are blended as integers, with rounding that is stated at `mixed`.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tinymim.configs.sections.views import PairsConfig
from tinymim.pipeline.operations.pixels import Pixels
from tinymim.storage.manifest import check_canaries

_LEVELS: Final = 256  # a share of mixup is a multiple of 1 / 256
_CANARY: Final = "fbc4a95b65d0ab7d"
_NAME: Final = "canary.pairs"


class Mix(NamedTuple):
    """How a pair is mixed.

    Attributes:
        share: the share of a view's own image. Of CutMix it is that of the pixels which are kept, after the box was
            clipped: labels are mixed by it.
        box: top, left, height and width of the box that CutMix exchanges; None: mixup.
    """

    share: float
    box: tuple[int, int, int, int] | None


class Pairs:
    """The law of pairs of `PairsConfig`.

    Args:
        config: the section of the view law.
        seed: the seed of the view law.
        size: width and height of a view.
    """

    def __init__(self, config: PairsConfig, seed: int, size: int) -> None:
        self.config, self.seed, self.size = config, seed, size

    def mix(self, one: int, other: int) -> Mix | None:
        """How two views are mixed, given by their identities in any order; None: they stay unmixed.

        The box follows timm's `rand_bbox`.
        """
        config, size, draws = self.config, self.size, _draws(min(one, other), max(one, other))
        if next(draws) >= config.share:
            return None
        cuts = bool(config.cutmix) and (not config.mixup or next(draws) < config.cutmix_share)
        share = _beta(draws, config.cutmix if cuts else config.mixup)
        if not cuts:
            return Mix(round(share * _LEVELS) / _LEVELS, None)
        side = int(size * math.sqrt(1.0 - share))
        ends = []
        for _ in range(2):
            middle = int(next(draws) * size)
            ends.append((max(0, middle - side // 2), min(size, middle + (side + 1) // 2)))
        (top, bottom), (left, right) = ends
        height, width = bottom - top, right - left
        return Mix(1.0 - height * width / size**2, (top, left, height, width))


def partners_of(identities: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The partner of every image of a shard in one view; an image without one is its own.

    Args:
        identities: int64 [n], the hashes of (seed, view, key) of the shard's images.

    Returns:
        int64 [n], an involution.
    """
    order = np.argsort(identities, kind="stable")
    found = np.arange(len(order))
    even = len(order) // 2 * 2
    found[order[0:even:2]], found[order[1:even:2]] = order[1:even:2], order[0:even:2]
    return found


def mixed_key(own: int, partner: int) -> int:
    """The 64-bit identity of a mixed view, from those of its own image's view and of its partner's, in this order."""
    raw = b"".join(each.to_bytes(8, "big", signed=True) for each in (own, partner))
    digest = hashlib.blake2b(raw, digest_size=8, person=b"tinymim/mixed").digest()
    return int.from_bytes(digest, "big", signed=True)


def mixed(own: Pixels, other: Pixels, mix: Mix) -> Pixels:
    """A new view of `own` and its partner `other`, uint8 [3, S, S].

    Mixup gives floor((256 s x + 256 (1 - s) y + 128) / 256) in integers: the nearest level, halves up. CutMix copies
    the box of `other`.
    """
    if mix.box is not None:
        top, left, height, width = mix.box
        cut = own.copy()
        cut[:, top : top + height, left : left + width] = other[:, top : top + height, left : left + width]
        return cut
    weight = round(mix.share * _LEVELS)
    total = own * np.uint16(weight)  # at most 255 * 256 + 128, so uint16 holds all of it
    total += other * np.uint16(_LEVELS - weight)
    total += np.uint16(_LEVELS // 2)
    total >>= np.uint16(8)
    return total.astype(np.uint8)


def soft_labels(
    labels: Int64[Tensor, " B"], partners: Int64[Tensor, " B"], shares: Float[Tensor, " B"], num_classes: int
) -> Float[Tensor, "B K"]:
    """Targets of classification: the share at a view's own class, the rest at its partner's.

    Args:
        labels: class numbers of the views' own images; -1: none, which adds nothing to the target.
        partners: those of their partners, the own ones where a view is unmixed.
        shares: the shares of the own images, 1 where a view is unmixed.
        num_classes: K.
    """
    shares = shares.float()
    found = torch.zeros(len(labels), num_classes, device=labels.device)
    for classes, weights in ((labels, shares), (partners, 1.0 - shares)):
        found.scatter_add_(1, classes.clamp(min=0)[:, None], (weights * (classes >= 0))[:, None])
    return found


# ---------------------------------------------------------------- draws


def _draws(first: int, second: int) -> Iterator[float]:
    """Uniform float64 numbers in [0, 1) for a pair, without end."""
    counter = 0
    while True:
        raw = hashlib.blake2b(f"{first}/{second}/{counter}".encode(), digest_size=64, person=b"tinymim/pair").digest()
        for start in range(0, 64, 8):
            yield (int.from_bytes(raw[start : start + 8], "big") >> 11) * 2.0**-53
        counter += 1


def _beta(draws: Iterator[float], alpha: float) -> float:
    """A draw of Beta(alpha, alpha) by Jöhnk's method (Metrika 8, 1964)."""
    if alpha == 1.0:
        return next(draws)
    while True:
        x, y = (math.pow(next(draws), 1.0 / alpha) for _ in range(2))
        if 0.0 < x + y <= 1.0:
            return x / (x + y)


def pair_canaries() -> dict[str, str]:
    """The digest of fixed draws and mixed pixels, as a manifest's environment holds it.

    Raises:
        ViewMismatch: it is not the committed one: the law draws or mixes otherwise on this machine.
    """
    found = {_NAME: canary_digest()}
    check_canaries({_NAME: _CANARY}, found)
    return found


def canary_digest() -> str:
    """64 bits of blake2b over 64 draws and what they make of fixed pixels."""
    ramp = np.arange(2 * 3 * 40 * 40, dtype=np.int64)
    one, other = ((ramp * ramp * 31 + ramp * 17) % 251).astype(np.uint8).reshape(2, 3, 40, 40)
    digest, law = hashlib.blake2b(digest_size=8), Pairs(PairsConfig(mixup=0.8, cutmix=1.0, cutmix_share=0.5), 0, 40)
    for number in range(64):
        mix = law.mix(number, -number)
        assert mix is not None
        digest.update(repr(mix).encode() + mixed(one, other, mix).tobytes())
    return digest.hexdigest()
