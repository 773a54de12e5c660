"""Versioned codecs by name: how the teacher's relations become named arrays of a record, and come back as a target.

`sketch` is unbiased and the default; with a published tail it is `topk`, biased, for comparison; `hidden` holds the
block's input, from which any relation is rebuilt; `dense` is for audits. A codec's arrays, their meaning and the
randomness behind them are fixed by (name, version).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tinymim.configs.codecs import CodecConfig, DenseCodec, HiddenCodec, SketchCodec, TargetsConfig, codec_config
from tinymim.configs.errors import CacheMismatch, RecipeError
from tinymim.targets.record import Codec
from tinymim.targets.relations.dense import Dense
from tinymim.targets.relations.hidden import Hidden
from tinymim.targets.relations.sketch import Sketch, TopK

_ALL = TargetsConfig()


def make_codec(
    config: CodecConfig, targets: TargetsConfig = _ALL, constants: Mapping[str, Tensor] | None = None
) -> Codec:
    """The codec that a recipe names.

    Args:
        config: how records are stored.
        targets: what of them a student is compared on.
        constants: what the cache holds beside its records, on the device of the records; `hidden` needs them
            (`hidden.calibrate`) to encode and decode.

    Raises:
        RecipeError: the stored records do not hold what `targets` asks for.
    """
    match config:
        case SketchCodec():
            _refuse_others(targets, rows=config.rows, relation_heads=config.relation_heads)
            chosen = config.model_copy(update={"relations": _subset(targets, config)})
            return Sketch(chosen) if config.tail == "sampled" else TopK(chosen)
        case DenseCodec():
            _refuse_others(targets, relation_heads=config.relation_heads)
            return Dense(config.model_copy(update={"relations": _subset(targets, config)}), targets.rows)
        case HiddenCodec():
            return Hidden(config, targets, constants or {})


def stored_codec(
    section: Mapping[str, Any], targets: TargetsConfig = _ALL, constants: Mapping[str, Tensor] | None = None
) -> Codec:
    """The codec that reads a cache, from the codec section of its manifest and its constants.

    Raises:
        CacheMismatch: another version of the codec wrote the cache.
        RecipeError: as `make_codec`.
    """
    codec = make_codec(codec_config(**section["parameters"]), targets, constants)
    if (codec.name, codec.version) != (section["name"], section["version"]):
        raise CacheMismatch(
            "the cache was written by another codec",
            got=f"{section['name']} version {section['version']}",
            expected=f"{codec.name} version {codec.version}",
            hint="read it with the tinymim that wrote it, or write it anew",
        )
    return codec


def _subset(targets: TargetsConfig, config: SketchCodec | DenseCodec) -> tuple[Any, ...]:
    wanted = targets.relations or config.relations
    if missing := [relation for relation in wanted if relation not in config.relations]:
        raise RecipeError(
            f"the cache does not hold the relation {missing[0]}",
            got=f"targets.relations [{', '.join(wanted)}]",
            expected=f"some of {', '.join(config.relations)}",
            hint="a cache made with codec.name: hidden gives any relation",
        )
    return wanted


def _refuse_others(targets: TargetsConfig, **held: int | None) -> None:
    for name, value in held.items():
        wanted = getattr(targets, name)
        if wanted is not None and wanted != value:
            raise RecipeError(
                f"targets.{name} is not what the cache holds",
                got=wanted,
                expected=f"{value or 'the teacher'}, or no targets.{name}",
                hint="a cache made with codec.name: hidden gives any rows and heads",
            )


def describe_codec(config: CodecConfig) -> str:
    """What a codec section asks for, in a few words; its relations only where they are not qk and vv."""
    match config:
        case SketchCodec():
            parts = [f"{config.head_k} exact"] if config.head_k else []
            parts += [f"{config.tail_k} draws"] if config.tail == "sampled" else [f"{config.tail} tail"]
            words = f"sketch, {config.rows} rows x {' + '.join(parts)}"
        case HiddenCodec():
            words = f"hidden, {config.basis}, {config.bits:g} bits"
        case DenseCodec():
            words = "dense, fp16"
    relations = () if isinstance(config, HiddenCodec) else config.relations
    return words if relations in ((), ("qk", "vv")) else f"{words} of {', '.join(relations)}"
