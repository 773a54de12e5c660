"""Codecs of what holds between tokens: relations of q, k and v, `ff`, the Gram matrix, attention logits."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from tinymim.configs.sections import words
from tinymim.configs.sections.base import Section
from tinymim.configs.sections.values import Positive, Width

Draws = Annotated[int, Field(ge=0, le=65536)]  # of a row; no view has more tokens
Relation = Literal["qk", "vv", "qq", "kk"]


def _distinct(relations: tuple[Relation, ...]) -> tuple[Relation, ...]:
    if not relations or len(set(relations)) != len(relations):
        raise ValueError(f"relations must be a non-empty list without repeats, got {relations}")
    return relations


Relations = Annotated[tuple[Relation, ...], AfterValidator(_distinct)]
_NAME = "Name of the codec: `sketch`, `hidden` or `dense`."
_RELATIONS = "Relations to store."
_RELATION_HEADS = "Heads into which the teacher's channels are split for the relations. Default: the teacher's own."


class SketchCodec(Section):
    """Sampled rows of the relations, a few sampled tokens each. Unbiased with `tail: sampled`, the default (I4)."""

    name: Literal["sketch"] = Field(default="sketch", description=_NAME)
    relations: Relations = Field(default=("qk", "vv"), description=_RELATIONS)
    relation_heads: Width | None = Field(default=None, description=_RELATION_HEADS)
    rows: Width = Field(
        default=64, description="Query rows drawn per view, relation and head; at most the number of tokens."
    )
    head_k: Draws = Field(default=0, description="Largest entries of a row that are stored with their values.")
    tail_k: Draws = Field(default=8, description="Systematic draws from the rest of the row.")
    tail: Literal["sampled", "uniform", "ghost", "renormalise"] = Field(
        default="sampled",
        description="Stand-in for the other entries of a row. All but `sampled` are published top-k tails and biased.",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_draws_with_a_biased_tail(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("tail", "sampled") != "sampled":
            return {"tail_k": 0, **data}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> "SketchCodec":
        if self.tail == "sampled" and self.tail_k == 0:
            raise ValueError("tail: sampled needs tail_k >= 1 (without draws the sketch is biased)")
        if self.tail != "sampled" and self.tail_k:
            raise ValueError(f"tail: {self.tail} draws nothing, leave tail_k out; got tail_k={self.tail_k}")
        if self.tail != "sampled" and self.head_k == 0:
            raise ValueError(f"tail: {self.tail} needs head_k >= 1")
        return self


class HiddenCodec(Section):
    """The input of the block's qkv projection, quantised. A reader rebuilds any relation from it."""

    name: Literal["hidden"] = Field(description=_NAME)
    basis: Literal["channels", "pca"] = Field(
        default="channels",
        description="Quantise the channels, or the principal components of q, k, v with more bits for larger ones.",
    )
    bits: float = Field(default=8, gt=0, le=8, description="Mean bits per channel and token. `channels` takes 4 or 8.")
    calibration_views: Width = Field(default=256, description="Views that fix the scales, once per cache.")

    @model_validator(mode="after")
    def _whole_bits(self) -> "HiddenCodec":
        if self.basis == "channels" and self.bits not in (4, 8):
            raise ValueError(f"basis: channels takes bits 4 or 8, got {self.bits}")
        return self


class DenseCodec(Section):
    """Every row of the relations in fp16, for audits."""

    name: Literal["dense"] = Field(description=_NAME)
    relations: Relations = Field(default=("qk", "vv"), description=_RELATIONS)
    relation_heads: Width | None = Field(default=None, description=_RELATION_HEADS)


RelationCodec = SketchCodec | HiddenCodec | DenseCodec


class FFCodec(Section):
    """The relation `ff`: softmaxed cosines between the patch tokens of a block, one head."""

    kind: Literal["ff"] = Field(description=words.KIND)
    name: Literal["sketch", "topk", "dense"] = Field(
        default="sketch",
        description="`sketch`: sampled rows, unbiased; `topk`: their largest entries, biased; `dense`: all rows.",
    )
    at: Literal["final", "block", "normed"] = Field(default="final", description=words.AT)
    tau: float = Field(default=0.07, gt=0, description="Temperature: a row is softmax(cosines / tau).")
    rows: Positive = Field(default=64, description="Query patches drawn per view; at most their number.")
    head_k: int = Field(
        default=0,
        ge=0,
        description="Largest entries of a row that are stored with their values.",
        json_schema_extra={"default": "0; 8 of `topk`"},
    )
    tail_k: int = Field(
        default=8,
        ge=0,
        description="Systematic draws from the rest of the row, for `sketch`.",
        json_schema_extra={"default": "8; 0 of `topk`"},
    )
    tail: Literal["uniform", "ghost", "renormalise"] = Field(
        default="uniform", description="Stand-in of `topk` for the other entries of a row."
    )

    @model_validator(mode="before")
    @classmethod
    def _no_draws_but_by_sketch(cls, data: Any) -> Any:
        own = {"topk": {"head_k": 8, "tail_k": 0}, "dense": {"tail_k": 0}}
        return own.get(data.get("name", "sketch"), {}) | data if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _consistent(self) -> "FFCodec":
        if (self.name == "sketch") != (self.tail_k > 0):
            raise ValueError(f"tail_k: sketch needs at least 1, others 0; got {self.tail_k} with name: {self.name}")
        if self.name == "topk" and not self.head_k:
            raise ValueError("head_k: topk needs at least 1")
        return self


class GramCodec(Section):
    """The Gram matrix: cosines between the patch tokens of a block, without a softmax."""

    kind: Literal["gram"] = Field(description=words.KIND)
    name: Literal["entries", "dense"] = Field(
        default="entries",
        description="`entries`: sampled rows times sampled columns in 8 bits, rounded at random; `dense`: all.",
    )
    at: Literal["final", "block", "normed"] = Field(default="final", description=words.AT)
    rows: Positive = Field(default=32, description="Query patches drawn per view; at most their number.")
    columns: Positive = Field(default=32, description="Patches drawn per view that all rows are compared with.")


class AttentionCodec(Section):
    """Attention logits of the tapped block before the softmax."""

    kind: Literal["attention"] = Field(description=words.KIND)
    name: Literal["rows", "dense"] = Field(
        default="rows", description="`rows`: sampled query rows in 8 bits, rounded at random; `dense`: all, for audits."
    )
    rows: Positive = Field(default=16, description="Query rows drawn per view, the same in all heads.")
    prefix: bool = Field(default=True, description="Whether class token and registers take part, as rows and columns.")
