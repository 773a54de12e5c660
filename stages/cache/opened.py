"""Typed reads of an opened cache."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.schema.train import LayerConfig, TrainStudentRecipe
from tinymim.configs.taps import Shapes
from tinymim.stages.training.terms import Term, naming, weights_of
from tinymim.stages.units.constants import on_device
from tinymim.storage.manifest import Layer
from tinymim.storage.reader import CacheReader
from tinymim.targets.contract import TargetKind
from tinymim.targets.kinds import stored_kind


class Opened(NamedTuple):
    """A layer that students learn from, its kind with constants on a device, and its term of the loss."""

    layer: Layer
    kind: TargetKind
    term: Term


def opened_kind(reader: CacheReader, layer: Layer, targets: TargetsConfig, device: torch.device) -> TargetKind:
    """The target kind of a layer, restricted to `targets`, with its constants on `device`."""
    return stored_kind(layer.target, targets, on_device(reader.constants(layer.name), device))


def opened_layers(reader: CacheReader, recipe: TrainStudentRecipe, device: torch.device) -> list[Opened]:
    """The layers that a recipe learns from, in its order.

    Raises:
        UserError: the cache has no such layer.
        RecipeError, CacheMismatch: as `stored_kind`; names the layer if there are several.
    """
    layers = [(reader.layer(name), config) for name, config in recipe.each_layer()]
    return [
        opened_layer(layer, config, on_device(reader.constants(layer.name), device), several=len(layers) > 1)
        for layer, config in layers
    ]


def opened_layer(layer: Layer, config: LayerConfig, constants: Mapping[str, Tensor] | None, several: bool) -> Opened:
    """A layer to learn from, with its constants on a device; its term and errors name it where there are `several`."""
    shown = layer.name if several else ""
    with naming(shown):
        kind = stored_kind(layer.target, config.targets, constants)
    term = Term(kind, layer.shapes, shown, weights_of(config), layer.mask, config.student_block)
    return Opened(layer, kind, term)


def arrays_of(opened: Sequence[Opened]) -> dict[str, list[str]]:
    """The names of the arrays to read, by layer."""
    return {layer.name: [spec.name for spec in kind.specs(layer.shapes)] for layer, kind, _ in opened}


def kinds_of(opened: Sequence[Opened]) -> dict[str, tuple[TargetKind, Shapes]]:
    """The kinds and their teachers' shapes, by layer."""
    return {layer.name: (kind, layer.shapes) for layer, kind, _ in opened}
