"""Recipe sections of the target codecs."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, TypeAdapter, model_validator

from tinymim.configs.sections import Section, Width

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


def _codec_name(value: Any) -> str:
    """The tag of a codec section; a section without a name is a sketch."""
    return str(value.get("name", "sketch") if isinstance(value, dict) else getattr(value, "name", "sketch"))


# How a target becomes bytes; `name` says which.
CodecConfig = Annotated[
    Annotated[SketchCodec, Tag("sketch")] | Annotated[HiddenCodec, Tag("hidden")] | Annotated[DenseCodec, Tag("dense")],
    Discriminator(_codec_name),
]


def codec_config(**fields: Any) -> CodecConfig:
    """The codec section with these fields. Raises pydantic's ValidationError."""
    return TypeAdapter(CodecConfig).validate_python(fields)


class TargetsConfig(Section):
    """A choice among the targets that the cache holds.

    A `hidden` cache rebuilds any relation with any number of heads and rows. A `dense` or `sketch` cache can leave
    relations out, and a `dense` one rows.
    """

    relations: Relations | None = Field(
        default=None, description="Relations to learn from. Default: the cache's; `qk` and `vv` of a `hidden` cache."
    )
    relation_heads: Width | None = Field(
        default=None, description="Heads of the relations. Default: the cache's; the teacher's of a `hidden` cache."
    )
    rows: Width | None = Field(
        default=None, description="Query rows per view, relation and head. Default: all that the cache holds."
    )
