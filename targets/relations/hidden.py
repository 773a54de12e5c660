"""The `hidden` codec: the input of the block's qkv projection in few bits; the reader rebuilds relations from it.

Decoding is one linear layer on unsigned integer codes c: q | k | v = A c + bias, with scales, offsets and (for
`basis: pca`) the decoding matrix folded into the teacher's qkv weights. A and bias are constants of the cache.

Shapes: B view, N calibration view, T token, C width of the input, W width of q|k|v together, M coded component,
P calibration token, Y byte of a token, H head, D head width, Q query row.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Final

import torch
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor
from torch.nn.functional import linear

from tinymim.configs.codecs.relations import HiddenCodec, Relation
from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.errors import RecipeError
from tinymim.configs.taps import Shapes
from tinymim.targets.contract import ArraySpec, Projection, Tapped
from tinymim.targets.packing import Packing
from tinymim.targets.relations.draws import RELATIONS
from tinymim.targets.relations.kind import RelationKind, check_divides, mean_entropy
from tinymim.targets.relations.qkv import QKV, relation_logits
from tinymim.targets.relations.rows import DenseRows, Rows

DEFAULT_RELATIONS: Final[tuple[Relation, ...]] = ("qk", "vv")

# Step and mean squared error of the best uniform quantiser of a unit Gaussian with 0..8 bits (Max, "Quantizing for
# minimum distortion", IRE Trans. Information Theory 1960; 6 to 8 bits continued numerically).
_STEP: Final = (0.0, 1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
_ERROR: Final = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001041, 0.0003035, 0.0000869)
_FIT_STEPS: Final = 12
_MOST_TOKENS: Final = 16384  # limit of P, the calibration tokens behind second moments and scales
# An error in v is in both sides of v v^T and hurts the student's gradient more than its logit error suggests: measured.
_VALUE_WEIGHT: Final = 8.0


@dataclass(frozen=True)
class Hidden(RelationKind):
    """Codes of the qkv projection's input, from which q, k and v are rebuilt with a small error.

    **Biased**, in principle: the codes are not random, so their error is the same every time. Measured on real images
    (ViT-S, 197 tokens, student at initialisation), as the angle between the mean gradients of 40 images over the whole
    student under decoded and under exact maps, and in brackets the norm of their difference over that of the exact one:

    - `basis: channels`: 8 bits a channel 0.1 degrees (0.002), 4 bits 2.6 (0.045);
    - `basis: pca`: 4 bits 0.4 (0.007), 3 bits 0.9 (0.015), 2 bits 2.0 (0.036), 1 bit 5.1 (0.093), 0.5 bit 9.2 (0.17).

    Attributes:
        config: the codec section.
        targets: the relations, heads and rows to rebuild.
        block: the tapped block of the teacher, counted from 1.
        constants: the constants from `calibrate`, on the device of the records. Before calibration they are empty, and
            the kind can neither encode nor decode.
        entropy_by_head: whether a decoded target's entropy is [B, H] instead of [B], as audits of students need it.
    """

    config: HiddenCodec
    targets: TargetsConfig
    block: int = 1
    constants: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    entropy_by_head: bool = False
    name: ClassVar[str] = "hidden"
    version: ClassVar[int] = 1

    @property
    def whole(self) -> bool:
        """See `TargetKind`."""
        return True

    @property
    def unbiased(self) -> bool:
        """See `TargetKind`."""
        return False

    @property
    def relations(self) -> tuple[Relation, ...]:
        """See `RelationKind`."""
        return self.targets.relations or DEFAULT_RELATIONS

    @property
    def rows(self) -> int | None:
        """See `RelationKind`."""
        return self.targets.rows

    @property
    def calibration_views(self) -> int:
        """See `TargetKind`."""
        return self.config.calibration_views

    def check_teacher(self, tapped: Tapped, projection: Projection) -> None:
        """See `TargetKind`: the teacher's q, k and v must be a linear layer of the block's input."""
        check_projection(self.projections(tapped), *projection(self.taps[0]))

    def calibrate(self, tapped: Iterable[Tapped], projection: Projection) -> dict[str, Tensor]:
        """See `TargetKind`."""
        inputs, heads = [], 0
        for each in tapped:
            self.check_teacher(each, projection)
            qkv = self.projections(each)
            assert qkv.x is not None  # checked above
            inputs.append(qkv.x.float().cpu())
            heads = qkv.q.shape[1]
        return calibrate(self.config, torch.cat(inputs), *projection(self.taps[0]), heads)

    def specs(self, shapes: Shapes) -> tuple[ArraySpec, ...]:
        """See `TargetKind`: the bits of a token's codes end to end, in whole bytes; calibration only divides them."""
        return (ArraySpec("code", "uint8", (shapes.tokens, -(-total_bits(self.config, shapes.width) // 8))),)

    def relation_heads(self, heads: int) -> int:
        """See `RelationKind`. Raises RecipeError where `targets.relation_heads` does not divide the teacher's width."""
        wanted = self.targets.relation_heads or heads
        if self.constants:
            check_divides("targets.relation_heads", wanted, len(self.constants["qkv_bias"]) // 3, heads)
        return wanted

    @torch.no_grad()
    def encode(self, tapped: Tapped, view_keys: Int64[Tensor, " B"]) -> dict[str, Tensor]:
        """See `TargetKind`; encodes the input of the projection, without randomness."""
        x = self.projections(tapped).x
        assert x is not None and self.constants, "the hidden codec encodes x, with constants"
        return {"code": self._packing.pack(quantised(x, self.constants))}

    @torch.no_grad()
    def decode(self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], shapes: Shapes) -> Rows:
        """See `TargetKind`; every relation is a `DenseRows`, float32."""
        target: Rows = {}
        for relation, (rows, logits) in self.logits(arrays, view_keys, shapes).items():
            probs = logits.softmax(-1)
            target[relation] = DenseRows(rows, probs, mean_entropy(probs, self.entropy_by_head))
        return target

    @torch.no_grad()
    def logits(
        self, arrays: Mapping[str, Tensor], view_keys: Int64[Tensor, " B"], shapes: Shapes
    ) -> dict[Relation, tuple[Int64[Tensor, "B H Q"] | None, Float[Tensor, "B H Q T"]]]:
        """The rows of a decoded target, and their logits in float32, by relation."""
        constants, found = self.constants, {}
        with torch.autocast(view_keys.device.type, enabled=False):
            codes = self._packing.unpack(arrays["code"]).float()
            sides = linear(codes, constants["qkv_weight"], constants["qkv_bias"]).chunk(3, dim=-1)
        q, k, v = (side.unflatten(-1, (self._heads, -1)).transpose(1, 2) for side in sides)
        heads = self.relation_heads(self._heads)
        qkv = QKV(q, k, v).resplit(heads)
        for relation in self.relations:
            rows = self.sampled_rows(relation, view_keys, heads, shapes.tokens)
            logits = relation_logits(qkv, relation, rows)
            # Both sides of a token's logit with itself have the same error, so its mean is not zero: see `calibrate`.
            lost = constants["lost"][RELATIONS[relation]].unflatten(0, (heads, -1)).sum(-1) / math.sqrt(qkv.q.shape[3])
            own = (torch.arange(shapes.tokens, device=codes.device) if rows is None else rows)[..., None]
            shape = (*logits.shape[:3], 1)
            logits.scatter_add_(-1, own.expand(shape), lost[:, None, None].expand(shape))
            found[relation] = rows, logits
        return found

    @cached_property
    def _packing(self) -> Packing:
        return Packing(self.constants["bits"])

    @cached_property
    def _heads(self) -> int:
        return int(self.constants["heads"])


@torch.no_grad()
def calibrate(
    config: HiddenCodec,
    x: Float[Tensor, "N T C"],
    qkv_weight: Float[Tensor, "W C"],
    qkv_bias: Float[Tensor, " W"] | None,
    heads: int,
) -> dict[str, Tensor]:
    """The constants of a cache, from the inputs of the projection on the calibration views; on the CPU, in float64.

    `basis: channels` divides every channel's range over the views into equal steps.

    `basis: pca` quantises the principal components of G^1/2 x. In the metric G = W^T M W (M is block-diagonal,
    `_logit_metric`) the squared length of an error of x is the squared error of the logits that it causes. A token's
    bits x C bits go one by one to the component whose error falls most (greedy reverse water-filling). Each component
    has a uniform quantiser of least squared error (`_uniform_quantiser`).

    Args:
        config: basis and bits.
        x: input of the projection.
        qkv_weight, qkv_bias: the projection's weight and bias; rows q, k, v, each by head.
        heads: the teacher's number of heads.

    Returns:
        Arrays by name, float32 unless stated:

        - `bits`: uint8 [M], bits of each component.
        - `encode_weight` [M, C] (or [M], one for each channel) and `encode_bias` [M]: codes are
          round(encode_weight x + encode_bias), clamped to 0..2^bits - 1.
        - `qkv_weight` [W, M] and `qkv_bias` [W]: A and bias of the module's docstring.
        - `lost` [4, W/3]: per relation, in the order of `draws.RELATIONS`, and per channel, the mean over tokens of
          the product of both sides' errors. A token's product with itself comes back smaller by their sum.
        - `heads`: int64 [1].
    """
    width = x.shape[-1]
    flat = x.detach().cpu().reshape(-1, width)
    count = min(len(flat), _MOST_TOKENS)
    # Multiples of the golden ratio spread evenly, and fall into step with no number of tokens.
    spread = (torch.arange(count, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2) % 1.0 * len(flat)).long()
    tokens = flat[spread].double()
    weight = qkv_weight.detach().cpu().double()
    bias = torch.zeros(len(weight), dtype=torch.float64) if qkv_bias is None else qkv_bias.detach().cpu().double()
    if config.basis == "channels":
        bits = torch.full((width,), int(config.bits))
        low, high = flat.amin(0).double(), flat.amax(0).double()
        step = _positive((high - low) / (2 ** int(config.bits) - 1))
        encode, encode_bias = 1 / step, -low / step
        folded, folded_bias = weight * step, bias + weight @ low
    else:
        encode, decode, variance = _principal_components(tokens, weight, bias, heads)
        mean = tokens.mean(0)
        bits = allocate(variance, total_bits(config, width))
        kept = bits > 0
        bits, encode, decode = bits[kept], encode[kept], decode[:, kept]
        step, low = _uniform_quantiser((tokens - mean) @ encode.T, bits)
        encode, encode_bias = encode / step[:, None], -(encode @ mean + low) / step
        folded, folded_bias = weight @ decode * step, bias + weight @ (decode @ low + mean)
    constants = {
        "bits": bits.to(torch.uint8),
        "encode_weight": encode.float(),
        "encode_bias": encode_bias.float(),
        "qkv_weight": folded.float(),
        "qkv_bias": folded_bias.float(),
        "heads": torch.tensor([heads]),
    }
    error = linear(tokens, weight, bias) - linear(quantised(tokens, constants).double(), folded, folded_bias)
    sides = dict(zip("qkv", error.chunk(3, dim=-1), strict=True))
    constants["lost"] = torch.stack([(sides[a] * sides[b]).mean(0) for a, b in RELATIONS]).float()
    return constants


def check_projection(qkv: QKV, qkv_weight: Float[Tensor, "W C"], qkv_bias: Float[Tensor, " W"] | None) -> None:
    """Check that q, k and v are the linear layer's output for x.

    Raises:
        RecipeError: they differ by more than the rounding of their dtype, so they cannot be rebuilt from x.
    """
    assert qkv.x is not None
    bias = None if qkv_bias is None else qkv_bias.float()
    made = linear(qkv.x.float(), qkv_weight.float(), bias)
    tapped = torch.cat([side.transpose(1, 2).flatten(2) for side in (qkv.q, qkv.k, qkv.v)], dim=-1).float()
    tolerance = math.sqrt(torch.finfo(qkv.q.dtype).eps)
    if made.shape == tapped.shape:
        for name, ours, theirs in zip("qkv", made.chunk(3, -1), tapped.chunk(3, -1), strict=True):
            error, scale = float((ours - theirs).square().mean().sqrt()), float(theirs.square().mean().sqrt())
            if not error <= tolerance * scale:
                raise _not_linear(f"{name} differs by {error / scale:.2g} of its size", f"at most {tolerance:.2g}")
    else:
        raise _not_linear(f"{list(tapped.shape[1:])} numbers a view", str(list(made.shape[1:])))


def _not_linear(got: str, expected: str) -> RecipeError:
    return RecipeError(
        "this teacher's q, k and v are not a linear layer of the block's input (q_norm or rotary embeddings?)",
        got=got,
        expected=expected,
        hint="use codec.name: sketch, which stores relations as they are",
    )


# ---- codes


def quantised(x: Float[Tensor, "*tokens C"], constants: Mapping[str, Tensor]) -> UInt8[Tensor, "*tokens M"]:
    """The codes of tokens, computed in float64: a code does not depend on how a matrix product is cut into blocks."""
    weight, bias = constants["encode_weight"].double(), constants["encode_bias"].double()
    levels = x.double() * weight + bias if weight.ndim == 1 else linear(x.double(), weight, bias)
    most = 2.0 ** constants["bits"].double() - 1
    return torch.minimum(levels.round().clamp(min=0), most).to(torch.uint8)


# ---- calibration


def total_bits(config: HiddenCodec, width: int) -> int:
    """Bits of a token."""
    return max(1, round(config.bits * width))


def allocate(variance: Float64[Tensor, " M"], total: int) -> Int64[Tensor, " M"]:
    """Bits of every component, `total` together and at most 8 each, for the least squared error.

    The greedy choice is optimal, because the error falls by less with every further bit (Gersho and Gray, "Vector
    Quantization and Signal Compression", 1992, section 8.3).
    """
    error = variance * torch.tensor(_ERROR, dtype=torch.float64)[:, None]
    gain = (error[:-1] - error[1:]).flatten()
    chosen = gain.argsort(descending=True, stable=True)[:total]
    return torch.bincount(chosen % len(variance), minlength=len(variance))


def _principal_components(
    tokens: Float64[Tensor, "P C"], weight: Float64[Tensor, "W C"], bias: Float64[Tensor, " W"], heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices to components [C, C] and back [C, C], and the components' variances [C], descending."""
    metric = weight.T @ torch.block_diag(*_logit_metric(linear(tokens, weight, bias), heads)) @ weight
    size, axes = torch.linalg.eigh(metric)
    seen = size > size[-1] * 1e-12  # directions that no logit depends on stay out
    root = axes * torch.where(seen, size, 0).sqrt() @ axes.T
    inverse = axes * torch.where(seen, size, torch.inf).rsqrt() @ axes.T
    variance, axes = torch.linalg.eigh(root @ torch.cov(tokens.T) @ root)
    axes = axes.flip(1)
    return axes.T @ root, inverse @ axes, variance.flip(0).clamp(min=0)


def _logit_metric(qkv: Float64[Tensor, "P W"], heads: int) -> Float64[Tensor, "Z D D"]:
    """Per side and head (Z = 3H) the matrix M for which e^T M e is the mean squared logit error due to an error e.

    An error in a query moves a row's logits by e.k_j. The softmax removes what all logits of a row share, so M is the
    covariance of the keys. An error in a key moves one logit of every row by q_i.e, so M is the second moment of the
    queries. Values are both queries and keys, so M is the sum of both.
    """
    q, k, v = (side.unflatten(-1, (heads, -1)).transpose(0, 1) for side in qkv.chunk(3, dim=-1))
    spread = [torch.stack([torch.cov(head.T) for head in side]) for side in (k, v)]
    second = [side.transpose(1, 2) @ side / side.shape[1] for side in (q, v)]
    metrics = torch.cat([spread[0], second[0], _VALUE_WEIGHT * (spread[1] + second[1])])
    return metrics / int(q.shape[-1])


def _uniform_quantiser(scores: Float64[Tensor, "P M"], bits: Int64[Tensor, " M"]) -> tuple[Tensor, Tensor]:
    """Step and lowest level of every component, of least squared error among equally spaced levels.

    Lloyd's iteration ("Least squares quantization in PCM", 1982) with the levels kept on a line: assign the nearest
    level to every score, then fit the line through level numbers and scores by least squares. With one bit, the levels
    are the two conditional means.
    """
    most = 2.0**bits - 1
    mean = scores.mean(0)
    step = _positive(scores.std(0) * torch.tensor(_STEP, dtype=torch.float64)[bits])
    low = mean - step * most / 2
    for _ in range(_FIT_STEPS):
        level = torch.minimum(((scores - low) / step).round().clamp(min=0), most)
        centred = level - level.mean(0)
        slope = (centred * scores).mean(0) / _positive(centred.square().mean(0))
        step = torch.where(slope > 0, slope, step)
        low = mean - step * level.mean(0)
    return step, low


def _positive(x: Float64[Tensor, " M"]) -> Tensor:
    """Replace zeros, which belong to components that never change, by ones."""
    return torch.where(x > 0, x, torch.ones_like(x))
