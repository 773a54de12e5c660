"""Patch tokens by residual vector quantisation.

Shapes: B view, Q sampled patch, S codebook, C width.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor

from tinymim.configs.codecs.vectors import FeaturesPqCodec
from tinymim.configs.taps import Shapes
from tinymim.targets import codebooks
from tinymim.targets.contract import ArraySpec, Projection, Tapped
from tinymim.targets.features.kind import Features
from tinymim.targets.vectors import VectorTarget, rows_of


@dataclass(frozen=True)
class FeaturesPq(Features):
    """Patch tokens as one byte for each of several codebooks, which are constants of the cache.

    **Biased**: a token comes back as the nearest sum of entries (`targets/codebooks.py`). No length is stored: loss
    and floor are those of the decoded token.
    """

    config: FeaturesPqCodec  # type: ignore[assignment]  # the fields of FeaturesCodec but for its bits

    @property
    def unbiased(self) -> bool:
        """See `TargetKind`."""
        return False

    @property
    def whole(self) -> bool:
        """See `TargetKind`."""
        return False

    @property
    def calibration_views(self) -> int:
        """See `TargetKind`."""
        return self.config.calibration_views

    def draws(self, shapes: Shapes) -> bool:
        """See `TargetKind`: where tokens are sampled."""
        return self.sampled is not None and self.sampled < self.count(shapes)

    def specs(self, shapes: Shapes) -> tuple[ArraySpec, ...]:
        """See `TargetKind`: the codes of every sampled token."""
        count = min(self.sampled or self.count(shapes), self.count(shapes))
        return (ArraySpec("code", "uint8", (count, self.config.stages)),)

    @torch.no_grad()
    def encode(self, tapped: Tapped, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """See `TargetKind`."""
        vectors = self.vectors(tapped)
        index = self._index(view_keys, vectors.shape[1])
        exact = self._target(vectors if index is None else rows_of(vectors, index), torch.float64)
        return {"code": codebooks.encode(exact, self.constants["codebooks"])}

    @torch.no_grad()
    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], shapes: Shapes) -> VectorTarget:
        """See `TargetKind`."""
        value = codebooks.decode(arrays["code"], self.constants["codebooks"])
        return VectorTarget(self._index(view_keys, self.count(shapes)), value, torch.linalg.vector_norm(value, dim=-1))

    @torch.no_grad()
    def calibrate(self, tapped: Iterable[Tapped], projection: Projection) -> dict[str, Tensor]:
        """See `TargetKind`: `codebooks` [S, 256, C], float32, and those of whitening where the target is whitened."""
        vectors = torch.cat([self.vectors(each).cpu().float().flatten(0, 1) for each in tapped])
        constants = self._whitening(vectors.double()) if self.config.target == "whiten" else {}
        [targets] = replace(self, constants=constants)._target(vectors[None], torch.float32)
        return constants | {"codebooks": codebooks.codebooks(targets, self.config.stages)}
