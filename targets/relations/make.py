"""Relation kinds from their config sections, and the checks that a cache holds the relations of a student."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast, get_args

from torch import Tensor

from tinymim.configs.codecs.relations import DenseCodec, HiddenCodec, Relation, RelationCodec, SketchCodec
from tinymim.configs.codecs.targets import RelationLoss, TargetsConfig
from tinymim.configs.errors import CacheMismatch, RecipeError
from tinymim.configs.taps import Shapes
from tinymim.targets.contract import TargetKind
from tinymim.targets.record import refuse_loss
from tinymim.targets.relations.dense import Dense
from tinymim.targets.relations.distances import RelationDistance
from tinymim.targets.relations.hidden import Hidden
from tinymim.targets.relations.kind import RelationKind
from tinymim.targets.relations.sketch import Sketch, TopK

TAKES = ("relations", "relation_heads", "rows", "loss", "before_softmax")  # fields of `targets`
# Codec settings whose sizes `tinymim plan` compares: the default, 300 views of ImageNet in 2 TB, less, all, and dense.
ALTERNATIVES: tuple[RelationCodec, ...] = (
    SketchCodec(),
    SketchCodec(rows=26),
    SketchCodec(rows=16, tail_k=4),
    HiddenCodec(name="hidden"),
    DenseCodec(name="dense"),
)


def make_relations(
    config: RelationCodec, targets: TargetsConfig, block: int, constants: Mapping[str, Tensor]
) -> RelationKind:
    """The relations of a block under one codec; arguments and errors as `targets.kinds.make_kind`."""
    codec = _make_codec(config, targets, block, constants)
    if targets.loss in (None, "kl") and not targets.before_softmax:
        return codec
    assert isinstance(codec, Dense | Hidden)  # by `_refuse_distances`
    loss = cast(RelationLoss, targets.loss or "mse")  # by `refuse_loss`
    return RelationDistance(codec, loss, targets.before_softmax, block)


def _make_codec(
    config: RelationCodec, targets: TargetsConfig, block: int, constants: Mapping[str, Tensor]
) -> RelationKind:
    refuse_loss(targets, get_args(RelationLoss), "relations")
    _refuse_distances(config, targets)
    match config:
        case SketchCodec():
            _refuse_others(targets, rows=config.rows, relation_heads=config.relation_heads)
            chosen = config.model_copy(update={"relations": _subset(targets, config)})
            return Sketch(chosen, block) if config.tail == "sampled" else TopK(chosen, block)
        case DenseCodec():
            _refuse_others(targets, relation_heads=config.relation_heads)
            return Dense(config.model_copy(update={"relations": _subset(targets, config)}), block, targets.rows)
        case HiddenCodec():
            return Hidden(config, targets, block, constants)


def whole_targets(codec: str, training: RelationKind, shapes: Shapes) -> TargetsConfig:
    """The `targets` with which an audit's cache gives whole maps of the relations and heads of `training`.

    Args:
        codec: name of the audit cache's codec.
        training: the kind that students are trained on.
        shapes: the teacher's shapes.
    """
    # A dense cache has its heads already; `for_audit` compares them.
    heads = training.relation_heads(shapes.heads) if codec == Hidden.name else None
    same: dict[str, Any] = {}
    if isinstance(training, RelationDistance):
        same = {"loss": training.loss, "before_softmax": training.before_softmax}
    return TargetsConfig(relations=training.relations, relation_heads=heads, **same)


def for_audit(kind: TargetKind, training: RelationKind, shapes: Shapes) -> TargetKind:
    """The kind of an audit's cache, with entropies by head.

    Raises:
        CacheMismatch: the cache's relation heads differ from those of `training`.
    """
    assert isinstance(kind, Dense | Hidden | RelationDistance)  # the codecs of whole targets
    held, wanted = kind.relation_heads(shapes.heads), training.relation_heads(shapes.heads)
    if held != wanted:
        raise CacheMismatch(
            "the audit's cache splits its relations into other heads than the training run",
            got=held,
            expected=wanted,
            hint="make audit.cache with the relation_heads of the training run's codec",
        )
    return kind if isinstance(kind, RelationDistance) else replace(kind, entropy_by_head=True)


def describe_codec(config: RelationCodec) -> str:
    """A codec section in a few words; relations are named only where they are not qk and vv."""
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


def _subset(targets: TargetsConfig, config: SketchCodec | DenseCodec) -> tuple[Relation, ...]:
    wanted = targets.relations or config.relations
    if missing := [relation for relation in wanted if relation not in config.relations]:
        raise RecipeError(
            f"the cache does not hold the relation {missing[0]}",
            got=f"targets.relations [{', '.join(wanted)}]",
            expected=f"some of {', '.join(config.relations)}",
            hint="a cache made with codec.name: hidden gives any relation",
        )
    return wanted


def _refuse_distances(config: RelationCodec, targets: TargetsConfig) -> None:
    """Raises RecipeError where a codec does not hold what a distance compares."""
    if targets.before_softmax and targets.loss == "kl":
        raise RecipeError(
            "the KL compares relations after their softmax",
            got="targets.loss kl, targets.before_softmax true",
            expected="mse, l1 or cosine",
        )
    if targets.before_softmax and not isinstance(config, HiddenCodec):
        raise RecipeError(
            "the cache does not hold relations before their softmax",
            got=f"targets.before_softmax true, codec {config.name}",
            expected="codec hidden",
            hint="make a cache with codec.name: hidden",
        )
    if isinstance(config, SketchCodec):
        refuse_loss(targets, ["kl"], "sampled relations", "make a cache with codec.name: hidden or dense")


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
