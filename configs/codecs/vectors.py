"""Codecs of vectors: patch tokens and class embeddings."""

from typing import Any, Literal

from pydantic import Field, model_validator

from tinymim.configs.sections import words
from tinymim.configs.sections.base import Section
from tinymim.configs.sections.values import Positive

_TARGET = "Targets as they are, after LayerNorm without weights, or whitened by the calibration views."
_CALIBRATION = "Views that fix the whitening, once per cache."


class _VectorCodec(Section):
    """Fields that the kinds of vectors share."""

    name: Literal["dither", "int8"] = Field(
        default="dither",
        description="`dither`: rotate, then 1 or 2 bits a number; `int8`: 8 bits. Both round randomly.",
    )
    bits: Literal[1, 2, 8] = Field(
        default=2, description="Bits a number of `dither`, 1 or 2.", json_schema_extra={"default": "2; 8 of `int8`"}
    )
    target: Literal["raw", "layernorm", "whiten"] = Field(default="raw", description=_TARGET)
    calibration_views: Positive = Field(default=256, description=_CALIBRATION)

    @model_validator(mode="before")
    @classmethod
    def _eight_bits(cls, data: Any) -> Any:
        return {"bits": 8, **data} if isinstance(data, dict) and data.get("name") == "int8" else data

    @model_validator(mode="after")
    def _fitting_bits(self) -> "_VectorCodec":
        if (self.name == "int8") != (self.bits == 8):
            raise ValueError(f"bits: dither takes 1 or 2, and int8 8; got {self.bits} with name: {self.name}")
        return self


class FeaturesCodec(_VectorCodec):
    """Patch tokens of a block, without class token and registers."""

    kind: Literal["features"] = Field(description=words.KIND)
    at: Literal["block", "normed", "final"] = Field(default="block", description=words.AT)
    target: Literal["raw", "layernorm", "whiten"] = Field(default="layernorm", description=_TARGET)
    tokens: Positive | None = Field(
        default=16,
        description="Patch tokens drawn per view; null: all.",
        json_schema_extra={"default": "16; all of `int8`"},
    )

    @model_validator(mode="before")
    @classmethod
    def _all_tokens(cls, data: Any) -> Any:
        return {"tokens": None, **data} if isinstance(data, dict) and data.get("name") == "int8" else data


class FeaturesPqCodec(Section):
    """Patch tokens of a block as sums of entries of codebooks. Biased."""

    kind: Literal["features"] = Field(description=words.KIND)
    name: Literal["pq"] = Field(description="`pq`: residual vector quantisation, one byte for each codebook. Biased.")
    at: Literal["block", "normed", "final"] = Field(default="block", description=words.AT)
    target: Literal["raw", "layernorm", "whiten"] = Field(default="layernorm", description=_TARGET)
    tokens: Positive | None = Field(default=None, description="Patch tokens drawn per view; null: all.")
    stages: int = Field(default=8, ge=1, le=64, description="Codebooks of 256 entries, one after the other.")
    calibration_views: Positive = Field(
        default=256, description="Views that fix the codebooks and the whitening, once per cache."
    )


class ClsCodec(_VectorCodec):
    """The class embedding of a view."""

    kind: Literal["cls"] = Field(description=words.KIND)
    at: Literal["final", "block", "pooled"] = Field(default="final", description=words.AT_EMBEDDING)
