"""Recipe sections of the target codecs."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, TypeAdapter, model_validator

from tinymim.configs.class_map import class_map_sha256, read_class_map
from tinymim.configs.sections import Folder, Positive, Section, Weight, Width

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
_KIND = "Kind of target. Default: relations."
_AT = "Tokens after the tapped block, those that its attention reads (after its first norm), or after the final norm."
_AT_EMBEDDING = "The class token after the final norm or the tapped block, or the embedding that the classifier reads."
_VALUES = "Stored probabilities: on a grid of 4.5 % steps, rounded at random, or fp16."
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

    kind: Literal["features"] = Field(description=_KIND)
    at: Literal["block", "normed", "final"] = Field(default="block", description=_AT)
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

    kind: Literal["features"] = Field(description=_KIND)
    name: Literal["pq"] = Field(description="`pq`: residual vector quantisation, one byte for each codebook. Biased.")
    at: Literal["block", "normed", "final"] = Field(default="block", description=_AT)
    target: Literal["raw", "layernorm", "whiten"] = Field(default="layernorm", description=_TARGET)
    tokens: Positive | None = Field(default=None, description="Patch tokens drawn per view; null: all.")
    stages: int = Field(default=8, ge=1, le=64, description="Codebooks of 256 entries, one after the other.")
    calibration_views: Positive = Field(
        default=256, description="Views that fix the codebooks and the whitening, once per cache."
    )


class ClsCodec(_VectorCodec):
    """The class embedding of a view."""

    kind: Literal["cls"] = Field(description=_KIND)
    at: Literal["final", "block", "pooled"] = Field(default="final", description=_AT_EMBEDDING)


class BankCodec(Section):
    """The class embedding's softmax over a bank of anchors, which are the embeddings of calibration views."""

    kind: Literal["bank"] = Field(description=_KIND)
    name: Literal["draws", "dense"] = Field(
        default="draws",
        description="`draws`: the largest probabilities and a sample of the rest, unbiased; `dense`: all, for audits.",
    )
    at: Literal["final", "block", "pooled"] = Field(default="final", description=_AT_EMBEDDING)
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

    kind: Literal["logits"] = Field(description=_KIND)
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


class FFCodec(Section):
    """The relation `ff`: softmaxed cosines between the patch tokens of a block, one head."""

    kind: Literal["ff"] = Field(description=_KIND)
    name: Literal["sketch", "topk", "dense"] = Field(
        default="sketch",
        description="`sketch`: sampled rows, unbiased; `topk`: their largest entries, biased; `dense`: all rows.",
    )
    at: Literal["final", "block", "normed"] = Field(default="final", description=_AT)
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

    kind: Literal["gram"] = Field(description=_KIND)
    name: Literal["entries", "dense"] = Field(
        default="entries",
        description="`entries`: sampled rows times sampled columns in 8 bits, rounded at random; `dense`: all.",
    )
    at: Literal["final", "block", "normed"] = Field(default="final", description=_AT)
    rows: Positive = Field(default=32, description="Query patches drawn per view; at most their number.")
    columns: Positive = Field(default=32, description="Patches drawn per view that all rows are compared with.")


class AttentionCodec(Section):
    """Attention logits of the tapped block before the softmax."""

    kind: Literal["attention"] = Field(description=_KIND)
    name: Literal["rows", "dense"] = Field(
        default="rows", description="`rows`: sampled query rows in 8 bits, rounded at random; `dense`: all, for audits."
    )
    rows: Positive = Field(default=16, description="Query rows drawn per view, the same in all heads.")
    prefix: bool = Field(default=True, description="Whether class token and registers take part, as rows and columns.")


def _codec_tag(value: Any) -> str:
    """The tag of a codec section: its kind; for relations its name, and a section without a name is a sketch."""
    held = value if isinstance(value, dict) else {name: getattr(value, name, None) for name in ("kind", "name")}
    if (held.get("kind"), held.get("name")) == ("features", "pq"):
        return "features pq"
    return str(held.get("kind") or held.get("name") or "sketch")


# How a target becomes bytes; `kind` and `name` say which.
CodecConfig = Annotated[
    Annotated[SketchCodec, Tag("sketch")]
    | Annotated[HiddenCodec, Tag("hidden")]
    | Annotated[DenseCodec, Tag("dense")]
    | Annotated[FeaturesCodec, Tag("features")]
    | Annotated[FeaturesPqCodec, Tag("features pq")]
    | Annotated[ClsCodec, Tag("cls")]
    | Annotated[BankCodec, Tag("bank")]
    | Annotated[LogitsCodec, Tag("logits")]
    | Annotated[FFCodec, Tag("ff")]
    | Annotated[GramCodec, Tag("gram")]
    | Annotated[AttentionCodec, Tag("attention")],
    Discriminator(_codec_tag),
]


def codec_label(config: CodecConfig, block: int) -> str:
    """Place, kind and name of a target in a layer's name: "b18-sketch", "b18-features-dither", "pooled-cls-int8"."""
    kind = getattr(config, "kind", None)
    place = getattr(config, "at", "final" if kind == "logits" else "block")
    return "-".join([f"b{block}" if place == "block" else place, *([kind] if kind else []), config.name])


def codec_parameters(config: CodecConfig) -> dict[str, Any]:
    """The section as a layer holds it: a class map by its digest; no field newer than format 2 where it is off.

    Raises:
        RecipeError: the file of a class map is none.
    """
    held = config.model_dump(mode="json")
    if not isinstance(config, LogitsCodec):
        return held
    own = held.pop("class_map")
    if config.class_map is not None:
        file, sha256 = config.class_map.file, config.class_map.sha256
        own |= {"file": None, "sha256": class_map_sha256(read_class_map(file)) if file else sha256}
        held["class_map"] = own
    return held


def codec_config(**fields: Any) -> CodecConfig:
    """The codec section with these fields. Raises pydantic's ValidationError."""
    return TypeAdapter(CodecConfig).validate_python(fields)


VectorLoss = Literal["mse", "cosine", "smooth_l1", "l1"]
RelationLoss = Literal["kl", "mse", "cosine", "l1"]


FIRST_TARGETS = ("relations", "relation_heads", "rows")  # others are no part of a state's identity where they are off


class TargetsConfig(Section):
    """A choice among the targets that the cache holds, and what a student is compared by.

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
    loss: Literal[VectorLoss, RelationLoss] | None = Field(
        default=None,
        description="Loss of features, class embeddings and relations. Default: `mse`, `cosine` of class embeddings, "
        "`kl` of relations. `smooth_l1` and `l1` are biased with `dither`.",
    )
    before_softmax: bool = Field(
        default=False, description="Compare the logits of relations, by `mse` as default. Needs a `hidden` cache."
    )
    projector: Literal["linear", "mlp"] | None = Field(
        default=None, description="From the student's width to the teacher's, for features. Default: `linear`."
    )
    keep_projector: bool = Field(
        default=False, description="Write the trained projector beside the student's weights (docs/targets.md)."
    )
    temperature: float | None = Field(
        default=None,
        gt=0,
        description="Temperature of class logits in the loss, of teacher and student. Default: the codec's; `draws` "
        "takes no other.",
    )
    label_weight: Weight = Field(
        default=0.0, description="Weight of a cross entropy with the images' labels, beside class logits. 0: none."
    )
