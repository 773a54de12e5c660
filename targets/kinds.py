"""The table of target kinds: from the codec section of a recipe, or the target section of a layer, to its kind."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from torch import Tensor

from tinymim.configs.codecs.kinds import CodecConfig, codec_config
from tinymim.configs.codecs.probabilities import BankCodec, LogitsCodec
from tinymim.configs.codecs.relations import (
    AttentionCodec,
    DenseCodec,
    FFCodec,
    GramCodec,
    HiddenCodec,
    RelationCodec,
    SketchCodec,
)
from tinymim.configs.codecs.targets import RelationLoss, TargetsConfig, VectorLoss
from tinymim.configs.codecs.vectors import ClsCodec, FeaturesCodec, FeaturesPqCodec
from tinymim.configs.errors import CacheMismatch
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets.attention.kind import Attention
from tinymim.targets.bank.kind import Bank
from tinymim.targets.cls.kind import Cls
from tinymim.targets.contract import ChosenKind, TargetKind
from tinymim.targets.features.kind import Features
from tinymim.targets.features.pq import FeaturesPq
from tinymim.targets.gram.kind import Gram
from tinymim.targets.logits.kind import make_logits
from tinymim.targets.record import refuse_targets
from tinymim.targets.relations import make as relations
from tinymim.targets.relations.ff import FF
from tinymim.targets.relations.kind import RelationKind

_ALL = TargetsConfig()

# A kind from its codec section, the targets section, the tapped block and the cache's constants.
Make = Callable[[Any, TargetsConfig, int, Mapping[str, Tensor]], TargetKind]

_PROJECTOR = ("projector", "keep_projector")
# One line per codec section, with the fields of `targets` that its kind takes.
_KINDS: dict[type, tuple[Make, tuple[str, ...]]] = {
    SketchCodec: (relations.make_relations, relations.TAKES),
    DenseCodec: (relations.make_relations, relations.TAKES),
    HiddenCodec: (relations.make_relations, relations.TAKES),
    FeaturesCodec: (Features, ("loss", *_PROJECTOR)),
    FeaturesPqCodec: (FeaturesPq, ("loss", *_PROJECTOR)),
    ClsCodec: (Cls, ("loss", *_PROJECTOR)),
    BankCodec: (Bank, _PROJECTOR),
    LogitsCodec: (make_logits, ("temperature", "label_weight")),
    FFCodec: (FF, _PROJECTOR),
    GramCodec: (Gram, _PROJECTOR),
    AttentionCodec: (Attention, ()),
}
# The values of `targets.loss` by codec section, where it is one of the fields.
_LOSSES: dict[type, tuple[str, ...]] = {
    SketchCodec: ("kl",),
    **dict.fromkeys((DenseCodec, HiddenCodec), get_args(RelationLoss)),
    **dict.fromkeys((FeaturesCodec, FeaturesPqCodec, ClsCodec), get_args(VectorLoss)),
}
# Codec settings whose sizes `tinymim plan` compares: those of relations, and the default of each other kind. Logits are
# not among them, because their number of classes is the teacher's.
ALTERNATIVES: tuple[CodecConfig, ...] = (
    *relations.ALTERNATIVES,
    FFCodec(kind="ff"),
    GramCodec(kind="gram"),
    FeaturesCodec(kind="features"),
    FeaturesPqCodec(kind="features", name="pq"),
    ClsCodec(kind="cls"),
    BankCodec(kind="bank"),
    AttentionCodec(kind="attention"),
)


def describe_codec(config: CodecConfig) -> str:
    """A codec section in a few words."""
    if isinstance(config, RelationCodec):
        return relations.describe_codec(config)
    given = config.model_dump(exclude={"kind", "name"}, exclude_defaults=True)
    return ", ".join([f"{config.kind} {config.name}", *(f"{name} {value}" for name, value in given.items())])


def make_kind(
    config: CodecConfig, block: int, targets: TargetsConfig = _ALL, constants: Mapping[str, Tensor] | None = None
) -> TargetKind:
    """The target kind of a recipe.

    Args:
        config: the codec section.
        block: the tapped block of the teacher, counted from 1.
        targets: the part of the records that a student is compared on.
        constants: the cache's constants, on the device of the records; a codec with `calibration_views` needs them to
            encode and decode.

    Raises:
        RecipeError: the records do not hold what `targets` names.
    """
    make, takes = _KINDS[type(config)]
    refuse_targets(targets, getattr(config, "kind", "relations"), takes)
    return make(config, targets, block, constants or {})


def divided_targets(configs: Sequence[CodecConfig], targets: TargetsConfig) -> list[TargetsConfig]:
    """The part of one `targets` section for each of several codecs.

    Each gets the fields that its kind takes, and those that no kind takes, which `make_kind` refuses.
    """
    takes = [
        {name for name in _KINDS[type(each)][1] if name != "loss" or targets.loss in _LOSSES[type(each)]}
        for each in configs
    ]
    known = {name for names in takes for name in names}
    return [
        TargetsConfig(**{name: value for name, value in targets if name in names or name not in known})
        for names in takes
    ]


def stored_kind(
    section: Mapping[str, Any],
    targets: TargetsConfig = _ALL,
    constants: Mapping[str, Tensor] | None = None,
) -> TargetKind:
    """The target kind that reads a layer.

    Args:
        section: the target section of the layer.
        targets, constants: as `make_kind`.

    Raises:
        CacheMismatch: another codec, or another version of it, wrote the cache.
        RecipeError: as `make_kind`.
    """
    taps = tuple(map(Tap.parse, section["taps"]))
    # Kinds that read the end of the model have no block.
    block = max(tap.place for tap in taps) or 1
    kind = make_kind(codec_config(**section["parameters"]), block, targets, constants)
    if (kind.name, kind.version, kind.taps) != (section["name"], section["version"], taps):
        raise CacheMismatch(
            "the layer was written by another codec",
            got=f"{section['name']} version {section['version']}",
            expected=f"{kind.name} version {kind.version}",
            hint="read it with the tinymim that wrote it, or make the cache again",
        )
    return kind


def audit_kind(
    section: Mapping[str, Any], training: TargetKind, shapes: Shapes, constants: Mapping[str, Tensor] | None
) -> TargetKind:
    """The kind that reads an audit's layer as whole targets, for the losses of `training`.

    Args:
        section: the target section of the audit's layer.
        training: the kind that students are trained on.
        shapes: the shapes of the teacher, which both caches share.
        constants: the constants of the audit's cache.

    Raises:
        CacheMismatch: the audit's records are not whole targets, or not comparable.
        RecipeError: as `make_kind`.
    """
    config = codec_config(**section["parameters"])
    if not stored_kind(section, constants=constants).whole:
        raise CacheMismatch(
            "the audit's cache holds no whole targets",
            got=f"codec {section['name']}",
            expected="dense, hidden, or int8 with all tokens",
            hint="make audit.cache with codec: {name: dense}, one view, and audit.num_images images",
        )
    if isinstance(training, RelationKind) and isinstance(config, RelationCodec):
        kind = stored_kind(section, relations.whole_targets(section["name"], training, shapes), constants)
        return relations.for_audit(kind, training, shapes)
    targets = training.targets if isinstance(training, ChosenKind) else _ALL
    kind = stored_kind(section, targets if not isinstance(config, RelationCodec) else _ALL, constants)
    if kind.meaning != training.meaning:
        raise CacheMismatch(
            "the audit's cache holds another target than the training run's",
            got=f"{type(kind).__name__} of {', '.join(section['taps'])}",
            expected=f"{type(training).__name__} of {', '.join(map(str, training.taps))}",
            hint="make audit.cache with the kind, place and target of the training run's codec",
        )
    return kind
