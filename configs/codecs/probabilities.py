"""Codecs of probabilities: over a bank of anchors, over the classes of a classifier."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tinymim.configs.sections import words
from tinymim.configs.sections.base import Section
from tinymim.configs.sections.values import Folder

_VALUES = "Stored probabilities: on a grid of 4.5 % steps, rounded at random, or fp16."


class BankCodec(Section):
    """The class embedding's softmax over a bank of anchors, which are the embeddings of calibration views."""

    kind: Literal["bank"] = Field(description=words.KIND)
    name: Literal["draws", "dense"] = Field(
        default="draws",
        description="`draws`: the largest probabilities and a sample of the rest, unbiased; `dense`: all, for audits.",
    )
    at: Literal["final", "block", "pooled"] = Field(default="final", description=words.AT_EMBEDDING)
    anchors: int = Field(default=1024, ge=2, le=65536, description="Anchors, and views that give them, once per cache.")
    tau: float = Field(default=0.07, gt=0, description="Temperature: softmax(cosines / tau).")
    head_k: int = Field(
        default=0, ge=0, description="Largest probabilities that are stored with their values, for `draws`."
    )
    tail_k: int = Field(
        default=17,
        ge=0,
        description="Systematic draws from the rest, for `draws`.",
        json_schema_extra={"default": "17; 0 of `dense`"},
    )
    values: Literal["uint8", "float16"] = Field(default="uint8", description=_VALUES)

    @model_validator(mode="before")
    @classmethod
    def _no_draws_of_all(cls, data: Any) -> Any:
        dense = isinstance(data, dict) and data.get("name") == "dense"
        return {"tail_k": 0} | data if dense else data

    @model_validator(mode="after")
    def _consistent(self) -> "BankCodec":
        if (self.name == "draws") != (self.tail_k > 0):
            raise ValueError(f"tail_k: draws needs at least 1, dense 0; got {self.tail_k} with name: {self.name}")
        if self.head_k >= self.anchors:
            raise ValueError(f"head_k must leave an anchor to the rest: below {self.anchors}, got {self.head_k}")
        return self


class ClassMapConfig(Section):
    """The teacher's class of each stored class, as TinyViT maps 22k classes to 1k (docs/targets.md)."""

    file: Folder | None = Field(
        default=None, description="Text file, one number a line: the teacher's class of that class; -1: it has none."
    )
    absent: Literal["zero", "mean"] = Field(
        default="zero", description="Logit of a class that the teacher lacks: 0, or the mean of the other classes."
    )
    sha256: Annotated[str | None, Field(pattern=r"^[0-9a-f]{64}$")] = Field(
        default=None, description="Digest of the numbers, which a cache states instead of `file`. Default: the file's."
    )

    @model_validator(mode="after")
    def _some_map(self) -> "ClassMapConfig":
        if self.file is None and self.sha256 is None:
            raise ValueError("file: a class map needs its file")
        return self


class LogitsCodec(Section):
    """Class probabilities of a teacher with a classifier: a softmax over all its classes, or over those of a map."""

    kind: Literal["logits"] = Field(description=words.KIND)
    name: Literal["draws", "topk", "dense"] = Field(
        default="draws",
        description="`draws`: the largest and a sample of the rest, unbiased; `topk`: the largest, and the rest spread "
        "evenly, biased; `dense`: all, for audits.",
    )
    classes: int = Field(
        ge=2, le=65536, description="Classes of the teacher's classifier; with `class_map`, lines of the map."
    )
    class_map: ClassMapConfig | None = Field(
        default=None, description="Store other classes than the teacher's. Default: its own."
    )
    temperature: float = Field(default=1.0, gt=0, description="Divides the logits of teacher and student.")
    head_k: int = Field(
        default=4,
        ge=0,
        description="Largest probabilities that are stored with their values.",
        json_schema_extra={"default": "4; 10 of `topk`"},
    )
    tail_k: int = Field(
        default=6,
        ge=0,
        description="Systematic draws from the rest, for `draws`.",
        json_schema_extra={"default": "6; 0 of `topk`"},
    )
    values: Literal["uint8", "float16"] = Field(default="uint8", description=_VALUES)

    @model_validator(mode="before")
    @classmethod
    def _no_draws_but_by_draws(cls, data: Any) -> Any:
        own = {"topk": {"head_k": 10, "tail_k": 0}, "dense": {"head_k": 0, "tail_k": 0}}
        return own.get(data.get("name", "draws"), {}) | data if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _consistent(self) -> "LogitsCodec":
        if (self.name == "draws") != (self.tail_k > 0):
            raise ValueError(f"tail_k: draws needs at least 1, the others 0; got {self.tail_k} with name: {self.name}")
        if self.name == "topk" and not self.head_k:
            raise ValueError("head_k: topk needs at least 1")
        if self.head_k >= self.classes:
            raise ValueError(f"head_k must leave a class to the rest: below {self.classes}, got {self.head_k}")
        return self
