"""The codec of any kind: which section `kind` and `name` choose, its label, its form in a cache."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag, TypeAdapter

from tinymim.configs.class_map import class_map_sha256, read_class_map
from tinymim.configs.codecs.probabilities import BankCodec, LogitsCodec
from tinymim.configs.codecs.relations import AttentionCodec, DenseCodec, FFCodec, GramCodec, HiddenCodec, SketchCodec
from tinymim.configs.codecs.vectors import ClsCodec, FeaturesCodec, FeaturesPqCodec


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
