"""Recipe sections of the target codecs."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, TypeAdapter, model_validator

from tinymim.configs.sections import Positive, Section

Relation = Literal["qk", "vv", "qq", "kk"]


def _distinct(relations: tuple[Relation, ...]) -> tuple[Relation, ...]:
    if not relations or len(set(relations)) != len(relations):
        raise ValueError(f"relations must be a non-empty list without repeats, got {relations}")
    return relations


Relations = Annotated[tuple[Relation, ...], AfterValidator(_distinct)]


class SketchCodec(Section):
    """Sampled rows of the relation maps, a few tokens each (I4): unbiased with `tail: sampled`, the default."""

    name: Literal["sketch"] = "sketch"
    relations: Relations = ("qk", "vv")
    # Into how many heads the teacher's channels are split for the relations; None: the teacher's own.
    relation_heads: Positive | None = None
    rows: Positive = 64  # query rows drawn per view, relation and head (capped at the token count)
    head_k: Annotated[int, Field(ge=0)] = 0  # largest entries of a row kept with their value
    tail_k: Annotated[int, Field(ge=0)] = 8  # systematic draws from the rest of the row; 0 unless tail: sampled
    # What stands for the entries outside the head. The published top-k tails are biased: for comparison.
    tail: Literal["sampled", "uniform", "ghost", "renormalise"] = "sampled"

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
    """The input of the block's qkv projection, quantised; any relation is rebuilt from it at read."""

    name: Literal["hidden"]
    basis: Literal["channels", "pca"] = "channels"  # what is quantised: the channels, or principal components of qkv
    bits: Annotated[float, Field(gt=0, le=8)] = 8  # mean bits per channel and token; `channels` takes 4 or 8
    calibration_views: Positive = 256  # views that fix the scales, once per cache

    @model_validator(mode="after")
    def _whole_bits(self) -> "HiddenCodec":
        if self.basis == "channels" and self.bits not in (4, 8):
            raise ValueError(f"basis: channels takes bits 4 or 8, got {self.bits}")
        return self


class DenseCodec(Section):
    """Every row in fp16, for audits."""

    name: Literal["dense"]
    relations: Relations = ("qk", "vv")
    relation_heads: Positive | None = None


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
    """What a student is compared on, where that is not all that the cache holds.

    A `hidden` cache rebuilds any relation with any number of heads and rows; from a `dense` or `sketch` cache
    relations can be left out, and from a `dense` one rows.
    """

    relations: Relations | None = None  # None: the cache's; of a hidden cache qk and vv
    relation_heads: Positive | None = None  # None: the cache's; of a hidden cache the teacher's
    rows: Positive | None = None  # query rows per view, relation and head; None: all that the cache holds
